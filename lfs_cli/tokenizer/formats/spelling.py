"""How GPT-2 and Hugging Face write a token as text: one printable character for each byte.

A byte that is a printable character of Latin-1 stands for itself, the others take the characters from U+0100 on, in
order. So ` the` is `Ġthe` and a line end `Ċ`.
"""

from functools import cache


@cache
def byte_to_character() -> dict[int, str]:
    """Return the character that stands for each byte.

    >>> byte_to_character()[ord(" ")]
    'Ġ'
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


@cache
def _latin_1() -> dict[int, int]:
    """Return, for `str.translate`, the Latin-1 character whose code is the byte; none where nothing is spelled."""
    nothing = dict.fromkeys(range(256), 0xFFFF)
    return nothing | {ord(character): byte for byte, character in byte_to_character().items()}


def write_token(token: bytes) -> str:
    """Return ``token`` as text.

    >>> write_token(b" the")
    'Ġthe'
    """
    characters = byte_to_character()
    return "".join([characters[byte] for byte in token])


def read_token(text: str) -> bytes:
    """Return the bytes that ``text`` stands for; a text with other characters, as special tokens have, is UTF-8."""
    try:
        return text.translate(_latin_1()).encode("latin-1")  # two loops in C: vocabularies have 100,000s of tokens
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")

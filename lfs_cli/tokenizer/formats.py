"""Tokenizers in the files of others: GPT-2's `vocab.json` and `merges.txt`, and Hugging Face's `tokenizer.json`.

Both write a token as text, one printable character for each byte: a byte that is a printable character of Latin-1
stands for itself, the others take the characters from U+0100 on, in order. So ` the` is `Ġthe` and a line end `Ċ`.

    vocab.json        {"!": 0, ..., "Ġthe": 262, ..., "<|endoftext|>": 50256}
    merges.txt        #version: 0.2
                      Ġ t
                      h e
    tokenizer.json    {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", ...}],
                       "pre_tokenizer": {"type": "ByteLevel", "use_regex": true, ...},         GPT-2's pattern
                       "model": {"type": "BPE", "vocab": {...}, "merges": [["Ġ", "t"], ...]}, ...}

Anything that would change ids and that lfs does not do (a normalizer, byte fallback, a prefix space, ...) is refused: a
tokenizer that is almost the right one ruins a model without a message.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lfs_cli.errors import DataError
from lfs_cli.tokenizer.blocks import reading, replace_file
from lfs_cli.tokenizer.split import PATTERNS, Pattern, pattern_for

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]
Content = tuple[Vocab, Merges, list[str], Pattern]

RELEARN = "fetch the file again, or learn a tokenizer with `lfs tokenize`"


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
def character_to_byte() -> dict[str, int]:
    """Return the byte that each character stands for."""
    return {character: byte for byte, character in byte_to_character().items()}


def write_token(token: bytes) -> str:
    """Return ``token`` as text.

    >>> write_token(b" the")
    'Ġthe'
    """
    characters = byte_to_character()
    return "".join([characters[byte] for byte in token])


def read_token(text: str) -> bytes:
    """Return the bytes that ``text`` stands for; a text with other characters, as special tokens have, is UTF-8."""
    bytes_of = character_to_byte()
    try:
        return bytes([bytes_of[character] for character in text])
    except KeyError:
        return text.encode("utf-8", "replace")


def read(path: Path) -> Content:
    """Return vocabulary, merges, special tokens and pattern of the tokenizer at ``path`` (see `Tokenizer.load`)."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return read_huggingface(path / "tokenizer.json")
        return _read_gpt2_with_specials(*_gpt2_files(path))
    if not path.exists():
        raise DataError(f"no tokenizer `{path}`", hint="name a folder or file, or learn one with `lfs tokenize`")
    for ending, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if path.name.endswith(ending):
            partner = path.with_name(path.name.removesuffix(ending) + other)
            return _read_gpt2_with_specials(*sorted((path, partner), key=lambda file: file.suffix))
    return read_huggingface(path)


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    with reading(folder):
        vocabs = sorted(file for file in folder.iterdir() if file.name.endswith("vocab.json"))
    pairs = [(file, file.with_name(file.name.removesuffix("vocab.json") + "merges.txt")) for file in vocabs]
    pairs = [(vocab, merges) for vocab, merges in pairs if merges.exists()]
    if not pairs:
        raise DataError(
            f"no tokenizer in `{folder}`",
            hint="it should hold `tokenizer.json`, or `vocab.json` and `merges.txt`; `lfs tokenize` makes the first",
        )
    if len(pairs) > 1:
        raise DataError(f"{len(pairs)} tokenizers in `{folder}`", hint=f"name one of them, such as `{pairs[0][0]}`")
    return pairs[0]


def _read_gpt2_with_specials(merges_or_vocab: Path, other: Path) -> Content:
    vocab_path, merges_path = sorted((merges_or_vocab, other), key=lambda file: file.suffix != ".json")
    vocab, merges = read_gpt2(vocab_path, merges_path)
    made = {left + right for left, right in merges}
    special_tokens = []
    for id, token in sorted(vocab.items()):
        if len(token) > 1 and token not in made:
            try:
                special_tokens.append(token.decode())
            except UnicodeDecodeError:
                raise DataError(
                    f"token {id} of `{vocab_path}` is not made by any merge of `{merges_path}`",
                    hint="use the two files of one tokenizer",
                ) from None
    return vocab, merges, special_tokens, PATTERNS["gpt2"]


def read_gpt2(vocab_path: Path, merges_path: Path) -> tuple[Vocab, Merges]:
    """Return vocabulary and merges of GPT-2's two files. Raises DataError."""
    vocab = _vocab(_json(vocab_path), vocab_path)
    merges: Merges = []
    for number, line in enumerate(_text(merges_path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise DataError(f"line {number} of `{merges_path}` is not two tokens: `{line[:40]}`", hint=RELEARN)
        merges.append((read_token(parts[0]), read_token(parts[1])))
    _check_merges(vocab, merges, merges_path)
    return vocab, merges


def write_gpt2(
    folder: Path, vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], special_ids: Mapping[str, int]
) -> tuple[Path, Path]:
    """Write `vocab.json` and `merges.txt` into ``folder`` and return their paths. Raises DataError."""
    texts = {id: text for text, id in special_ids.items()}
    named = {texts.get(id) or write_token(token): id for id, token in sorted(vocab.items())}
    lines = ["#version: 0.2", *(f"{write_token(left)} {write_token(right)}" for left, right in merges)]
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    replace_file(vocab_path, json.dumps(named, ensure_ascii=False) + "\n")
    replace_file(merges_path, "\n".join(lines) + "\n")
    return vocab_path, merges_path


def read_huggingface(path: Path) -> Content:
    """Return what a `tokenizer.json` says. Raises DataError when it is damaged or asks for what lfs does not do."""
    tree = _expect(_json(path), dict, "an object", path)
    model = _expect(tree.get("model"), dict, "a `model`", path)
    _refuse_foreign(tree, model, path)
    special_ids = _added_tokens(tree.get("added_tokens") or [], path)
    named = _expect(model.get("vocab"), dict, "a vocabulary", path)
    ordinary = {text: id for text, id in named.items() if special_ids.get(text) != id}
    vocab = _vocab(ordinary, path)
    merges = [_merge(item, path) for item in _expect(model.get("merges"), list, "a list of merges", path)]
    for text, id in special_ids.items():
        if vocab.setdefault(id, text.encode()) != text.encode():
            raise DataError(f"two tokens of `{path}` have the id `{id}`", hint=RELEARN)
    _check_merges(vocab, merges, path)
    return vocab, merges, list(special_ids), _pattern(tree.get("pre_tokenizer"), path)


def write_huggingface(
    folder: Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_ids: Mapping[str, int],
    pattern: Pattern,
) -> Path:
    """Write `tokenizer.json` into ``folder`` and return its path. Raises DataError."""
    ids_of_specials = set(special_ids.values())
    named = {write_token(token): id for id, token in sorted(vocab.items()) if id not in ids_of_specials}
    next_id = len(named)
    for text, id in sorted(special_ids.items(), key=lambda item: item[1]):
        if id == next_id:  # `tokenizers` numbers added tokens after the vocabulary, in order
            next_id += 1
        else:
            named.setdefault(text, id)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern.expression}, "behavior": "Isolated", "invert": False}
    inner = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = sorted(special_ids.items(), key=lambda item: item[1])
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags} for text, id in added],
        "normalizer": None,
        "pre_tokenizer": byte_level if pattern.name == "gpt2" else inner,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(named.items(), key=lambda item: item[1])),
            "merges": [[write_token(left), write_token(right)] for left, right in merges],
        },
    }
    path = folder / "tokenizer.json"
    replace_file(path, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    return path


def _text(path: Path) -> str:
    with reading(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not text in UTF-8 (byte {error.start})", hint=RELEARN) from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"`{path}` is not JSON: {error.msg.lower()} in line {error.lineno}, column {error.colno}", hint=RELEARN
        ) from None
    except (RecursionError, ValueError):
        raise DataError(f"`{path}` is not the JSON of a tokenizer", hint=RELEARN) from None


def _expect(value: Any, kind: type, what: str, path: Path) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"`{path}` does not hold {what}", hint=RELEARN)
    return value


def _vocab(named: Any, path: Path) -> Vocab:
    """Return id -> bytes for an object of tokens and their ids."""
    vocab: Vocab = {}
    for text, id in _expect(named, dict, "an object of tokens and ids", path).items():
        if not text or type(id) is not int or id < 0:
            raise DataError(f"the token `{text}` of `{path}` has the id `{json.dumps(id)[:40]}`", hint=RELEARN)
        if id in vocab:
            raise DataError(f"two tokens of `{path}` have the id `{id}`", hint=RELEARN)
        vocab[id] = read_token(text)
    if not vocab:
        raise DataError(f"`{path}` has an empty vocabulary", hint=RELEARN)
    if max(vocab) >= 1 << 31:
        raise DataError(f"`{path}` has the id `{max(vocab)}`, which is beyond 2^31", hint=RELEARN)
    return vocab


def _check_merges(vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], path: Path) -> None:
    """Raise DataError, naming the file, when bytes or the tokens of a merge are not in the vocabulary."""
    tokens = set(vocab.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise DataError(
            f"`{path}` lacks {len(missing)} of the 256 single bytes, such as `0x{missing[0]:02x}`",
            hint="use a byte-level BPE tokenizer, such as one learned by `lfs tokenize`",
        )
    for number, (left, right) in enumerate(merges, start=1):
        if not {left, right, left + right} <= tokens:
            raise DataError(
                f"merge {number} of `{path}`, {left!r} and {right!r}, has a token that the vocabulary lacks",
                hint="use the vocabulary and the merges of one tokenizer",
            )


def _merge(item: Any, path: Path) -> tuple[bytes, bytes]:
    """Return one merge, which is written `["a", "b"]`, or `"a b"` by older versions."""
    parts = item.split(" ") if isinstance(item, str) else item
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise DataError(f"`{path}` has the merge `{json.dumps(item)[:40]}`, which is not two tokens", hint=RELEARN)
    return read_token(parts[0]), read_token(parts[1])


def _added_tokens(items: Any, path: Path) -> dict[str, int]:
    """Return the added tokens, which are found in the text before it is split, and their ids."""
    special_ids = {}
    for item in _expect(items, list, "a list of added tokens", path):
        match item:
            case {"content": str(text), "id": int(id)} if text and type(id) is int and 0 <= id < 1 << 31:
                for flag in ("lstrip", "rstrip", "single_word"):
                    if item.get(flag):
                        _refuse(f"`{flag}` for the token `{text}`", path)
                special_ids[text] = id
            case _:
                raise DataError(f"`{path}` has the added token `{json.dumps(item)[:60]}`", hint=RELEARN)
    return dict(sorted(special_ids.items(), key=lambda item: item[1]))


def _refuse_foreign(tree: Mapping[str, Any], model: Mapping[str, Any], path: Path) -> None:
    """Raise DataError for anything that would change ids and that lfs does not do."""
    kind = model.get("type", "BPE")
    if kind != "BPE":
        _refuse(f"the model `{kind}`", path)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            _refuse(f"`{name}`", path)
    if tree.get("normalizer"):
        _refuse("a normalizer", path)


def _refuse(what: str, path: Path) -> None:
    raise DataError(
        f"`{path}` asks for {what}, which lfs does not do",
        hint="use a byte-level BPE tokenizer without it, such as GPT-2's",
    )


def _pattern(tree: Any, path: Path) -> Pattern:
    """Return the pattern that a `pre_tokenizer` describes."""
    match tree:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            _refuse("`add_prefix_space`", path)
        case {"type": "ByteLevel", "use_regex": False}:
            _refuse("words that are whole texts", path)
        case {"type": "ByteLevel"}:
            return PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", **rest},
                {"type": "ByteLevel", "use_regex": False, **byte_level},
            ],
        } if not rest.get("invert") and not byte_level.get("add_prefix_space"):
            pattern = pattern_for(expression)
            list(pattern.split(""))  # an expression that cannot be compiled is better met here
            return pattern
        case _:
            _refuse(f"the pre-tokenizer `{json.dumps(tree)[:60]}`", path)
    raise AssertionError("all cases return or raise")

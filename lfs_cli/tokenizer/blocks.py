r"""A text in blocks that can be tokenized apart: how files larger than memory are read, and streams are followed.

A block may end only where the text on both sides has the same tokens as in the whole: at a special token, or where the
pattern allows a cut (`split.Pattern.find_cut`). Where it may not is easy to get wrong: after a line end (`a\n\n` and
`b` are split in another way than `a\n\nb`), between `'` and `s`, inside a character, inside what may become a special
token. So the end of a block is searched backwards, and what is left begins the next one.
"""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lfs_cli.errors import DataError
from lfs_cli.files import replace_text
from lfs_cli.tokenizer.split import Pattern

BLOCK_BYTES = 4 << 20
"""Bytes of a block of a file: large enough that cutting costs nothing, small enough that memory stays flat."""


class Specials:
    """Finds special tokens in UTF-8 bytes: the leftmost first, and of those that begin there the longest.

    Args:
        texts: The special tokens.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = sorted({text.encode() for text in texts}, key=lambda text: (-len(text), text))
        self.longest = max(map(len, encoded), default=0)
        self._search = re.compile(b"|".join(map(re.escape, encoded))) if encoded else None

    def spans(self, data: bytes | bytearray) -> list[tuple[int, int]]:
        """Return the start and the end of every special token in ``data``."""
        return [match.span() for match in self._search.finditer(data)] if self._search else []

    def split(self, data: bytes) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the parts of ``data`` in order as (start, end, special token), with None for text between them."""
        last = 0
        for start, end in self.spans(data):
            if start > last:
                yield last, start, None
            yield start, end, data[start:end]
            last = end
        if last < len(data):
            yield last, len(data), None


def blocks_of(pieces: Iterable[bytes], pattern: Pattern, specials: Specials, least: int) -> Iterator[bytes]:
    """Yield the bytes of ``pieces`` again, in blocks that can be tokenized apart.

    Args:
        pieces: UTF-8 bytes of one text, cut anywhere.
        pattern: Says where a block may end.
        specials: So may it at one of these, and never inside one.
        least: Bytes to collect before a block is cut. A stretch without a place to cut makes a larger block.
    """
    pending = bytearray()
    wanted = least
    for piece in pieces:
        pending += piece
        if len(pending) < wanted:
            continue
        cut = _last_cut(pending, pattern, specials)
        if cut:
            block = bytes(memoryview(pending)[:cut])
            del pending[:cut]
            yield block
            wanted = least
        elif len(pending) > 256:  # look again when it has doubled: many small pieces must not cost quadratic time
            wanted = 2 * len(pending)
    if pending:
        yield bytes(pending)


def _last_cut(data: bytearray, pattern: Pattern, specials: Specials) -> int:
    """Return the largest index at which ``data`` may be cut, whatever follows it; 0 when there is none."""
    certain = len(data) - max(1, specials.longest)  # a special token that begins up to here is whole
    if certain <= 0:
        return 0
    cut = pattern.find_cut(data, certain)
    for start, end in reversed(specials.spans(data)):
        if start > certain:
            continue
        if end >= cut:
            return end
        break
    return cut


def read_blocks(path: Path, pattern: Pattern, specials: Specials) -> Iterator[bytes]:
    """Yield the bytes of the file ``path`` in blocks that can be tokenized apart. Raises DataError."""
    return blocks_of(_pieces(path), pattern, specials, BLOCK_BYTES)


def _pieces(path: Path) -> Iterator[bytes]:
    with reading(path), path.open("rb", buffering=0) as file:
        while piece := file.read(BLOCK_BYTES):
            yield piece


def to_utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of ``text``, with U+FFFD for each lone surrogate, as tiktoken does.

    A pair of surrogates, which no decoder of Python makes but JSON may hold, becomes the character that it stands for.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def utf8_pieces(texts: Iterable[str]) -> Iterator[bytes]:
    """Yield the UTF-8 bytes of ``texts``, which are one text; a surrogate pair may be cut between two of them."""
    held = ""
    for text in texts:
        text = held + text
        held = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield to_utf8(text[: len(text) - len(held)])
    yield to_utf8(held)


@contextmanager
def reading(*paths: Path) -> Iterator[None]:
    """Turn an error of the file system, while ``paths`` are read, into one that says what to do."""
    names = ", ".join(f"`{path}`" for path in paths)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no file {names}", hint="check the path") from None
    except IsADirectoryError:
        raise DataError(f"{names} is a folder", hint="name a file in it") from None
    except OSError as error:
        raise DataError(f"cannot read {names}: {error.strerror}", hint="check the file's permissions") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system, while files of ``folder`` are written, into one that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or set `LFS_DATA` to a folder on a larger disk" if full else "check the folder"
        raise DataError(f"cannot write in `{folder}`: {error.strerror}", hint=hint) from error


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that no reader ever sees half of it. Raises DataError."""
    with writing(path.parent):
        replace_text(path, text)

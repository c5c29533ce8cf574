r"""A text in blocks that can be tokenized apart: how files larger than memory are read, and streams are followed.

A block may end only where the text on both sides has the same tokens as in the whole: at a special token, or where the
pattern allows a cut (`split.Pattern.find_cut`). Where it may not is easy to get wrong: after a line end (`a\n\n` and
`b` are split in another way than `a\n\nb`), between `'` and `s`, inside a character, inside what may become a special
token. So the end of a block is searched backwards, and what is left begins the next one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lfs_cli.errors import DataError, remedy
from lfs_cli.files import replace_text
from lfs_cli.tokenizer.split import Pattern

BLOCK_BYTES = 4 << 20
"""Bytes of a block of a file: large enough that cutting costs nothing, small enough that memory stays flat."""


SAMPLE_BYTES = 1 << 20
"""Bytes of a piece of a file of which only a part is read."""


FindPairs = Callable[[bytes | bytearray | memoryview, int, bytes], Iterable[int]]


class Specials:
    """Finds special tokens in UTF-8 bytes: the leftmost first, and of those that begin there the longest.

    Args:
        texts: The special tokens.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        longest_first = sorted(set(texts), key=lambda text: (-len(text.encode()), text))
        encoded = [text.encode() for text in longest_first]
        self.longest = max(map(len, encoded), default=0)
        self._search = re.compile(b"|".join(map(re.escape, encoded))) if encoded else None
        self.start = _common_start(encoded)

    def may_be_in(self, text: str | bytes) -> bool:
        """Return whether ``text`` has what all of them begin with: a quick look before a slow one."""
        if self._search is None:
            return False
        return self.start.decode("utf-8", "ignore") in text if isinstance(text, str) else self.start in text

    def spans(
        self, data: bytes | bytearray | memoryview, stop: int | None = None, find: FindPairs | None = None
    ) -> list[tuple[int, int]]:
        """Return the start and the end of every special token in ``data[:stop]``.

        Args:
            data: UTF-8.
            stop: Where it ends.
            find: Finds two bytes in data (`arrays.find_pairs`), for much data.
        """
        if self._search is None:
            return []
        stop = len(data) if stop is None else stop
        if find is None or len(self.start) < 2:
            return [match.span() for match in self._search.finditer(data, 0, stop)]
        found, last = [], 0
        for start in find(data, stop, self.start[:2]):
            match = self._search.match(data, start, stop) if start >= last else None
            if match:
                found.append(match.span())
                last = match.end()
        return found

    def match(self, data: bytes) -> bytes | None:
        """Return the special token that ``data`` begins with, the longest; None when there is none."""
        match = self._search.match(data) if self._search is not None else None
        return match.group() if match else None

    def split(self, data: bytes) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the parts of ``data`` in order as (start, end, special token), with None for text between them."""
        for start, end, is_special in parts(self.spans(data), len(data)):
            yield start, end, data[start:end] if is_special else None


def _common_start(texts: Sequence[bytes]) -> bytes:
    first, last = min(texts, default=b""), max(texts, default=b"")
    size = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:size]


def parts(spans: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, True) for each span of a text of ``size`` bytes, (start, end, False) for what is between."""
    last = 0
    for start, end in spans:
        if start > last:
            yield last, start, False
        yield start, end, True
        last = end
    if last < size:
        yield last, size, False


@dataclass
class Block:
    """A part of a file that can be tokenized apart.

    Args:
        data: Holds the text, and more behind it.
        size: Bytes of the text.
        spans: Where special tokens are in it.
    """

    data: bytearray
    size: int
    spans: list[tuple[int, int]]

    def parts(self) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts in order as (start, end, whether it is a special token)."""
        return parts(self.spans, self.size)

    def split(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield the parts in order as (start, end, special token), with None for text between them."""
        for start, end, is_special in self.parts():
            yield start, end, bytes(self.data[start:end]) if is_special else None


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
        cut = _last_cut(pending, len(pending), specials.spans(pending), pattern, specials)
        if cut:
            block = bytes(memoryview(pending)[:cut])
            del pending[:cut]
            yield block
            wanted = least
        elif len(pending) > 256:  # look again when it has doubled: many small pieces must not cost quadratic time
            wanted = 2 * len(pending)
    if pending:
        yield bytes(pending)


def _last_cut(
    data: bytes | bytearray,
    size: int,
    spans: list[tuple[int, int]],
    pattern: Pattern,
    specials: Specials,
    start: int = 1,
) -> int:
    """Return the last index from ``start`` on at which ``data[:size]`` may be cut, whatever follows; 0 for none."""
    certain = size - max(1, specials.longest)  # a special token that begins up to here is whole
    if certain < start:
        return 0
    cut = pattern.find_cut(data, certain, start)
    for start, end in reversed(spans):
        if start > certain:
            continue
        if end >= cut:
            return end
        break
    return cut


def read_blocks(
    path: Path,
    pattern: Pattern,
    specials: Specials,
    spare: list[bytearray] | None = None,
    find: FindPairs | None = None,
) -> Iterator[Block]:
    """Yield the file ``path`` in blocks that can be tokenized apart, of some `BLOCK_BYTES` each.

    Args:
        path: Text in UTF-8, as long as it may be.
        pattern: Says where a block may end.
        specials: So may it at one of these, and never inside one.
        spare: Buffers of blocks that are done with, to be used again; it grows when the caller puts some there.
        find: As for `Specials.spans`.

    Raises:
        DataError: When the file cannot be read.
    """
    spare, room, carry, start = spare if spare is not None else [], BLOCK_BYTES, b"", 1
    with reading(path), path.open("rb", buffering=0) as file:
        while True:
            data = spare.pop() if spare else bytearray()
            wanted = len(carry) + room  # and no more if the buffer is larger: blocks are the same each time
            if len(data) < wanted:
                data = bytearray(wanted)
            data[: len(carry)] = carry
            used, got = len(carry), 1
            with memoryview(data)[:wanted] as view:
                while used < wanted and got:
                    got = file.readinto(view[used:])
                    used += got
            spans = specials.spans(data, used, find)
            if not got:
                if used:
                    yield Block(data, used, spans)
                return
            cut = _last_cut(data, used, spans, pattern, specials, start)
            carry = bytes(memoryview(data)[cut:used])
            if cut:
                room, start = BLOCK_BYTES, 1
                yield Block(data, cut, [span for span in spans if span[1] <= cut])
            else:
                room, start = used, max(1, used - specials.longest)  # no place to cut: look on when it has doubled


def read_sample(
    path: Path,
    wanted: int,
    pattern: Pattern,
    specials: Specials,
    spare: list[bytearray] | None = None,
    find: FindPairs | None = None,
) -> Iterator[Block]:
    """Yield about ``wanted`` bytes of a file, in pieces of `SAMPLE_BYTES` that lie evenly in it, always the same ones.

    Args:
        path: Text in UTF-8.
        wanted: Bytes; if the file has no more, all of it is taken.
        pattern: Says where a piece may begin and end, so that it has no half words.
        specials: They never are in two pieces.
        spare: As for `read_blocks`.
        find: As for `read_blocks`.

    Raises:
        DataError: When the file cannot be read.
    """
    with reading(path):
        size = path.stat().st_size
    if wanted >= size:
        yield from read_blocks(path, pattern, specials, spare, find)
        return
    pieces = max(1, round(wanted / SAMPLE_BYTES))
    with reading(path), path.open("rb") as file:
        for number in range(pieces):
            offset = size * number // pieces
            file.seek(offset)
            data = bytearray(file.read(wanted // pieces))
            start = 0 if offset == 0 else _first_cut(data, pattern, specials)
            del data[:start]
            spans = specials.spans(data, find=find)
            end = _last_cut(data, len(data), spans, pattern, specials)
            if end and (start or offset == 0):
                yield Block(data, end, [span for span in spans if span[1] <= end])


def _first_cut(data: bytearray, pattern: Pattern, specials: Specials) -> int:
    """Return a place near the start at which ``data`` may be cut; 0 when there is none."""
    stop = 1 << 10
    while stop < len(data):
        cut = pattern.find_cut(data, stop)
        if cut:
            return cut
        stop *= 8
    spans = specials.spans(data)
    return spans[0][1] if spans else 0


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
        hint = remedy(error) or "check the file's permissions"
        raise DataError(f"cannot read {names}: {error.strerror}", hint=hint) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system, while files of ``folder`` are written, into one that says what to do."""
    try:
        yield
    except OSError as error:
        hint = remedy(error) or "check the folder"
        raise DataError(f"cannot write in `{folder}`: {error.strerror}", hint=hint) from error


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that no reader ever sees half of it. Raises DataError."""
    with writing(path.parent):
        replace_text(path, text)

"""Token shards: ids in flat files that are memory-mapped, so that a corpus may be larger than memory.

A split is the files `<split>-00000.bin`, `<split>-00001.bin`, ... of one folder, read as one long row of ids. Each file
is a header of 64 bytes and then its ids, nothing else. All numbers are little endian:

    offset  bytes  type    what
         0      8  bytes   magic, `LFSTOKEN`
         8      2  uint16  version of this format, 1
        10      2  uint16  type of an id: 2 for uint16, 4 for uint32, the bytes that one takes
        12      4  uint32  checksum: CRC-32 of the bytes of all ids of the split, the same in each of its files
        16      8  uint64  count of ids in this file
        24      4  uint32  number of this file in its split, from 0
        28      4  uint32  files of the split
        32     32  bytes   hash of the tokenizer (SHA-256) that made the ids

So every file tells what it belongs to: a shard that is missing, cut short, left over from another write or made by
another tokenizer is found when the split is opened, and not hours later as garbled text.
"""

import errno
import os
import re
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lfs_cli.errors import DataError
from lfs_cli.files import sync

MAGIC = b"LFSTOKEN"
VERSION = 1
HEADER = struct.Struct("<8sHHIQII32s")
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
WRITE_AGAIN = "run `lfs tokenize` again"


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes of a shard say. See the module docstring."""

    dtype: np.dtype
    checksum: int
    count: int
    number: int
    shards: int
    tokenizer_hash: str

    def to_bytes(self) -> bytes:
        kind = self.dtype.itemsize
        owner = bytes.fromhex(self.tokenizer_hash)
        return HEADER.pack(MAGIC, VERSION, kind, self.checksum, self.count, self.number, self.shards, owner)

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Return the header of the shard at ``path``. Raises DataError when the file is not a whole shard."""
        try:
            with path.open("rb") as file:
                raw = file.read(HEADER.size)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read `{path}`: {error.strerror}", hint="check its permissions") from error
        if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
            raise _foreign(path)
        if len(raw) < HEADER.size:
            raise DataError(f"`{path}` is cut short: {len(raw)} of {HEADER.size} bytes of header", hint=WRITE_AGAIN)

        _, version, kind, checksum, count, number, shards, owner = HEADER.unpack(raw)
        if version != VERSION:
            raise DataError(f"`{path}` has version {version} of the format, not {VERSION}", hint=WRITE_AGAIN)
        if kind not in DTYPES:
            raise DataError(f"`{path}` has ids of the unknown type {kind}", hint=WRITE_AGAIN)
        expected = HEADER.size + count * kind
        if size != expected:
            problem = "is cut short" if size < expected else "is longer than its header says"
            raise DataError(f"`{path}` {problem}: {size:,} bytes, {expected:,} expected", hint=WRITE_AGAIN)
        return cls(DTYPES[kind], checksum, count, number, shards, owner.hex())


def write_shards(
    folder: Path,
    split: str,
    arrays: Iterable[np.ndarray],
    *,
    vocab_size: int,
    tokenizer_hash: str,
    shard_tokens: int = 100_000_000,
) -> list[Path]:
    """Write the ids of ``arrays``, in order, as the shards of one split, and return their paths.

    The shards appear under their names when all of them are complete; until then, and whatever happens, an earlier
    write of the split stays as it was. Memory holds one of ``arrays`` at a time.

    Args:
        folder: Where the shards go; made when missing. One writer a split at a time.
        split: Name of the split, such as ``"train"``.
        arrays: One-dimensional arrays of ids, of any lengths and any integer type.
        vocab_size: Ids are below this. Up to 65,536 they take two bytes each, above it four.
        tokenizer_hash: What the tokenizer calls itself, 64 hex digits.
        shard_tokens: Ids in every shard but the last.

    Raises:
        DataError: When the files cannot be written, such as on a full disk, or would replace one that is no shard.
        ValueError: For an id that is not below ``vocab_size``.
    """
    refuse_foreign(folder, split)
    draft = folder / f".{split}.draft"
    if len(bytes.fromhex(tokenizer_hash)) != 32:
        raise ValueError(f"a tokenizer's hash has 64 hex digits, got {tokenizer_hash!r}")
    with _explained(folder):
        shutil.rmtree(draft, ignore_errors=True)  # of a writer that was killed
        draft.mkdir(parents=True)
    writer = _Writer(draft, split, DTYPES[2 if vocab_size <= 65_536 else 4], tokenizer_hash, shard_tokens)
    try:
        for array in arrays:
            if len(array) and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise ValueError(f"ids must be in 0..{vocab_size - 1}, got {array.min()}..{array.max()}")
            with _explained(folder):
                writer.add(array)
        with _explained(folder):
            writer.finish()
            return _publish(writer.paths, folder, split)
    finally:
        with suppress(OSError):  # what a full disk could not take is thrown away in any case
            writer.close()
        shutil.rmtree(draft, ignore_errors=True)


def refuse_foreign(folder: Path, split: str) -> None:
    """Raise DataError when a file of ``folder`` is named like a shard of ``split`` and is none: it is not ours."""
    for path in _shards_in(folder, split).values():
        with suppress(OSError), path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC[: len(start)]:
                raise _foreign(path)


class Tokens:
    """The ids of one split as one long row, whatever number of arrays they lie in.

    >>> tokens = Tokens.of(np.array([5, 6, 7], dtype=np.uint16))
    >>> len(tokens), tokens[1:3]
    (3, array([6, 7], dtype=uint16))

    Args:
        arrays: One-dimensional arrays, all of one integer type.
        source: What to call these ids in a message, such as ``"`train` in data/tokens/tiny"``.
        tokenizer_hash: Hash of the tokenizer that made them; empty when unknown.
        checksum: CRC-32 of the ids' bytes, which names the text in the record of a run; None when unknown.
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], *, source: str, tokenizer_hash: str = "", checksum: int | None = None
    ) -> None:
        self.source = source
        self.tokenizer_hash = tokenizer_hash
        self.checksum = checksum
        self.dtype: np.dtype = arrays[0].dtype
        # As plain arrays they are still views of the mapped files, but a slice costs a fifth of a np.memmap's.
        self._arrays = [np.asarray(array) for array in arrays]
        self._ends = list(accumulate(len(array) for array in arrays))

    @classmethod
    def open(cls, folder: Path, split: str, *, tokenizer_hash: str | None = None) -> "Tokens":
        """Map the shards of a split into memory, after checking that they are whole and belong together.

        Args:
            folder: Where the shards are.
            split: Name of the split, such as ``"train"``.
            tokenizer_hash: The hash that the shards must carry; None accepts any.

        Raises:
            DataError: For shards that are missing, damaged, foreign or of another tokenizer.
        """
        paths = _shards_in(folder, split)
        if not paths:
            raise DataError(f"no tokens for `{split}` in `{folder}`", hint="run `lfs tokenize`")
        headers = {number: Header.read(path) for number, path in paths.items()}
        _check_together(paths, headers)
        first = headers[0]
        if tokenizer_hash is not None and tokenizer_hash != first.tokenizer_hash:
            raise DataError(
                f"`{paths[0]}` was made by the tokenizer {first.tokenizer_hash[:12]}, not by {tokenizer_hash[:12]}",
                hint=WRITE_AGAIN,
            )
        arrays = [_map(paths[number], headers[number]) for number in sorted(paths)]
        source = f"`{split}` in `{folder}`"
        return cls(arrays, source=source, tokenizer_hash=first.tokenizer_hash, checksum=first.checksum)

    @classmethod
    def of(cls, array: "np.ndarray | Tokens") -> "Tokens":
        """Wrap an array of ids without copying it; Tokens pass through."""
        return array if isinstance(array, Tokens) else cls([np.asarray(array)], source="the array")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        """Return the ids of ``[start:stop]``: a view where they lie in one array, a copy across a border."""
        start, stop, stride = span.indices(len(self))
        if stride != 1:
            raise ValueError(f"Tokens are sliced without a step, got {span.step}")
        if len(self._arrays) == 1:
            return self._arrays[0][start:stop]
        pieces = list(self._pieces(start, stop))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, self.dtype)])

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        while start < stop:
            index = bisect_right(self._ends, start)
            array, end = self._arrays[index], self._ends[index]
            begin = end - len(array)
            yield array[start - begin : stop - begin]
            start = end


def _foreign(path: Path) -> DataError:
    return DataError(
        f"`{path}` is not a token shard", hint=f"move it away: `mv {path} {path}.kept`; then {WRITE_AGAIN}"
    )


class _Writer:
    """Cuts a stream of ids into shards of equal length, under their final names in a folder of their own."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokenizer_hash: str, shard_tokens: int) -> None:
        self.paths: list[Path] = []
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._tokenizer_hash = tokenizer_hash
        self._shard_tokens = shard_tokens
        self._counts: list[int] = []
        self._checksum = 0
        self._file: BinaryIO | None = None

    def add(self, array: np.ndarray) -> None:
        ids = np.ascontiguousarray(array, dtype=self._dtype)
        while len(ids):
            file = self._file
            if file is None or self._counts[-1] == self._shard_tokens:
                file = self._start_shard()
            piece, ids = np.split(ids, [self._shard_tokens - self._counts[-1]])
            self._checksum = zlib.crc32(piece.data, self._checksum)
            file.write(piece.data)
            self._counts[-1] += len(piece)

    def finish(self) -> None:
        """Give every shard its header, which holds what is known only at the end, and bring it to the disk."""
        if self._file is None:
            self._start_shard()
        self.close()
        for number, (path, count) in enumerate(zip(self.paths, self._counts, strict=True)):
            header = Header(self._dtype, self._checksum, count, number, len(self.paths), self._tokenizer_hash)
            with path.open("r+b") as file:
                file.write(header.to_bytes())
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _start_shard(self) -> BinaryIO:
        self.close()
        path = self._folder / f"{self._split}-{len(self.paths):05}.bin"
        self._file = file = path.open("wb")
        file.write(bytes(HEADER.size))
        self.paths.append(path)
        self._counts.append(0)
        return file


def _publish(drafts: list[Path], folder: Path, split: str) -> list[Path]:
    """Rename complete drafts to their place, then remove what an earlier, longer write has left beyond them.

    A writer that is killed between two renames leaves shards of two writes, which their checksums give away.
    """
    paths = [draft.replace(folder / draft.name) for draft in drafts]
    for number, path in _shards_in(folder, split).items():
        if number >= len(paths):
            path.unlink()
    sync(folder)  # the renames themselves are safe only when the folder is on the disk
    return paths


def _shards_in(folder: Path, split: str) -> dict[int, Path]:
    """Return the files of ``folder`` that are named like shards of ``split``, by number."""
    pattern = re.compile(rf"{re.escape(split)}-(\d{{5,}})\.bin")
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob("*.bin"))
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def _check_together(paths: dict[int, Path], headers: dict[int, Header]) -> None:
    """Raise DataError unless the shards are all that one write has made."""
    first = headers[min(headers)]
    for number, header in headers.items():
        if header.tokenizer_hash != first.tokenizer_hash:
            raise DataError(
                f"`{paths[number]}` was made by the tokenizer {header.tokenizer_hash[:12]}, "
                f"and `{paths[min(paths)]}` by {first.tokenizer_hash[:12]}",
                hint=WRITE_AGAIN,
            )
        if header.number != number:
            raise DataError(f"`{paths[number]}` is shard {header.number} by its header", hint=WRITE_AGAIN)
        if (header.checksum, header.shards, header.dtype) != (first.checksum, first.shards, first.dtype):
            raise DataError(
                f"`{paths[number]}` and `{paths[min(paths)]}` come from two different writes", hint=WRITE_AGAIN
            )
    folder, name = paths[min(paths)].parent, paths[min(paths)].name.rpartition("-")[0]
    missing = [f"`{folder / name}-{number:05}.bin`" for number in range(first.shards) if number not in paths]
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise DataError(f"shards are missing: {', '.join(missing[:3])}{more}", hint=WRITE_AGAIN)
    extra = [path for number, path in paths.items() if number >= first.shards]
    if extra:
        raise DataError(f"`{extra[0]}` is beyond the {first.shards} shards of its split", hint=WRITE_AGAIN)


def _map(path: Path, header: Header) -> np.ndarray:
    if not header.count:  # nothing cannot be mapped
        return np.empty(0, header.dtype)
    return np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER.size, shape=(header.count,))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or set `LFS_DATA` to a folder on a larger disk" if full else "check the folder"
        raise DataError(
            f"cannot write token shards in `{folder}`: {error.strerror}", hint=f"{remedy}, then {WRITE_AGAIN}"
        ) from error

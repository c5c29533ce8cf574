"""Token shards: ids in flat files that are memory-mapped, so that a corpus may be larger than memory.

A split is the files `<split>-00000.bin`, `<split>-00001.bin`, ... of one folder, read as one long row of ids. Each file
is a header of 128 bytes, then its ids, then a table of checksums. All numbers are little endian:

    offset  bytes  type    what
         0      8  bytes   magic, `LFSTOKEN`
         8      2  uint16  version of this format, 2
        10      2  uint16  type of an id: 2 for uint16, 4 for uint32, the bytes that one takes
        12      4  uint32  checksum of the bytes of all ids of the split, the same in each of its files
        16      8  uint64  count of ids in this file
        24      4  uint32  number of this file in its split, from 0
        28      4  uint32  files of the split
        32     32  bytes   hash of the tokenizer (SHA-256) that made the ids
        64      4  uint32  checksum of the table
        68      4  uint32  checksum of bytes 0 to 67
        72     56  bytes   zero
       128         uint16 or uint32, as said above: the ids
                   uint32  the table: the checksum of the ids' bytes before this file, and after each of its blocks

A block is 16 KiB of ids, and the last one of a file what remains. All checksums are CRC-32. The one of the ids runs on
from block to block and from file to file: the entry before a block, carried on over the block, must give the entry
behind it, and the last entry of the last file is the checksum of the split.

So every file tells what it belongs to. A shard that is missing, cut short, left over from another write or made by
another tokenizer, and a damaged header or table, are found when the split is opened. A damaged block is found when it
is first read, since to read all of a large corpus at each start would take minutes; `Tokens.verify` does it when asked.
"""

import mmap
import os
import re
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lfs_cli.errors import DataError, remedy
from lfs_cli.files import check_regular, sync

MAGIC = b"LFSTOKEN"
VERSION = 2
HEADER_BYTES = 128
BLOCK_BYTES = 1 << 14
"""Bytes of ids with a checksum of their own: so few that checking them is not felt when a step first reads them."""

_FIELDS = struct.Struct("<8sHHIQII32sI")
_CRC = struct.Struct("<I")
_TABLE = np.dtype("<u4")
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
WRITE_AGAIN = "run `lfs tokenize` again"
_VERIFIED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Header:
    """What the first 128 bytes of a shard say. See the module docstring."""

    dtype: np.dtype
    checksum: int
    count: int
    number: int
    shards: int
    tokenizer_hash: str
    table_checksum: int

    @property
    def table_offset(self) -> int:
        """Where in the file the table of checksums begins."""
        return HEADER_BYTES + self.count * self.dtype.itemsize

    @property
    def table_entries(self) -> int:
        """One for the ids before this file and one for each block."""
        return 1 + -(-self.count * self.dtype.itemsize // BLOCK_BYTES)

    def to_bytes(self) -> bytes:
        kind = self.dtype.itemsize
        owner = bytes.fromhex(self.tokenizer_hash)
        fields = _FIELDS.pack(
            MAGIC, VERSION, kind, self.checksum, self.count, self.number, self.shards, owner, self.table_checksum
        )
        return (fields + _CRC.pack(zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Return the header of the shard at ``path``. Raises DataError when the file is not a whole shard."""
        with _explained_reading(path):
            check_regular(path)
            with path.open("rb") as file:
                raw = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
            raise _foreign(path)
        version = int.from_bytes(raw[8:10], "little")
        if len(raw) >= 10 and version != VERSION:
            raise DataError(f"`{path}` has version {version} of the format, not {VERSION}", hint=WRITE_AGAIN)
        if len(raw) < HEADER_BYTES:
            raise DataError(f"`{path}` is cut short: {len(raw)} of {HEADER_BYTES} bytes of header", hint=WRITE_AGAIN)

        fields, rest = raw[: _FIELDS.size], raw[_FIELDS.size :]
        _, _, kind, checksum, count, number, shards, owner, table_checksum = _FIELDS.unpack(fields)
        if rest != _CRC.pack(zlib.crc32(fields)).ljust(len(rest), b"\0"):
            raise DataError(f"`{path}` is damaged: its header does not fit its checksum", hint=WRITE_AGAIN)
        if kind not in DTYPES:
            raise DataError(f"`{path}` has ids of the unknown type {kind}", hint=WRITE_AGAIN)
        header = cls(DTYPES[kind], checksum, count, number, shards, owner.hex(), table_checksum)
        expected = header.table_offset + header.table_entries * _TABLE.itemsize
        if size != expected:
            problem = "is cut short" if size < expected else "is longer than its header says"
            raise DataError(f"`{path}` {problem}: {size:,} bytes, {expected:,} expected", hint=WRITE_AGAIN)
        return header


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

    They take the place of an earlier write of the split when all of them are complete, and all at once; until then, and
    whatever happens, that one stays as it was. Memory holds one of ``arrays`` at a time.

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
    if len(bytes.fromhex(tokenizer_hash)) != 32:
        raise ValueError(f"a tokenizer's hash has 64 hex digits, got {tokenizer_hash!r}")
    settle(folder, split)
    draft = folder / f".{split}.draft"
    writer = _Writer(draft, split, DTYPES[2 if vocab_size <= 65_536 else 4], tokenizer_hash, shard_tokens)
    try:
        with _explained_writing(folder):
            draft.mkdir(parents=True)
        for array in arrays:
            if len(array) and not 0 <= int(array.min()) <= int(array.max()) < vocab_size:
                raise ValueError(f"ids must be in 0..{vocab_size - 1}, got {array.min()}..{array.max()}")
            with _explained_writing(folder):
                writer.add(array)
        with _explained_writing(folder):
            names = writer.finish()
            draft.replace(_complete(folder, split))
            _publish(folder, split)
    finally:
        with suppress(OSError):  # what a full disk could not take is thrown away in any case
            writer.close()
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in names]


def settle(folder: Path, split: str) -> None:
    """Finish or remove what a killed writer of ``split`` has left. What is read before and after is the same.

    Raises:
        DataError: When a file that is no shard has the name of one, or the folder cannot be written.
    """
    complete = _complete(folder, split)
    with _explained_writing(folder):
        shutil.rmtree(folder / f".{split}.draft", ignore_errors=True)
        if not all(_has_header(path) for path in _shards_named(complete, split).values()):
            shutil.rmtree(complete)  # damaged since: the one before is better
    foreign = [path for path in _shards_in(folder, split).values() if not _is_shard(path)]
    if foreign:
        raise _foreign(foreign[0])
    with _explained_writing(folder):
        if complete.is_dir():
            _publish(folder, split)


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
        guards: Called for each array with a start and a stop before ids between them are handed out; none by default.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        *,
        source: str,
        tokenizer_hash: str = "",
        checksum: int | None = None,
        guards: Sequence[Callable[[int, int], None]] = (),
    ) -> None:
        self.source = source
        self.tokenizer_hash = tokenizer_hash
        self.checksum = checksum
        self.dtype: np.dtype = arrays[0].dtype
        # As plain arrays they are still views of the mapped files, but a slice costs a fifth of a np.memmap's.
        self._arrays = [np.asarray(array) for array in arrays]
        self._ends = list(accumulate(len(array) for array in arrays))
        self._guards = guards or [_let_through] * len(arrays)

    @classmethod
    def open(cls, folder: Path, split: str, *, tokenizer_hash: str | None = None) -> "Tokens":
        """Map the shards of a split into memory, after checking that they are whole and belong together.

        Their ids are compared with their checksums block by block, each when it is first read: then, too, a slice may
        raise DataError.

        Args:
            folder: Where the shards are.
            split: Name of the split, such as ``"train"``.
            tokenizer_hash: The hash that the shards must carry; None accepts any.

        Raises:
            DataError: For shards that are missing, damaged, foreign or of another tokenizer.
        """
        while True:
            paths = _shards_in(folder, split)
            if not paths:
                raise DataError(f"no tokens for `{split}` in `{folder}`", hint="run `lfs tokenize`")
            try:
                return cls._map(paths, f"`{split}` in `{folder}`", tokenizer_hash)
            except DataError:
                if _shards_in(folder, split) == paths:
                    raise  # else a writer has just moved them to their place

    @classmethod
    def _map(cls, paths: dict[int, Path], source: str, tokenizer_hash: str | None) -> "Tokens":
        headers = {number: Header.read(path) for number, path in paths.items()}
        _check_together(paths, headers)
        first = headers[0]
        if tokenizer_hash is not None and tokenizer_hash != first.tokenizer_hash:
            raise DataError(
                f"`{paths[0]}` was made by the tokenizer {first.tokenizer_hash[:12]}, not by {tokenizer_hash[:12]}",
                hint=WRITE_AGAIN,
            )
        tables = {number: _read_table(path, headers[number]) for number, path in paths.items()}
        _check_succession(paths, tables, first.checksum)
        arrays, guards = [], []
        for number in range(len(paths)):
            mapped, header = _map_file(paths[number]), headers[number]
            arrays.append(np.frombuffer(mapped, header.dtype, header.count, HEADER_BYTES))
            guards.append(_Guard(paths[number], mapped, arrays[-1], tables[number]))
        return cls(arrays, source=source, tokenizer_hash=first.tokenizer_hash, checksum=first.checksum, guards=guards)

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
            self._guards[0](start, stop)
            return self._arrays[0][start:stop]
        pieces = list(self._pieces(start, stop))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, self.dtype)])

    def verify(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Compare all ids with their checksums, save those that were read before. Raises DataError at the first damage.

        Args:
            on_progress: Called now and then with the ids done so far.
        """
        for start in range(0, len(self), _VERIFIED_AT_ONCE):
            stop = min(start + _VERIFIED_AT_ONCE, len(self))
            for _ in self._pieces(start, stop):
                pass
            if on_progress is not None:
                on_progress(stop)

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        while start < stop:
            index = bisect_right(self._ends, start)
            array, end = self._arrays[index], self._ends[index]
            begin = end - len(array)
            last = min(stop - begin, len(array))
            self._guards[index](start - begin, last)
            yield array[start - begin : last]
            start = end


class _Guard:
    """Compares the blocks of one shard with their checksums, each once, when it is first read.

    And whether the file is as long as it was, each time: to read what is no longer there would end the process.

    Args:
        path: The shard, for messages.
        mapped: The file in memory.
        ids: Its ids.
        table: Checksum before the first block, and after each.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, ids: np.ndarray, table: np.ndarray) -> None:
        self._path = path
        self._size_now = mapped.size
        self._size = len(mapped)
        self._bytes = ids.view(np.uint8).data
        self._bytes_per_id = ids.itemsize
        self._table = table
        self._unread = bytearray(b"\1") * (len(table) - 1)  # a byte for each block: a search in it costs 50 ns

    def __call__(self, start: int, stop: int) -> None:
        if self._size_now() != self._size:
            raise DataError(f"`{self._path}` was changed while it was read", hint=WRITE_AGAIN)
        first = start * self._bytes_per_id // BLOCK_BYTES
        end = -(-stop * self._bytes_per_id // BLOCK_BYTES)
        while (first := self._unread.find(1, first, end)) >= 0:
            self._check(first)

    def _check(self, block: int) -> None:
        start = block * BLOCK_BYTES
        data = self._bytes[start : start + BLOCK_BYTES]
        if zlib.crc32(data, int(self._table[block])) != self._table[block + 1]:
            place = HEADER_BYTES + start
            raise DataError(
                f"`{self._path}` is damaged: block {block}, bytes {place:,} to {place + len(data) - 1:,}, does not fit "
                "its checksum",
                hint=WRITE_AGAIN,
            )
        self._unread[block] = 0


def _let_through(start: int, stop: int) -> None:
    """Guard an array that has no checksums."""


def _foreign(path: Path) -> DataError:
    return DataError(
        f"`{path}` is not a token shard", hint=f"move it away: `mv {path} {path}.kept`; then {WRITE_AGAIN}"
    )


def _is_shard(path: Path) -> bool:
    """Return whether a file begins like a shard, as far as it goes; one that cannot be read is not judged."""
    with suppress(OSError):
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        return start == MAGIC[: len(start)]
    return True


def _has_header(path: Path) -> bool:
    try:
        Header.read(path)
    except DataError:
        return False
    return True


class _Writer:
    """Cuts a stream of ids into shards of equal length, under their final names in a folder of their own."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, tokenizer_hash: str, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._tokenizer_hash = tokenizer_hash
        self._shard_tokens = shard_tokens
        self._shards: list[tuple[str, int, int]] = []  # name, ids, checksum of the table
        self._checksum = 0
        self._file: BinaryIO | None = None
        self._count = 0
        self._table: list[int] = []
        self._room = BLOCK_BYTES  # bytes that the block under way still takes

    def add(self, array: np.ndarray) -> None:
        ids = np.ascontiguousarray(array, dtype=self._dtype)
        while len(ids):
            if self._file is None or self._count == self._shard_tokens:
                self._start_shard()
            piece, ids = np.split(ids, [self._shard_tokens - self._count])
            self._count += len(piece)
            self._write(piece.view(np.uint8).data)

    def finish(self) -> list[str]:
        """Give every shard its header, which holds what is known only at the end, and bring all to the disk.

        Returns:
            The names of the shards.
        """
        if self._file is None:
            self._start_shard()
        self._end_shard()
        for number, (name, count, table) in enumerate(self._shards):
            owner = self._tokenizer_hash
            header = Header(self._dtype, self._checksum, count, number, len(self._shards), owner, table)
            with (self._folder / name).open("r+b") as file:
                file.write(header.to_bytes())
                file.flush()
                os.fsync(file.fileno())
        sync(self._folder)
        return [name for name, _, _ in self._shards]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, data: memoryview) -> None:
        """Write bytes of ids, and note the checksum wherever a block ends."""
        assert self._file is not None
        self._file.write(data)
        start = 0
        while start < len(data):
            part = data[start : start + self._room]
            self._checksum = zlib.crc32(part, self._checksum)
            start += len(part)
            self._room -= len(part)
            if not self._room:
                self._table.append(self._checksum)
                self._room = BLOCK_BYTES

    def _start_shard(self) -> None:
        if self._file is not None:
            self._end_shard()
        path = self._folder / f"{self._split}-{len(self._shards):05}.bin"
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._count = 0
        self._table = [self._checksum]
        self._room = BLOCK_BYTES

    def _end_shard(self) -> None:
        assert self._file is not None
        if self._room < BLOCK_BYTES:
            self._table.append(self._checksum)
        table = np.array(self._table, dtype=_TABLE).tobytes()
        self._file.write(table)
        self._file.close()
        self._shards.append((f"{self._split}-{len(self._shards):05}.bin", self._count, zlib.crc32(table)))


def _complete(folder: Path, split: str) -> Path:
    """Return the folder of a complete write on its way to its place. From the moment it is there it counts."""
    return folder / f".{split}.complete"


def _publish(folder: Path, split: str) -> None:
    """Move the shards of a complete write to their place, and remove those that an earlier, longer write had beyond."""
    complete = _complete(folder, split)
    sync(folder)
    valid = _shards_in(folder, split)
    for number, path in _shards_named(folder, split).items():
        if number not in valid:
            path.unlink()
    for path in _shards_named(complete, split).values():
        path.replace(folder / path.name)
    sync(folder)  # the renames themselves are safe only when the folder is on the disk
    complete.rmdir()


def _shards_in(folder: Path, split: str) -> dict[int, Path]:
    """Return the shards of ``split``, by number.

    Those of a complete write that were not moved yet stand for the ones at their place, which are older; what an older
    and longer write has beyond them does not count.
    """
    complete = _shards_named(_complete(folder, split), split)
    placed = _shards_named(folder, split)
    if complete:
        shards = Header.read(next(iter(complete.values()))).shards
        placed = {number: path for number, path in placed.items() if number < shards}
    return dict(sorted({**placed, **complete}.items()))


def _shards_named(folder: Path, split: str) -> dict[int, Path]:
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
    missing = first.shards - sum(number < first.shards for number in paths)
    if missing:
        numbers = islice((number for number in range(first.shards) if number not in paths), 3)
        named = ", ".join(f"`{folder / name}-{number:05}.bin`" for number in numbers)
        more = f" and {missing - 3:,} more" if missing > 3 else ""
        raise DataError(f"shards are missing: {named}{more}", hint=WRITE_AGAIN)
    extra = [path for number, path in paths.items() if number >= first.shards]
    if extra:
        raise DataError(f"`{extra[0]}` is beyond the {first.shards} shards of its split", hint=WRITE_AGAIN)


def _read_table(path: Path, header: Header) -> np.ndarray:
    """Return the table of checksums of the shard at ``path``. Raises DataError when it is damaged."""
    with _explained_reading(path), path.open("rb") as file:
        file.seek(header.table_offset)
        raw = file.read(header.table_entries * _TABLE.itemsize)
    if zlib.crc32(raw) != header.table_checksum:
        raise DataError(f"`{path}` is damaged: its table does not fit its checksum", hint=WRITE_AGAIN)
    return np.frombuffer(raw, _TABLE)


def _check_succession(paths: dict[int, Path], tables: dict[int, np.ndarray], checksum: int) -> None:
    """Raise DataError unless each shard begins with the checksum that the one before has ended with."""
    before = 0
    for number, table in tables.items():
        if table[0] != before:
            raise DataError(f"`{paths[number]}` does not continue the shard before it", hint=WRITE_AGAIN)
        before = table[-1]
    if before != checksum:
        raise DataError(f"`{paths[max(paths)]}` does not end its split", hint=WRITE_AGAIN)


def _map_file(path: Path) -> mmap.mmap:
    with _explained_reading(path), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _explained_reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        hint = remedy(error) or "check its permissions"
        raise DataError(f"cannot read `{path}`: {error.strerror}", hint=hint) from error


@contextmanager
def _explained_writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write token shards in `{folder}`: {error.strerror}",
            hint=f"{remedy(error) or 'check the folder'}, then {WRITE_AGAIN}",
        ) from error

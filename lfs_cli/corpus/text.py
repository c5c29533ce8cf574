"""From a file of any size to plain text in two parts: unpack, look for what is not text, cut between documents.

Everything streams: memory stays flat however large the file is. Bytes are kept as they are: line ends, a byte order
mark and invalid UTF-8 stay, because a byte-level tokenizer can learn from any of them; invalid UTF-8 is reported with
its first place, because it usually means another encoding.
"""

import bz2
import gzip
import io
import lzma
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from lfs_cli.errors import DataError

BLOCK_BYTES = 1 << 20
"""Bytes of text handled at a time."""

_XZ, _BZIP2 = b"\xfd7zXZ\x00", b"BZh"
XZ_MEMORY_BYTES = 1 << 28
"""Most memory for unpacking xz, four times what `xz -9` asks for; a file may ask for 4 GiB."""


class _Streams:
    """Reads the xz or bzip2 streams of a file, one behind the other, as `lzma.open` and `bz2.open` do, save for two.

    Memory is bounded, and damage near the start of a later stream is an error instead of the end of the text.

    Args:
        file: Packed text.
        magic: First bytes of a stream. What follows a stream and begins otherwise is left out, as by others.
        new: Makes what unpacks one stream.
    """

    def __init__(self, file: BinaryIO, magic: bytes, new: Callable[[], Any]) -> None:
        self._file = file
        self._magic = magic
        self._new = new
        self._stream = new()

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes of text, none at its end."""
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._next_start()
                if not packed:
                    return b""
                self._stream = self._new()
            elif self._stream.needs_input:
                packed = self._file.read(BLOCK_BYTES)
                if not packed:
                    raise EOFError("it ended before its end mark")
            block = self._stream.decompress(packed, size)
            if block:
                return block

    def _next_start(self) -> bytes:
        """Return packed bytes from the start of the next stream on, none when there is no other."""
        packed = self._stream.unused_data.lstrip(b"\0")  # xz may have zeros between two streams
        while len(packed) < len(self._magic):
            block = self._file.read(BLOCK_BYTES)
            if not block:
                break
            packed = (packed + block).lstrip(b"\0")
        return packed if self._magic.startswith(packed[: len(self._magic)]) else b""


def _open_xz(file: BinaryIO) -> _Streams:
    return _Streams(file, _XZ, partial(lzma.LZMADecompressor, memlimit=XZ_MEMORY_BYTES))


def _open_bzip2(file: BinaryIO) -> _Streams:
    return _Streams(file, _BZIP2, bz2.BZ2Decompressor)


_UNPACKERS: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    _XZ: ("xz", _open_xz),
    _BZIP2: ("bzip2", _open_bzip2),
}
_OTHER_FORMATS = (
    (0, b"PK\x03\x04", "a zip archive", "unpack it first: `unzip -p FILE > text.txt`"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first: `zstd -d FILE`"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first: `7z x FILE`"),
    (0, b"%PDF-", "a PDF", "take its text first: `pdftotext FILE text.txt`"),
    (0, b"\xff\xfe", "UTF-16 text", "convert it first: `iconv -f UTF-16 -t UTF-8 FILE > text.txt`"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it first: `iconv -f UTF-16 -t UTF-8 FILE > text.txt`"),
    (257, b"ustar", "a tar archive", "unpack it first: `tar -xf FILE`"),
)
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\r\f\b\x1b")
_CONTROL_SHARE = 0.05


class _Chunks(io.RawIOBase):
    """A file to read, made of chunks that somebody else brings."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def unpack(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Yield the text in ``chunks``, unpacking gzip, xz and bzip2, which are told by their first bytes.

    All of ``chunks`` is read, also what follows the end of the packed text.

    Args:
        chunks: Bytes of a file, in order.
        name: What an error calls it.

    Raises:
        DataError: When a packed file is damaged or ends too early.
    """
    chunks, head = iter(chunks), b""
    while len(head) < 8 and (chunk := next(chunks, None)) is not None:
        head += chunk
    file = io.BufferedReader(_Chunks(chain([head], chunks)), buffer_size=BLOCK_BYTES)
    packer, opener = next((found for magic, found in _UNPACKERS.items() if head.startswith(magic)), ("", None))
    if opener is None:
        while block := file.read(BLOCK_BYTES):
            yield block
        return
    text = cast(BinaryIO, opener(file))
    while True:
        try:
            block = text.read(BLOCK_BYTES)
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise _damaged(name, packer, error) from None
        except OSError as error:
            if error.errno is not None:  # a disk or a network has failed, not the packed data
                raise
            raise _damaged(name, packer, error) from None
        if not block:
            break
        yield block
    while file.read(BLOCK_BYTES):
        pass


class Inspector:
    """Looks at a text as it streams by.

    Args:
        name: What messages call it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = 0
        self.first_invalid: int | None = None
        """Place of the first byte that is not UTF-8, counted from 0."""
        self._carry = b""

    def look(self, block: bytes) -> None:
        """Take in the next block. Raises DataError when the first one does not hold text."""
        if self.bytes == 0:
            self._refuse_other_formats(block)
        if self.first_invalid is None:
            self._decode(self._carry + block, at=self.bytes - len(self._carry))
        self.bytes += len(block)

    def finish(self) -> None:
        """The text is complete. Raises DataError when there is none."""
        if self.bytes == 0:
            raise DataError(f"`{self.name}` is empty", hint="give a file that holds text")
        if self._carry and self.first_invalid is None:
            self.first_invalid = self.bytes - len(self._carry)

    def _decode(self, data: bytes, at: int) -> None:
        self._carry = b""
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.end == len(data):
                self._carry = data[error.start :]
            else:
                self.first_invalid = at + error.start

    def _refuse_other_formats(self, block: bytes) -> None:
        for place, magic, what, hint in _OTHER_FORMATS:
            if block[place : place + len(magic)] == magic:
                raise DataError(f"`{self.name}` is {what}", hint=hint.replace("FILE", self.name))
        start = block[: 1 << 16]
        controls = len(start) - len(start.translate(None, _CONTROLS))
        if b"\0" in start or controls > _CONTROL_SHARE * len(start):
            raise DataError(
                f"`{self.name}` is a binary file, not text",
                hint="give plain text in UTF-8, or such text packed with gzip, xz or bzip2",
            )


def find_cut(path: Path, valid_share: float, separator: str) -> int:
    """Return where to cut a text so that about its last ``valid_share`` is held out and no document is torn.

    The cut follows the ``separator`` that is nearest to the share asked for; where none is near, an empty line, then
    any line end, then any character. Near means that the share held out is neither halved nor doubled.

    Args:
        path: The text.
        valid_share: Share of its bytes to hold out, more than 0 and less than 1.
        separator: What stands between documents, such as ``<|endoftext|>``.

    Returns:
        The number of bytes before the cut: at least 1, and less than the size of the text.

    Raises:
        DataError: When the text is too short to be cut.
    """
    size = path.stat().st_size
    if size < 2:
        raise DataError(f"{size} byte of text cannot be cut in two", hint="give a longer text")
    target = min(max(round(size * (1 - valid_share)), 1), size - 1)
    lowest = max(1, size - 2 * (size - target))
    highest = min(size - 1, size - (size - target) // 2)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for marks in ((separator.encode(),), (b"\n\n", b"\r\n\r\n"), (b"\n",)):
            cuts = [cut for mark in marks for cut in _cuts_near(text, mark, target, lowest, highest)]
            if cuts:
                return min(cuts, key=lambda cut: abs(cut - target))
        starts = [cut for cut in range(target - 3, target + 4) if 0 < cut < size and not 0x80 <= text[cut] < 0xC0]
        return min(starts, key=lambda cut: abs(cut - target), default=target)  # none is near in text that is not UTF-8


def _cuts_near(text: mmap.mmap, mark: bytes, target: int, lowest: int, highest: int) -> Iterator[int]:
    """Yield the last cut after ``mark`` before ``target`` and the first one behind it, within the limits."""
    before = text.rfind(mark, max(lowest - len(mark), 0), target)
    behind = text.find(mark, max(target - len(mark), 0), min(highest + len(mark), len(text)))
    for found in (before, behind):
        if found >= 0:
            cut = found + len(mark)
            while cut < len(text) and text[cut] in b"\r\n":  # the line end belongs to the document it closes
                cut += 1
            if lowest <= cut <= highest:
                yield cut


def _damaged(name: str, packer: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if reason == "Memory usage limit exceeded":
        return DataError(
            f"`{name}` asks for more than {XZ_MEMORY_BYTES:,} bytes of memory to be unpacked",
            hint=f"unpack it yourself if you trust it: `xz -dk {name}`",
        )
    return DataError(
        f"`{name}` is a damaged {packer} file: {reason[:1].lower()}{reason[1:]}",
        hint="fetch it again, or unpack it as far as possible and give the text",
    )

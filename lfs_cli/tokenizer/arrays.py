"""Desks for the compiled loops: the arrays that they work on, which grow here when a loop says that one is full.

What lies where on a desk is told in `desk.py`.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer import machine_code
from lfs_cli.tokenizer.blocks import to_utf8
from lfs_cli.tokenizer.desk import address, aligned_zeros
from lfs_cli.tokenizer.unicode_classes import CODE_POINTS, class_runs

SHORT_BITS, MIDDLE_BITS, LONG_BITS = (17, 20), (14, 18), (12, 16)
"""Slots of the three tables of words, as powers of two: at first and at most (32, 16 and 2 MB)."""

ARENA_BYTES = 1 << 18, 1 << 23
"""Bytes of long words, at first and at most."""

TABLES = (
    (d.SHORT, d.SHORT_BITS, d.SHORT_COUNT),
    (d.MIDDLE, d.MIDDLE_BITS, d.MIDDLE_COUNT),
    (d.LONG, d.LONG_BITS, d.LONG_COUNT),
)
"""The three tables of words: where the address, the slots and the number of words of each are on a desk."""

WIDTHS = (32, 64, 32)
"""Bytes of a slot of each."""


@cache
def classes() -> np.ndarray:
    """Return the class of every code point (`unicode_classes`): (0x110000,), uint8."""
    starts, kinds = class_runs()
    return np.repeat(np.array(kinds, np.uint8), np.diff([*starts, CODE_POINTS]))


@cache
def _keep_masks() -> np.ndarray:
    """Return 32 bytes for each length up to 31, of which so many are 255 and the others 0."""
    return np.where(np.arange(32) < np.arange(32)[:, None], 255, 0).astype(np.uint8)


def text_at(text: str | bytes | bytearray) -> tuple[int, int, Any]:
    """Return the address and the bytes of a text as UTF-8, and what must be kept for the address to hold.

    Python keeps a `str` of ASCII as it is in UTF-8. For another one it makes the bytes once and keeps them with it.
    """
    if isinstance(text, str):
        size = ctypes.c_ssize_t()
        try:
            at = _utf8_of(text, ctypes.byref(size))
        except UnicodeEncodeError:
            text = to_utf8(text)
        else:
            return at or 0, size.value, text
    view = np.frombuffer(text, np.uint8)
    return address(view), len(view), view


_utf8_of = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_utf8_of.argtypes = [ctypes.py_object, ctypes.c_void_p]
_utf8_of.restype = ctypes.c_void_p


def memory(at: int, size: int) -> memoryview:
    """Return the bytes at an address, without copying them."""
    return memoryview((ctypes.c_char * size).from_address(at)).cast("B")


def find_pairs(data: bytes | bytearray | memoryview, stop: int, pair: bytes) -> Iterator[int]:
    """Yield where two bytes stand in ``data[:stop]``: `bytes.find`, some ten times as fast."""
    view = np.frombuffer(data, np.uint8)
    for _, offset in find_in_rows(np.array([[address(view), stop]], np.int64), pair):
        yield offset


def find_in_rows(rows: np.ndarray, pair: bytes) -> Iterator[tuple[int, int]]:
    """Yield the number of the text and the offset of all places where two bytes stand in texts."""
    desk, loop, found = Arrays(), machine_code.load("find_pairs"), np.empty((1024, 2), np.int64)
    desk.fields[[d.TEXTS, d.TEXT_COUNT, d.TEXT, d.AT]] = address(rows), len(rows), 0, 0
    desk.fields[[d.PAIR_SOUGHT, d.FOUND_ROOM]] = pair[0] | pair[1] << 8, len(found)
    desk.put(d.PLACES_FOUND, found)
    while desk.fields[d.TEXT] < len(rows):
        count = loop(desk.address)
        yield from found[:count].tolist()


class Arrays:
    """A desk, and the arrays whose addresses are on it."""

    def __init__(self) -> None:
        self.fields = d.new_desk()
        self.address = address(self.fields)
        self._arrays: dict[int, np.ndarray] = {}

    def put(self, place: int, array: np.ndarray) -> np.ndarray:
        """Put the address of ``array`` into a field, and keep the array."""
        self._arrays[place] = array
        self.fields[place] = address(array)
        return array

    def array(self, place: int) -> np.ndarray:
        """Return the array whose address is in a field."""
        return self._arrays[place]


class Desk(Arrays):
    """What one thread works on: a desk with tables of words.

    Args:
        scanner: The loop that finds words.
        bits: Slots of the three tables at first.
    """

    def __init__(self, scanner: str, bits: Sequence[int]) -> None:
        super().__init__()
        self._scanner = scanner
        self.put(d.CLASSES, classes())
        self.put(d.KEEP, _keep_masks())
        self.put(d.POSITIONS, np.zeros(d.STARTS_SIZE, np.int32))
        self.put(d.KEYS, np.zeros(3 * d.STARTS_SIZE, np.uint64))
        self.put(d.TAIL, np.zeros(d.STRETCH + 3 * d.BLOCK + d.PAD, np.uint8))
        self.fields[d.SCANNER] = machine_code.load(scanner).address
        self._first_bits = tuple(bits)
        self.clear()

    def clear(self) -> None:
        """Forget all words."""
        for kind, bits in enumerate(self._first_bits):
            self._set_table(kind, bits, aligned_zeros(WIDTHS[kind] << bits))
            self.fields[TABLES[kind][2]] = 0
        self.put(d.ARENA, np.zeros(ARENA_BYTES[0], np.uint8))
        self.fields[[d.ARENA_USED, d.ARENA_SIZE]] = 0, ARENA_BYTES[0]
        self.fields[d.FULL] = 0

    def _set_table(self, kind: int, bits: int, table: np.ndarray) -> None:
        place, place_of_bits, _ = TABLES[kind]
        self.put(place, table)
        self.fields[place_of_bits] = bits

    def grow_tables(self, most_bits: Sequence[int], longest: int) -> bool:
        """Make room in what is full. Returns False when something is as large as it may be.

        Args:
            most_bits: Slots that the three tables may have.
            longest: Bytes of a word that the arena must have room for.
        """
        for kind, (_, bits_at, count_at) in enumerate(TABLES):
            bits = int(self.fields[bits_at])
            if 5 * self.fields[count_at] > 3 << bits:
                if bits >= most_bits[kind]:
                    return False
                self._move(kind, bits, min(most_bits[kind], bits + (2 if bits < 16 else 1)))
        needed = int(self.fields[d.ARENA_USED]) + longest + 16
        if needed > self.fields[d.ARENA_SIZE]:
            arena = self.array(d.ARENA)
            self.put(d.ARENA, grown(arena, needed))
            self.fields[d.ARENA_SIZE] = len(self.array(d.ARENA))
        self.fields[d.FULL] = 0
        return True

    def _move(self, kind: int, bits: int, more_bits: int) -> None:
        table = aligned_zeros(WIDTHS[kind] << more_bits)
        move = d.new_desk()
        move[d.MOVE_KIND], move[d.MOVE_FROM], move[d.MOVE_FROM_BITS] = kind, self.fields[TABLES[kind][0]], bits
        move[d.MOVE_TO], move[d.MOVE_TO_BITS] = address(table), more_bits
        machine_code.load("move_words")(address(move))
        self._set_table(kind, more_bits, table)


def grown(array: np.ndarray, needed: int) -> np.ndarray:
    """Return ``array`` with room for ``needed`` rows or twice as many as it has; what is new is not set."""
    larger = np.empty((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger

"""Finding a word by its bytes, as compiled loops: the three tables of `desk.py`, which counting and encoding share.

Words come in stretches: `look_up` notes for each word of a stretch its first bytes and its slot, and asks for the
memory there; by the time that the caller compares the two, it has come. Importing this file imports numba.
"""

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer.loops_scan import WIDE
from lfs_cli.tokenizer.vectors import (
    ONE,
    call,
    copy_16,
    field,
    helper,
    masked_16,
    masked_32,
    number,
    prefetch,
    put,
    read_32,
    read_byte,
    read_int,
    read_word,
    word,
    write_32,
    write_64,
    write_byte,
)

NOTHING = word(0)
NO_KEY = word(0xFF) << word(56)
"""Second half of the key of a word that is not short; no slot has it, since a length is at most 31."""

_GOLDEN = word(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Knuth, "The Art of Computer Programming", volume 3, 6.4
_MIXER = word(0xD6E8FEB86659FD93)  # odd, with bits as even as chance: any such number does

KEY_SIZE = 24
"""Bytes that `look_up` notes for a word: its 16 bytes of key, then its slot."""


@helper
def hash_short(low: int, high: int) -> int:
    """Return the hash of a key of 16 bytes."""
    return (low ^ (high * _MIXER)) * _GOLDEN


@helper
def hash_middle(w: int, x: int, y: int, z: int) -> int:
    """Return the hash of a key of 32 bytes."""
    mixed = (w ^ (x * _MIXER)) * _GOLDEN
    mixed ^= mixed >> word(32)
    return (mixed ^ (y * _MIXER) ^ ((z * _GOLDEN) >> word(7))) * _GOLDEN


@helper
def hash_long(place: int, size: int) -> int:
    """Return the hash of 32 bytes or more; never 0, which marks a free slot."""
    mixed = word(size) * _MIXER
    for i in range(0, size - 7, 8):
        mixed = (mixed ^ read_word(place + i)) * _GOLDEN
        mixed ^= mixed >> word(29)
    mixed = (mixed ^ read_word(place + size - 8)) * _GOLDEN
    mixed = (mixed ^ (mixed >> word(32))) * _MIXER
    return mixed | ONE


@helper
def _is_same(place: int, other: int, size: int) -> bool:
    """Return whether 8 bytes or more are the same at two addresses."""
    for i in range(0, size - 7, 8):
        if read_word(place + i) != read_word(other + i):
            return False
    return read_word(place + size - 8) == read_word(other + size - 8)


@helper
def slot_of(mixed: int, table: int, bits: int, width: int) -> int:
    """Return the address of the slot that a hash points to."""
    return table + width * number(mixed >> word(64 - bits))


@helper
def find_short(low: int, high: int, slot: int, desk: int) -> int:
    """Return the slot of a short word, from ``slot`` on, or the free one where it belongs."""
    end = field(desk, d.SHORT) + (32 << field(desk, d.SHORT_BITS))
    while True:
        other = read_word(slot + 8)
        if other == NOTHING or (other == high and read_word(slot) == low):
            return slot
        slot += 32
        if slot == end:
            slot = field(desk, d.SHORT)


@helper
def find_middle(w: int, x: int, y: int, z: int, desk: int) -> int:
    """Return the slot of a word of 16 to 31 bytes, or the free one where it belongs."""
    slot = slot_of(hash_middle(w, x, y, z), field(desk, d.MIDDLE), field(desk, d.MIDDLE_BITS), 64)
    end = field(desk, d.MIDDLE) + (64 << field(desk, d.MIDDLE_BITS))
    while True:
        other = read_word(slot + 24)
        if other == NOTHING:
            return slot
        if other == z and read_word(slot) == w and read_word(slot + 8) == x and read_word(slot + 16) == y:
            return slot
        slot += 64
        if slot == end:
            slot = field(desk, d.MIDDLE)


@helper
def find_long(place: int, size: int, mixed: int, desk: int) -> int:
    """Return the slot of a long word, or the free one where it belongs."""
    slot = slot_of(mixed, field(desk, d.LONG), field(desk, d.LONG_BITS), 32)
    end = field(desk, d.LONG) + (32 << field(desk, d.LONG_BITS))
    arena = field(desk, d.ARENA)
    while True:
        other = read_word(slot)
        if other == NOTHING:
            return slot
        where = read_int(slot + 8)
        if other == mixed and where & 0xFFFFFFFF == size and _is_same(place, arena + (where >> 32), size):
            return slot
        slot += 32
        if slot == end:
            slot = field(desk, d.LONG)


@helper
def has_arena(size: int, desk: int) -> bool:
    """Return whether the arena can take a word of ``size`` bytes; if not, the desk is full."""
    if field(desk, d.ARENA_USED) + size + 16 > field(desk, d.ARENA_SIZE):
        put(desk, d.FULL, 1)
        return False
    return True


@helper
def enter_short(slot: int, low: int, high: int, desk: int) -> None:
    """Give a free slot to a short word."""
    write_64(slot, low)
    write_64(slot + 8, high)
    _counted(desk, d.SHORT_COUNT, d.SHORT_BITS)


@helper
def enter_middle(slot: int, w: int, x: int, y: int, z: int, desk: int) -> None:
    """Give a free slot to a word of 16 to 31 bytes."""
    write_64(slot, w)
    write_64(slot + 8, x)
    write_64(slot + 16, y)
    write_64(slot + 24, z)
    _counted(desk, d.MIDDLE_COUNT, d.MIDDLE_BITS)


@helper
def enter_long(slot: int, place: int, size: int, mixed: int, desk: int) -> None:
    """Give a free slot to a long word, whose bytes go to the arena."""
    used = field(desk, d.ARENA_USED)
    copy_bytes(field(desk, d.ARENA) + used, place, size)
    put(desk, d.ARENA_USED, used + size)
    write_64(slot, mixed)
    write_64(slot + 8, used << 32 | size)
    _counted(desk, d.LONG_COUNT, d.LONG_BITS)


@helper
def _counted(desk: int, count: int, bits: int) -> None:
    """Count an entry of a table; one that is filled to three fifths is full.

    Frequent words come early and have their first slot, so a table may be fuller than one whose entries come by chance.
    """
    entries = field(desk, count) + 1
    put(desk, count, entries)
    if 5 * entries > 3 << field(desk, bits):
        put(desk, d.FULL, 1)


@helper
def copy_bytes(target: int, source: int, size: int) -> None:
    """Copy bytes, reading none beyond them."""
    i = number(0)
    while i + 16 <= size:
        copy_16(target + i, source + i)
        i += 16
    while i < size:
        write_byte(target + i, read_byte(source + i))
        i += 1


@helper
def begin_text(desk: int, size: int) -> None:
    """Make the scanner ready for a text of ``size`` bytes."""
    for place in range(d.SCAN_STATE, WIDE):
        put(desk, place, 0)
    put(desk, d.SIZE, size)


@helper
def scan_stretch(text: int, size: int, at: int, held: int, starts: int, desk: int) -> int:
    """Scan the stretch of a text from ``at`` on. Returns how many starts are listed.

    The last part of a text is copied to a place where bytes after it can be read. VIEW is where offsets into the text
    lead to the bytes from 64 before ``at`` on, which a word of less than 32 bytes that ends after ``at`` cannot reach.

    Args:
        text: Address of the text.
        size: Its bytes.
        at: Offset of the stretch.
        held: 1 when the list has the start of a word that goes on in this stretch, else 0.
        starts: Address of the list. After the last word of the text it gets the end of the text.
        desk: Where the rest is.
    """
    view = text
    if at + d.STRETCH + d.BLOCK > size:
        first = max(number(0), at - d.BLOCK)
        tail = field(desk, d.TAIL)
        copy_bytes(tail, text + first, size - first)
        for i in range(0, d.PAD, 8):
            write_64(tail + size - first + i, 0)
        view = tail - first
    put(desk, d.VIEW, view)
    put(desk, d.AT, at)
    put(desk, d.STARTS, starts + 4 * held)
    count = held + call(field(desk, d.SCANNER), desk)
    if at + d.STRETCH >= size:
        write_32(starts + 4 * count, size)
        count += 1
    return count


@helper
def look_up(starts: int, words: int, desk: int) -> None:
    """Note the key and the slot of each word of a stretch, and ask for the memory of the slots."""
    view, keep, key = field(desk, d.VIEW), field(desk, d.KEEP), field(desk, d.KEYS)
    short, short_shift = field(desk, d.SHORT), word(64 - field(desk, d.SHORT_BITS))
    middle, middle_bits = field(desk, d.MIDDLE), field(desk, d.MIDDLE_BITS)
    start = read_32(starts)
    for i in range(words):
        end = read_32(starts + 4 * i + 4)
        size = end - start
        place = view + start
        if size < 16:
            low, high = masked_16(place, keep + 32 * size)
            high |= word(size) << word(56)
            slot = short + (number(hash_short(low, high) >> short_shift) << 5)
            prefetch(slot)
            write_64(key, low)
            write_64(key + 8, high)
            write_64(key + 16, slot)
        else:
            if size < 32:
                w, x, y, z = masked_32(place, keep + 32 * size)
                prefetch(slot_of(hash_middle(w, x, y, z | word(size) << word(56)), middle, middle_bits, 64))
            write_64(key + 8, NO_KEY)
            write_64(key + 16, keep)  # 16 zeros, which no key is equal to
        key += KEY_SIZE
        start = end

"""What lies where: the memory that Python and the compiled loops share.

A loop takes one argument, the address of a desk: int64 fields, which are numbers or addresses of arrays. The fields
below are their places on it. Python makes all arrays (`arrays.py`); a loop stops and returns when one is full, is
called again when it has grown, and goes on where it was. Importing this file imports no numba.

    scan       SCANNER CLASSES VIEW SIZE AT STARTS, and SCAN_STATE for what it knows of the blocks before
    encode     TEXTS TEXT_COUNT TEXT, IDS WRITTEN ENDS ID_SHIFT, the words of `WORD TABLES`, the merges, scratch
    count      TEXTS TEXT_COUNT TEXT, the words
    merge      see `loops_learn`

WORD TABLES. A word is found by its bytes. Slots lie in tables of 2^bits, a word's first place comes from its hash, and
if that is taken the next free one is used. A length byte of 0, or a hash of 0, marks a free slot.

    short    up to 15 bytes in slots of 32      bytes of the word, 0s, its length (1)  |  value (16)
    middle   16 to 31 bytes in slots of 64      bytes of the word, 0s, its length (1)  |  value (32)
    long     32 and more, in slots of 32        hash (8), place in the arena << 32 | length (8)  |  value (16)

The value of a word is, for counting, its count (8 bytes). For encoding it is its ids, each of 2 bytes or of 4, and in
the last 2 bytes how many there are; 0 says that they lie in the pool, and then the value is their place there (4) and
their count (4). So the most frequent case is one comparison of 16 bytes, one copy of 16 bytes whatever the count, and a
step of that count. For it to be frequent, a short word that is met in a later slot changes places with the one in its
first slot, which can still be found there.
"""

import numpy as np

STRETCH = 1024
"""Bytes that are scanned at a time, 16 blocks of 64: their words are looked up together, so memory can be asked for."""

FILTER_BYTES = 1 << 17
"""Size of the filter of merges (`loops_encode`)."""

BLOCK = 64
PAD = 128
"""Bytes that may be read, though not used, after the end of what is scanned."""

(
    SCANNER, CLASSES, KEEP, STARTS, POSITIONS, KEYS, TAIL, VIEW, SIZE, AT,
    TEXTS, TEXT_COUNT, TEXT, IDS, WRITTEN, ENDS, ID_SHIFT,
    SHORT, SHORT_BITS, SHORT_COUNT, MIDDLE, MIDDLE_BITS, MIDDLE_COUNT, LONG, LONG_BITS, LONG_COUNT,
    ARENA, ARENA_USED, ARENA_SIZE, POOL, POOL_USED, POOL_SIZE, FULL,
    BYTE_IDS, BYTE_PAIRS, MERGED_IDS, TOKEN_SIZES, PAIRS, PAIR_BITS, PAIR_FILTER, PAIR_LIST, PAIR_COUNT,
    TOKENS, RANKS, SCRATCH, SCRATCH_SIZE, SCRATCH_NEEDED,
    MOVE_KIND, MOVE_FROM, MOVE_FROM_BITS, MOVE_TO, MOVE_TO_BITS,
    OTHER, OTHER_SLOT, LEAST_COUNT, WORD_LETTERS, WORD_ENDS, WORD_COUNTS,
    PAIR_SOUGHT, PLACES_FOUND, FOUND_ROOM,
) = range(61)  # fmt: skip
"""Fields of the desk at which words are scanned, counted and encoded."""

(
    WORD_COUNT, TOKENS_OF_WORDS, WORDS_OF_PLACES, WEIGHTS,
    UNTIL, MERGES, NEEDED, TIES, ORDER, MADE, LETTERS, LETTERS_SIZE, TOKEN_ENDS, PREFIXES,
    ROWS, PAIR_ROWS, PAIR_ROWS_SIZE, PAIR_SLOTS, PAIR_SLOTS_BITS, HEAP, HEAP_COUNT, HEAP_SIZE,
    PLACES, PLACES_USED, PLACES_SIZE, FOUND, FOUND_SIZE,
    LEFT_NEW, RIGHT_NEW, LEFT_LOSSES, RIGHT_LOSSES, LEFT_SEEN, RIGHT_SEEN,
) = range(33)  # fmt: skip
"""Fields of the desk at which merges are learned, besides WORD_LETTERS, WORD_ENDS and WORD_COUNTS."""

SCAN_STATE, DESK_FIELDS = 64, 64 + 48
"""Where the fields begin that the scanner keeps for itself, and how many fields there are in all."""

STARTS_SIZE = STRETCH + BLOCK + 96
"""Room for the starts of the words of a stretch, with what `_list_bits` writes too much."""


def new_desk(fields: int = DESK_FIELDS) -> np.ndarray:
    """Return an empty desk."""
    return np.zeros(fields, np.int64)


def address(array: np.ndarray) -> int:
    """Return where ``array`` begins; the caller keeps the array alive."""
    return array.__array_interface__["data"][0]


def aligned_zeros(size: int) -> np.ndarray:
    """Return ``size`` zeroed bytes that begin on a page: of 2 MiB, which the system may hold as one, if so many."""
    page = 1 << 21 if size >= 1 << 21 else 64
    raw = np.zeros(size + page, np.uint8)
    offset = -address(raw) % page
    return raw[offset : offset + size]

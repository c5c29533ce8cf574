"""The loops that numba compiles: scanning, counting, merging, encoding. Importing this file imports numba.

Each must equal plain Python that stands elsewhere and says what it means; tests compare the two.

    word_end       GPT-2's pattern, as a scanner over UTF-8 bytes       split.PATTERNS["gpt2"]
    count_words    occurrences of each word, in a hash table             learn.count_words
    add_words      the sum of two such tables
    make_merges    learning                                              learn.learn_reference
    encode_words   encoding, with a table of words met before            bpe.merge_word

`fast.py` owns all arrays. A loop never makes one: it stops and returns when something is full, and goes on when it is
called again. So it lets go of the interpreter lock, the caller can show progress, and compiling stays short.

A token is kept where it lies. Over the bytes of its words there is an array `tokens` that holds, for a token of the id
t at the bytes i to i + n, t at its first and t at its last place. The token after it begins at i + n, the one before
it ends at i - 1, so there are no links to keep. When two tokens become one, the place where the second began is
cleared, so that nothing takes it for the start of a token; other places inside a token are never looked at as one.

The compiled code is kept in `__pycache__`, or where `NUMBA_CACHE_DIR` says, or in the user's cache folder.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lfs_cli.tokenizer.unicode_classes import OTHER, SPACE

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Words = NDArray[np.uint64]
Int = int | np.integer[Any]
F = TypeVar("F", bound=Callable[..., Any])

HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Knuth, "The Art of Computer Programming", volume 3, 6.4
NO_TOKEN, BETWEEN_WORDS = -2, -1

COUNT, LEFT, RIGHT, FIRST, SIZE = range(5)
"""Columns of `pairs`: occurrences, ids, and where in `places` its occurrences are listed."""

MERGES, PAIRS, HEAP, PLACES, LETTERS, NEEDED = range(6)
"""Fields of the state of `make_merges`: how much of each array is in use; occurrences of the pair that did not fit."""

CACHED_IDS = 7
CACHED_BYTES = 15
"""Longest word, and most ids of one, that the table of `encode_words` holds."""

_compiled: dict[str, Any] = {}
_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}
_helper: Callable[[F], F] = njit(**_OPTIONS)
"""Compiles a function into those that call it.

`_nrt=False` leaves out the counting of references to arrays, which nothing here needs and which made each call several
times as slow. A function that makes an array is then refused.
"""


def _loop(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, when it is first called, and keep the machine code for later processes."""
    try:
        compiled = njit(cache=True, **_OPTIONS)(function)
    except (RuntimeError, OSError):  # no folder can be written: compile in every process
        compiled = _helper(function)
    _compiled[function.__name__] = compiled

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except OSError:  # a full disk: it is compiled and was not yet called, but cannot be kept
            return compiled(*arguments)

    return call


@_helper
def _character(text: Bytes, i: Int, stop: Int, classes: Bytes) -> tuple[Int, Int]:
    """Return the class and the bytes of the character at ``i``; a byte that is not UTF-8 is one of its own."""
    first = np.int64(text[i])
    if first < 0x80:
        return np.int64(classes[first]), 1
    if 0xC2 <= first < 0xE0:
        size, code, least = 2, first & 0x1F, 0x80
    elif 0xE0 <= first < 0xF0:
        size, code, least = 3, first & 0x0F, 0x800
    elif 0xF0 <= first < 0xF5:
        size, code, least = 4, first & 0x07, 0x10000
    else:
        return OTHER, 1
    if i + size > stop:
        return OTHER, 1
    for k in range(i + 1, i + size):
        following = np.int64(text[k])
        if following & 0xC0 != 0x80:
            return OTHER, 1
        code = code << 6 | (following & 0x3F)
    if code < least or code > 0x10FFFF:
        return OTHER, 1
    return np.int64(classes[code]), size  # a surrogate, three bytes here and three characters in Python, is OTHER


@_helper
def _contraction(text: Bytes, i: Int, stop: Int) -> Int:
    """Return the bytes of the contraction that begins with the apostrophe at ``i``, 0 when there is none."""
    if i + 1 < stop:
        a = text[i + 1]
        if a == ord("s") or a == ord("d") or a == ord("m") or a == ord("t"):
            return 2
        if i + 2 < stop:
            b = text[i + 2]
            if (a == ord("l") and b == ord("l")) or (b == ord("e") and (a == ord("v") or a == ord("r"))):
                return 3
    return 0


@_helper
def word_end(text: Bytes, start: Int, stop: Int, classes: Bytes) -> Int:
    """Return where the word of GPT-2's pattern that begins at ``start`` ends, if the text ends at ``stop``."""
    first = text[start]
    if first == ord("'"):
        size = _contraction(text, start, stop)
        if size > 0:
            return start + size
    kind, size = _character(text, start, stop, classes)
    end = start + size
    if kind == SPACE:
        if end == stop:
            return end
        kind, size = _character(text, end, stop, classes)
        if kind == SPACE:
            return _space_end(text, end, stop, classes)
        if first != ord(" "):
            return end
        end += size
    while end < stop:
        next_kind, size = _character(text, end, stop, classes)
        if next_kind != kind:
            break
        end += size
    return end


@_helper
def _space_end(text: Bytes, end: Int, stop: Int, classes: Bytes) -> Int:
    """Return the end of white space that goes on at ``end``: without its last character if something follows."""
    last = end
    while end < stop:
        kind, size = _character(text, end, stop, classes)
        if kind != SPACE:
            return last
        last = end
        end += size
    return end


@_loop
def find_words(text: Bytes, start: Int, stop: Int, classes: Bytes, ends: Longs) -> Int:
    """Write the end of each word of ``text[start:stop]`` to ``ends`` and return how many there are."""
    count = 0
    while start < stop:
        start = word_end(text, start, stop, classes)
        ends[count] = start
        count += 1
    return count


@_helper
def _hash(text: Bytes, start: Int, stop: Int) -> np.uint64:
    key = np.uint64(stop - start)
    for i in range(start, stop):
        key = (key ^ np.uint64(text[i])) * HASH
        key ^= key >> np.uint64(29)
    return key


@_helper
def _add_word(
    text: Bytes,
    start: Int,
    stop: Int,
    key: Int,
    amount: Int,
    slots: Longs,
    hashes: Words,
    ends: Longs,
    counts: Longs,
    letters: Bytes,
) -> Int:
    """Add ``amount`` to the count of a word. Returns 1 when it is new, else 0.

    The table: `slots` holds the number of a word, from 1 on, at the first free place from its hash on. Word number n
    has the bytes ``letters[ends[n - 1] : ends[n]]``, the hash ``hashes[n]`` and the count ``counts[n]``; ``counts[0]``
    is how many words there are.
    """
    mask = np.int64(len(slots) - 1)
    slot = np.int64(key >> np.uint64(20)) & mask
    size = stop - start
    while slots[slot] != 0:
        word = slots[slot]
        if hashes[word] == key and ends[word] - ends[word - 1] == size:
            at = ends[word - 1]
            i = 0
            while i < size and letters[at + i] == text[start + i]:
                i += 1
            if i == size:
                counts[word] += amount
                return 0
        slot = (slot + 1) & mask
    word = counts[0] + 1
    counts[0] = word
    slots[slot] = word
    hashes[word] = key
    counts[word] = amount
    at = ends[word - 1]
    for i in range(size):
        letters[at + i] = text[start + i]
    ends[word] = at + size
    return 1


@_helper
def _is_full(size: Int, slots: Longs, hashes: Words, ends: Longs, counts: Longs, letters: Bytes) -> bool:
    """Return whether the table may lack room for another word of ``size`` bytes. Slots are filled to a half."""
    words = counts[0]
    return words + 2 > len(hashes) or 2 * words >= len(slots) or ends[words] + size > len(letters)


@_loop
def count_words(
    text: Bytes,
    start: Int,
    stop: Int,
    classes: Bytes,
    slots: Longs,
    hashes: Words,
    ends: Longs,
    counts: Longs,
    letters: Bytes,
) -> Int:
    """Count the words of ``text[start:stop]``. Returns where it stopped: before ``stop`` when the table is full."""
    while start < stop:
        end = word_end(text, start, stop, classes)
        if _is_full(end - start, slots, hashes, ends, counts, letters):
            break
        _add_word(text, start, end, _hash(text, start, end), 1, slots, hashes, ends, counts, letters)
        start = end
    return start


@_loop
def fill_word_slots(slots: Longs, hashes: Words, count: Int) -> None:
    """Enter the first ``count`` words into empty ``slots``."""
    mask = np.int64(len(slots) - 1)
    for word in range(1, count + 1):
        slot = np.int64(hashes[word] >> np.uint64(20)) & mask
        while slots[slot] != 0:
            slot = (slot + 1) & mask
        slots[slot] = word


@_loop
def add_words(
    word: Int,
    other_hashes: Words,
    other_ends: Longs,
    other_counts: Longs,
    other_letters: Bytes,
    slots: Longs,
    hashes: Words,
    ends: Longs,
    counts: Longs,
    letters: Bytes,
) -> Int:
    """Add another table's words from number ``word`` on. Returns the first that found no room, or one past the last."""
    while word <= other_counts[0]:
        start, end = other_ends[word - 1], other_ends[word]
        if _is_full(end - start, slots, hashes, ends, counts, letters):
            break
        _add_word(
            other_letters, start, end, other_hashes[word], other_counts[word], slots, hashes, ends, counts, letters
        )
        word += 1
    return word


@_helper
def _compare(a: Int, b: Int, ends: Longs, letters: Bytes) -> Int:
    """Return a number above, below or equal to 0 as the bytes of token ``a`` are greater, less or equal."""
    if a == b:
        return 0
    i, j = ends[a], ends[b]
    while i < ends[a + 1] and j < ends[b + 1]:
        if letters[i] != letters[j]:
            return np.int64(letters[i]) - np.int64(letters[j])
        i += 1
        j += 1
    return (ends[a + 1] - i) - (ends[b + 1] - j)


@_helper
def _is_before(count: Int, pair: Int, other_count: Int, other: Int, pairs: Longs, ends: Longs, letters: Bytes) -> Any:
    """Return whether ``pair`` is merged before ``other``: the more frequent one, then the greater one."""
    if count != other_count:
        return count > other_count
    order = _compare(pairs[pair, LEFT], pairs[other, LEFT], ends, letters)
    if order == 0:
        order = _compare(pairs[pair, RIGHT], pairs[other, RIGHT], ends, letters)
    return order > 0


@_helper
def _rise(heap: Longs, i: Int, count: Int, pair: Int, pairs: Longs, ends: Longs, letters: Bytes) -> None:
    """Put a pair into the heap at ``i`` or above. Rows of the heap are (count, pair), the best one first."""
    while i > 0:
        parent = (i - 1) >> 1
        if not _is_before(count, pair, heap[parent, 0], heap[parent, 1], pairs, ends, letters):
            break
        heap[i, 0], heap[i, 1] = heap[parent, 0], heap[parent, 1]
        i = parent
    heap[i, 0], heap[i, 1] = count, pair


@_helper
def _sink(heap: Longs, size: Int, count: Int, pair: Int, pairs: Longs, ends: Longs, letters: Bytes) -> None:
    """Put a pair into the heap of ``size`` rows in place of its top."""
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _is_before(
            heap[child + 1, 0], heap[child + 1, 1], heap[child, 0], heap[child, 1], pairs, ends, letters
        ):
            child += 1
        if _is_before(count, pair, heap[child, 0], heap[child, 1], pairs, ends, letters):
            break
        heap[i, 0], heap[i, 1] = heap[child, 0], heap[child, 1]
        i = child
    heap[i, 0], heap[i, 1] = count, pair


@_helper
def _pair_slot(left: Int, right: Int, slots: Longs, pairs: Longs) -> Int:
    """Return the slot that holds the number of a pair, from 1 on, or the free one where it belongs."""
    mask = np.int64(len(slots) - 1)
    key = (np.uint64(left) << np.uint64(32) | np.uint64(right)) * HASH
    slot = np.int64(key >> np.uint64(24)) & mask
    while slots[slot] != 0:
        pair = slots[slot] - 1
        if pairs[pair, LEFT] == left and pairs[pair, RIGHT] == right:
            break
        slot = (slot + 1) & mask
    return slot


@_loop
def fill_pair_slots(slots: Longs, pairs: Longs, count: Int) -> None:
    """Enter the first ``count`` pairs into empty ``slots``."""
    for pair in range(count):
        slots[_pair_slot(pairs[pair, LEFT], pairs[pair, RIGHT], slots, pairs)] = pair + 1


@_helper
def _change(left: Int, right: Int, amount: Int, slots: Longs, pairs: Longs, state: Longs) -> Int:
    """Add ``amount`` to the count of a pair, which may be new, and return its number."""
    slot = _pair_slot(left, right, slots, pairs)
    pair = slots[slot] - 1
    if pair < 0:
        pair = state[PAIRS]
        state[PAIRS] = pair + 1
        slots[slot] = pair + 1
        pairs[pair, COUNT], pairs[pair, LEFT], pairs[pair, RIGHT], pairs[pair, SIZE] = 0, left, right, 0
    pairs[pair, COUNT] += amount
    return pair


@_helper
def _note(found: Longs, count: Int, pair: Int, place: Int, pairs: Longs) -> Int:
    """Remember that a new pair occurs at ``place``. Returns how many such notes there are."""
    found[count, 0], found[count, 1] = pair, place
    pairs[pair, SIZE] += 1
    return count + 1


@_helper
def _merge_at(
    i: Int,
    j: Int,
    merged: Int,
    weight: Int,
    count: Int,
    tokens: Ints,
    ends: Longs,
    slots: Longs,
    pairs: Longs,
    found: Longs,
    state: Longs,
) -> Int:
    """Merge the tokens at ``i`` and ``j``, next to each other in a word that occurs ``weight`` times.

    With x before and y after them, the pairs (x, a) and (b, y) become (x, t) and (t, y).

    Returns:
        ``count``, plus the notes that were made in ``found``.
    """
    a, b = tokens[i], tokens[j]
    before = tokens[i - 1]
    if before >= 0:
        _change(before, a, -weight, slots, pairs, state)
        pair = _change(before, merged, weight, slots, pairs, state)
        count = _note(found, count, pair, i - (ends[before + 1] - ends[before]), pairs)
    last = j + ends[b + 1] - ends[b] - 1
    after = tokens[last + 1]
    if after >= 0:
        _change(b, after, -weight, slots, pairs, state)
        pair = _change(merged, after, weight, slots, pairs, state)
        count = _note(found, count, pair, i, pairs)
    tokens[j] = NO_TOKEN  # first, since a token of one byte begins and ends at the same place
    tokens[i] = merged
    tokens[last] = merged
    return count


@_helper
def _list_places(first: Int, found: Longs, count: Int, slots: Longs, pairs: Longs, places: Ints, state: Longs) -> None:
    """List in ``places``, pair by pair, where the pairs from number ``first`` on occur: a counting sort."""
    used = state[PLACES]
    for pair in range(first, state[PAIRS]):
        pairs[pair, FIRST] = used
        used += pairs[pair, SIZE]
        pairs[pair, SIZE] = 0
    for k in range(count):
        pair = found[k, 0]
        places[pairs[pair, FIRST] + pairs[pair, SIZE]] = found[k, 1]
        pairs[pair, SIZE] += 1
    state[PLACES] = used


@_helper
def _lacks_room(
    pair: Int,
    ends: Longs,
    letters: Bytes,
    pairs: Longs,
    slots: Longs,
    heap: Longs,
    places: Ints,
    found: Longs,
    state: Longs,
) -> bool:
    """Return whether merging ``pair`` may need more room; each of its occurrences makes up to two new pairs."""
    new = 2 * pairs[pair, SIZE]
    size = (
        ends[pairs[pair, LEFT] + 1] - ends[pairs[pair, LEFT]] + ends[pairs[pair, RIGHT] + 1] - ends[pairs[pair, RIGHT]]
    )
    return (
        state[PAIRS] + new > len(pairs)
        or 2 * (state[PAIRS] + new) > len(slots)
        or state[HEAP] + new > len(heap)
        or state[PLACES] + new > len(places)
        or new > len(found)
        or state[LETTERS] + size > len(letters)
    )


@_helper
def _spell(pair: Int, merged: Int, ends: Longs, letters: Bytes, pairs: Longs, state: Longs) -> None:
    """Write the bytes of a new token behind those of the others."""
    at = state[LETTERS]
    for token in (pairs[pair, LEFT], pairs[pair, RIGHT]):
        for i in range(ends[token], ends[token + 1]):
            letters[at] = letters[i]
            at += 1
    state[LETTERS] = at
    ends[merged + 1] = at


@_loop
def make_merges(
    wanted: Int,
    tokens: Ints,
    words: Ints,
    counts: Longs,
    ends: Longs,
    letters: Bytes,
    pairs: Longs,
    slots: Longs,
    heap: Longs,
    places: Ints,
    found: Longs,
    made: Ints,
    state: Longs,
) -> None:
    """Make merges until ``wanted`` are made, no pair is left, or an array has to grow (``state[NEEDED]`` is not 0).

    Args:
        wanted: Merges in all, those of earlier calls included.
        tokens: The words as tokens, each followed and the first preceded by `BETWEEN_WORDS`.
        words: At each place the number of its word.
        counts: Occurrences of each word.
        ends: Token t has the bytes ``letters[ends[t] : ends[t + 1]]``. Merge number n makes the token 256 + n.
        letters: The bytes of all tokens.
        pairs: (pairs, 5): see `COUNT` and the other columns. Rows stay when a pair is gone.
        slots: Hash table from two ids to a row of ``pairs``.
        heap: (entries, 2): count and pair. An entry whose count is out of date is put right when it comes up.
        places: Where each pair occurs; ascending for each pair. A place where it no longer does is met and skipped.
        found: Scratch for the occurrences of new pairs, as large as the largest step needs.
        made: (merges, 2): receives the ids of the two tokens of each merge.
        state: See `MERGES` and the other fields.
    """
    state[NEEDED] = 0
    while state[MERGES] < wanted and state[HEAP] > 0:
        count, best = heap[0, 0], heap[0, 1]
        if pairs[best, COUNT] != count and pairs[best, COUNT] > 0:
            _sink(heap, state[HEAP], pairs[best, COUNT], best, pairs, ends, letters)
            continue
        if _lacks_room(best, ends, letters, pairs, slots, heap, places, found, state):
            state[NEEDED] = 2 * pairs[best, SIZE]
            return
        state[HEAP] -= 1
        _sink(heap, state[HEAP], heap[state[HEAP], 0], heap[state[HEAP], 1], pairs, ends, letters)
        if pairs[best, COUNT] <= 0:
            continue
        merged = 256 + state[MERGES]
        made[state[MERGES], 0], made[state[MERGES], 1] = pairs[best, LEFT], pairs[best, RIGHT]
        _spell(best, merged, ends, letters, pairs, state)
        _merge_everywhere(best, merged, tokens, words, counts, ends, slots, pairs, places, found, state)
        for pair in range(state[NEEDED], state[PAIRS]):
            if pairs[pair, COUNT] > 0:
                _rise(heap, state[HEAP], pairs[pair, COUNT], pair, pairs, ends, letters)
                state[HEAP] += 1
        state[NEEDED] = 0
        state[MERGES] += 1


@_helper
def _merge_everywhere(
    best: Int,
    merged: Int,
    tokens: Ints,
    words: Ints,
    counts: Longs,
    ends: Longs,
    slots: Longs,
    pairs: Longs,
    places: Ints,
    found: Longs,
    state: Longs,
) -> None:
    """Merge the pair ``best`` wherever it occurs, and leave the number of the first new pair in ``state[NEEDED]``."""
    a, b = pairs[best, LEFT], pairs[best, RIGHT]
    size = ends[a + 1] - ends[a]
    first_new, notes = state[PAIRS], 0
    for k in range(pairs[best, FIRST], pairs[best, FIRST] + pairs[best, SIZE]):
        i = np.int64(places[k])
        if tokens[i] == a and tokens[i + size] == b:
            weight = counts[words[i]]
            notes = _merge_at(i, i + size, merged, weight, notes, tokens, ends, slots, pairs, found, state)
    pairs[best, COUNT] = 0
    _list_places(first_new, found, notes, slots, pairs, places, state)
    state[NEEDED] = first_new


@_helper
def _find_rank(left: Int, right: Int, rank_keys: Words, ranks: Ints) -> Int:
    """Return the place of a pair of ids in the list of merges, -1 when it is none."""
    mask = np.int64(len(rank_keys) - 1)
    key = np.uint64(left) << np.uint64(32) | np.uint64(right)
    slot = np.int64((key * HASH) >> np.uint64(24)) & mask
    key += np.uint64(1)  # 0 marks a free slot
    while rank_keys[slot] != key:
        if rank_keys[slot] == 0:
            return -1
        slot = (slot + 1) & mask
    return np.int64(ranks[slot])


@_loop
def fill_ranks(lefts: Longs, rights: Longs, places: Longs, rank_keys: Words, ranks: Ints) -> None:
    """Enter merges into an empty table of twice their number of slots or more."""
    mask = np.int64(len(rank_keys) - 1)
    for k in range(len(lefts)):
        key = np.uint64(lefts[k]) << np.uint64(32) | np.uint64(rights[k])
        slot = np.int64((key * HASH) >> np.uint64(24)) & mask
        while rank_keys[slot] != 0:
            slot = (slot + 1) & mask
        rank_keys[slot] = key + np.uint64(1)
        ranks[slot] = places[k]


@_helper
def _push(heap: Words, size: Int, entry: np.uint64) -> Int:
    i = size
    while i > 0 and heap[(i - 1) >> 1] > entry:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = entry
    return size + 1


@_helper
def _pop(heap: Words, size: Int) -> Int:
    """Remove the smallest entry, which is the first. Returns the entries that are left."""
    size -= 1
    entry = heap[size]
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= entry:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = entry
    return size


@_helper
def _offer(heap: Words, size: Int, left: Int, right: Int, place: Int, rank_keys: Words, ranks: Ints) -> Int:
    """Put the pair of ids at ``place`` into the heap if it is a merge: the lowest rank first, then the leftmost."""
    rank = _find_rank(left, right, rank_keys, ranks)
    if rank < 0:
        return size
    return _push(heap, size, np.uint64(rank) << np.uint64(32) | np.uint64(place))


@_helper
def _merge_word(
    text: Bytes,
    start: Int,
    size: Int,
    byte_ids: Ints,
    sizes: Ints,
    merged_ids: Ints,
    rank_keys: Words,
    ranks: Ints,
    tokens: Ints,
    heap: Words,
    ids: Ints,
    count: Int,
) -> Int:
    """Encode one word in O(n log n). Writes its ids to ``ids`` from ``count`` on and returns one past the last."""
    pairs = 0
    for i in range(size):
        tokens[i] = byte_ids[text[start + i]]
        if i > 0:
            pairs = _offer(heap, pairs, tokens[i - 1], tokens[i], i - 1, rank_keys, ranks)
    while pairs > 0:
        i, rank = np.int64(heap[0] & np.uint64(0xFFFFFFFF)), np.int64(heap[0] >> np.uint64(32))
        pairs = _pop(heap, pairs)
        if tokens[i] < 0:
            continue
        j = i + sizes[tokens[i]]
        if j >= size or tokens[j] < 0 or _find_rank(tokens[i], tokens[j], rank_keys, ranks) != rank:
            continue  # an earlier merge has taken one of the two
        last = j + sizes[tokens[j]] - 1
        merged = merged_ids[rank]
        tokens[j] = NO_TOKEN
        tokens[i] = merged
        tokens[last] = merged
        if i > 0:
            before = tokens[i - 1]
            pairs = _offer(heap, pairs, before, merged, i - sizes[before], rank_keys, ranks)
        if last + 1 < size:
            pairs = _offer(heap, pairs, merged, tokens[last + 1], i, rank_keys, ranks)
    i = 0
    while i < size:
        ids[count] = tokens[i]
        count += 1
        i += sizes[tokens[i]]
    return count


@_helper
def _key(text: Bytes, start: Int, end: Int) -> tuple[np.uint64, np.uint64]:
    """Return up to 15 bytes and their number as two words of 8 bytes, which are 0 for no word."""
    low, high = np.uint64(0), np.uint64(end - start) << np.uint64(56)
    shift = np.uint64(0)
    for i in range(start, min(end, start + 8)):
        low |= np.uint64(text[i]) << shift
        shift += np.uint64(8)
    shift = np.uint64(0)
    for i in range(start + 8, end):
        high |= np.uint64(text[i]) << shift
        shift += np.uint64(8)
    return low, high


@_loop
def encode_words(
    text: Bytes,
    start: Int,
    stop: Int,
    classes: Bytes,
    byte_ids: Ints,
    sizes: Ints,
    merged_ids: Ints,
    rank_keys: Words,
    ranks: Ints,
    cached_keys: Words,
    cached_ids: Ints,
    tokens: Ints,
    heap: Words,
    ids: Ints,
    state: Longs,
) -> Int:
    """Encode ``text[start:stop]`` word by word.

    Args:
        text: UTF-8 bytes.
        start: Where to begin: at the start of a word.
        stop: Where the text ends.
        classes: Class of every code point.
        byte_ids: (256,): id of each byte.
        sizes: Bytes of the token of each id.
        merged_ids: Id that each merge makes, by rank.
        rank_keys: Hash table from two ids to a rank, of a power of two slots.
        ranks: Its values.
        cached_keys: (slots, 2): words of up to 15 bytes. A word has one slot, and the last one that came there has it.
        cached_ids: (slots, 8): how many ids, then up to 7 ids.
        tokens: Scratch, one for each byte of the longest word.
        heap: Scratch, two for each of these.
        ids: Receives the ids from ``state[0]`` on; one for each byte of the text is enough.
        state: (2,): ids written so far; bytes of a word for which the scratch is too small.

    Returns:
        Where it stopped: before ``stop`` when the scratch has to grow.
    """
    count = state[0]
    mask = np.int64(len(cached_keys) - 1)
    slot, low, high = np.int64(0), np.uint64(0), np.uint64(0)
    while start < stop:
        end = word_end(text, start, stop, classes)
        size = end - start
        if size <= CACHED_BYTES:
            low, high = _key(text, start, end)
            slot = np.int64(((low ^ (high * HASH)) * HASH) >> np.uint64(40)) & mask
            if cached_keys[slot, 0] == low and cached_keys[slot, 1] == high:
                for k in range(cached_ids[slot, 0]):
                    ids[count] = cached_ids[slot, 1 + k]
                    count += 1
                start = end
                continue
        if size > len(tokens):
            state[1] = size
            break
        first = count
        count = _merge_word(text, start, size, byte_ids, sizes, merged_ids, rank_keys, ranks, tokens, heap, ids, count)
        if size <= CACHED_BYTES and count - first <= CACHED_IDS:
            cached_keys[slot, 0], cached_keys[slot, 1] = low, high
            cached_ids[slot, 0] = count - first
            for k in range(count - first):
                cached_ids[slot, 1 + k] = ids[first + k]
        start = end
    state[0] = count
    return start


LOOPS = {
    "counting": (count_words, fill_word_slots, add_words),
    "merging": (fill_pair_slots, make_merges),
    "encoding": (fill_ranks, encode_words),
}
"""Which loops a task needs."""


def folder() -> Path | None:
    """Return where compiled code is kept, None when it is kept nowhere."""
    path = _compiled["encode_words"].stats.cache_path
    return Path(path) if path else None


def is_compiled(task: str) -> bool:
    """Return whether the loops of a task were compiled by this or an earlier process, which kept them."""
    source, kept_in = Path(__file__).stat().st_mtime, folder()
    for loop in LOOPS[task]:
        kept = kept_in.glob(f"loops.{loop.__name__}-*.nbi") if kept_in is not None else []
        if not _compiled[loop.__name__].signatures and not any(index.stat().st_mtime >= source for index in kept):
            return False
    return True

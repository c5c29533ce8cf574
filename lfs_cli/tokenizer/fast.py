"""The arrays that the compiled loops work on, and the threads that run them.

Three tables, each the fast form of something plain: `WordCounts` of `learn.count_words`, `learn` of
`learn.learn_reference`, `Encoder` of `bpe.merge_word`. Arrays grow here, by doubling, when a loop says that one is
full.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from lfs_cli.tokenizer import loops
from lfs_cli.tokenizer.blocks import Specials, read_blocks
from lfs_cli.tokenizer.loops import BETWEEN_WORDS, HEAP, LETTERS, MERGES, NEEDED, PAIRS, PLACES
from lfs_cli.tokenizer.split import Pattern
from lfs_cli.tokenizer.unicode_classes import CODE_POINTS, class_runs

log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]

MERGES_A_CALL = 256
"""Merges between two reports of progress, and between two chances to interrupt."""

CACHE_SLOTS = 1 << 17
"""Slots for words that were met before, 48 bytes each, in each thread."""


@cache
def classes() -> np.ndarray:
    """Return the class of every code point (`unicode_classes`): (0x110000,), uint8."""
    starts, kinds = class_runs()
    return np.repeat(np.array(kinds, np.uint8), np.diff([*starts, CODE_POINTS]))


def announce(task: str) -> None:
    """Log that the loops of ``task`` are going to be compiled, if they are."""
    if not loops.is_compiled(task):
        log.info("compiling the loops for %s; later runs find them in %s", task, loops.folder())


def grown(array: np.ndarray, needed: int) -> np.ndarray:
    """Return ``array`` with room for ``needed`` rows or twice as many as it has, with zeros in what is new."""
    larger = np.zeros((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is ``least`` or more."""
    return 1 << max(0, least - 1).bit_length()


class WordCounts:
    """How often each word occurs: the table that `loops.count_words` fills (see `loops._add_word`)."""

    def __init__(self) -> None:
        self.slots = np.zeros(1 << 16, np.int64)
        self.hashes = np.zeros(1 << 15, np.uint64)
        self.ends = np.zeros(1 << 15, np.int64)
        self.counts = np.zeros(1 << 15, np.int64)
        self.letters = np.zeros(1 << 18, np.uint8)

    def __len__(self) -> int:
        return int(self.counts[0])

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.slots, self.hashes, self.ends, self.counts, self.letters

    def add(self, text: np.ndarray, start: int, stop: int) -> None:
        """Count the words of ``text[start:stop]``, as if nothing were around it."""
        while start < stop:
            start = loops.count_words(text, start, stop, classes(), *self._arrays)
            if start < stop:
                self._grow(stop - start)

    def merge(self, other: "WordCounts") -> None:
        """Add the counts of ``other``."""
        word = 1
        while word <= len(other):
            word = loops.add_words(word, *other._arrays[1:], *self._arrays)
            if word <= len(other):
                self._grow(len(other.letters))

    def words(self) -> dict[bytes, int]:
        """Return the counts as a dictionary."""
        letters, ends = self.letters.tobytes(), self.ends.tolist()
        return {letters[ends[n - 1] : ends[n]]: int(self.counts[n]) for n in range(1, len(self) + 1)}

    def _grow(self, longest: int) -> None:
        """Make room for more words and for one of ``longest`` bytes."""
        count = len(self)
        if count + 2 > len(self.hashes):
            self.hashes, self.ends, self.counts = (grown(array, 0) for array in (self.hashes, self.ends, self.counts))
        if self.ends[count] + longest > len(self.letters):
            self.letters = grown(self.letters, int(self.ends[count]) + longest)
        if 2 * count >= len(self.slots):
            self.slots = np.zeros(2 * len(self.slots), np.int64)
            loops.fill_word_slots(self.slots, self.hashes, count)


def count_words(
    path: Path, pattern: Pattern, special_tokens: Sequence[str], workers: int, report: OnProgress
) -> WordCounts:
    """Return how often each word of GPT-2's pattern occurs in a file. Each thread counts in a table of its own."""
    specials = Specials(special_tokens)
    blocks = read_blocks(path, pattern, specials)
    total, done = path.stat().st_size, 0
    reading, stop = threading.Lock(), threading.Event()

    def work() -> WordCounts:
        nonlocal done
        table = WordCounts()
        while not stop.is_set():
            with reading:
                block = next(blocks, None)
            if block is None:
                break
            text = np.frombuffer(block, np.uint8)
            for start, end, special in specials.split(block):
                if special is None:
                    table.add(text, start, end)
            with reading:
                done += len(block)
        return table

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(work) for _ in range(workers)]
            while wait(futures, timeout=0.1).not_done:
                report("counting", done, total)
            tables = [future.result() for future in futures]
            report("counting", done, total)
        finally:
            stop.set()
    for table in tables[1:]:
        tables[0].merge(table)
    return tables[0]


def learn(
    path: Path, pattern: Pattern, special_tokens: Sequence[str], wanted: int, workers: int, report: OnProgress
) -> list[tuple[bytes, bytes]]:
    """Return the merges that `learn.learn_reference` makes on the words of a file."""
    if pattern.name == "gpt2":
        announce("counting")
        words = count_words(path, pattern, special_tokens, workers, report)
        count = len(words)
        ends, letters, counts = words.ends[: count + 1], words.letters, words.counts[1 : count + 1]
    else:
        from lfs_cli.tokenizer.learn import count_words as count_in_python

        counted = count_in_python(path, pattern, special_tokens, report)
        ends = np.cumsum([0, *map(len, counted)])
        letters, counts = np.frombuffer(b"".join(counted), np.uint8), np.array(list(counted.values()), np.int64)
    announce("merging")
    return make_merges(letters, ends, counts, wanted, report)


def make_merges(
    letters: np.ndarray, word_ends: np.ndarray, counts: np.ndarray, wanted: int, report: OnProgress
) -> list[tuple[bytes, bytes]]:
    """Return up to ``wanted`` merges.

    Args:
        letters: The bytes of all words, one after another.
        word_ends: (words + 1,): where each word begins, and the end of the last one.
        counts: (words,), int64: occurrences of each word.
        wanted: Merges to make.
        report: Called with `merging`, the merges made and ``wanted``.
    """
    tokens, words = _spell_words(letters, word_ends)
    pairs, places, order = _first_pairs(tokens, words, counts)
    state = np.zeros(6, np.int64)
    state[PAIRS], state[HEAP], state[PLACES], state[LETTERS] = len(pairs), len(pairs), len(places), 256
    heap = np.stack([pairs[order, loops.COUNT], order], axis=1)  # sorted, which is a heap
    ends = np.zeros(257 + wanted, np.int64)
    ends[:257] = np.arange(257)
    spelling = np.arange(256, dtype=np.uint8)
    made = np.zeros((wanted, 2), np.int32)
    found, slots = np.zeros((1, 2), np.int64), np.zeros(1, np.int64)
    while True:
        new = int(state[NEEDED])
        used = int(state[PAIRS]) + new
        pairs, heap = _with_room(pairs, used), _with_room(heap, int(state[HEAP]) + new)
        places, found = _with_room(places, int(state[PLACES]) + new), _with_room(found, new)
        spelling = _with_room(spelling, 3 * int(state[LETTERS]))  # a new token is no longer than all others twice
        if 2 * used > len(slots):
            slots = np.zeros(power_of_two(4 * used), np.int64)
            loops.fill_pair_slots(slots, pairs, int(state[PAIRS]))
        until = min(wanted, int(state[MERGES]) + MERGES_A_CALL)
        loops.make_merges(until, tokens, words, counts, ends, spelling, pairs, slots, heap, places, found, made, state)
        report("merging", int(state[MERGES]), wanted)
        if state[MERGES] == wanted or state[HEAP] == 0:
            break
    spelled = [bytes(spelling[ends[t] : ends[t + 1]]) for t in range(256 + int(state[MERGES]))]
    return [(spelled[left], spelled[right]) for left, right in made[: state[MERGES]].tolist()]


def _with_room(array: np.ndarray, needed: int) -> np.ndarray:
    return array if len(array) >= needed else grown(array, needed)


def _spell_words(letters: np.ndarray, word_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the words as byte tokens with `BETWEEN_WORDS` around each, and the number of the word at each place."""
    sizes = np.diff(word_ends)
    total = int(word_ends[-1])
    words = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes + 1)
    tokens = np.full(total + len(sizes) + 1, BETWEEN_WORDS, np.int32)
    places = np.arange(1, total + 1) + np.repeat(np.arange(len(sizes)), sizes)
    tokens[places] = letters[:total]
    return tokens, np.concatenate([np.zeros(1, np.int32), words])


def _first_pairs(
    tokens: np.ndarray, words: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows of `pairs` and the list of places for all pairs of bytes, and the rows in the order of merging."""
    at = np.flatnonzero((tokens[:-1] >= 0) & (tokens[1:] >= 0)).astype(np.int32)
    keys = (tokens[at] << 8 | tokens[at + 1]).astype(np.uint16)
    weights = np.zeros(1 << 16, np.int64)
    np.add.at(weights, keys, counts[words[at]])
    sizes = np.bincount(keys, minlength=1 << 16)
    present = np.flatnonzero(sizes)
    pairs = np.zeros((len(present), 5), np.int64)
    pairs[:, loops.COUNT], pairs[:, loops.SIZE] = weights[present], sizes[present]
    pairs[:, loops.LEFT], pairs[:, loops.RIGHT] = present >> 8, present & 255
    pairs[:, loops.FIRST] = np.cumsum(sizes[present]) - sizes[present]
    order = np.lexsort((-present, -weights[present]))
    return pairs, at[np.argsort(keys, kind="stable")], order


class Encoder:
    """Encodes blocks of text with `loops.encode_words`, in any number of threads.

    Args:
        byte_ids: Id of each of the 256 bytes.
        ranks: Pair of ids -> (place in the list of merges, id of the merged token).
        sizes: Id -> bytes of its token.
        specials: Finds the special tokens.
        special_ids: Bytes of a special token -> its id.
    """

    def __init__(
        self,
        byte_ids: Sequence[int],
        ranks: Mapping[tuple[int, int], tuple[int, int]],
        sizes: Mapping[int, int],
        specials: Specials,
        special_ids: Mapping[bytes, int],
    ) -> None:
        announce("encoding")
        self.specials = specials
        self.special_ids = special_ids
        self._idle: SimpleQueue[_Desk] = SimpleQueue()
        pairs = np.array(list(ranks), np.int64).reshape(-1, 2)
        places = np.array(list(ranks.values()), np.int64).reshape(-1, 2)
        merged_ids = np.zeros(places[:, 0].max(initial=0) + 1, np.int32)
        merged_ids[places[:, 0]] = places[:, 1]
        token_sizes = np.zeros(max(sizes) + 1, np.int32)
        token_sizes[list(sizes)] = list(sizes.values())
        rank_keys = np.zeros(power_of_two(3 * len(pairs) + 2), np.uint64)
        rank_values = np.zeros(len(rank_keys), np.int32)
        loops.fill_ranks(
            np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]), np.ascontiguousarray(places[:, 0]),
            rank_keys, rank_values,
        )  # fmt: skip
        self._model = (classes(), np.array(byte_ids, np.int32), token_sizes, merged_ids, rank_keys, rank_values)

    def encode_blocks(self, blocks: Iterator[bytes], workers: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the bytes of each block and its ids (int32), in order. At most ``workers`` + 2 blocks are in memory."""
        if workers == 1:
            yield from map(self._encode, blocks)
            return
        with ThreadPoolExecutor(workers) as pool:
            ahead: deque[Future[tuple[int, np.ndarray]]] = deque()
            for block in blocks:
                ahead.append(pool.submit(self._encode, block))
                if len(ahead) > workers + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _encode(self, block: bytes) -> tuple[int, np.ndarray]:
        try:
            desk = self._idle.get_nowait()
        except Empty:
            desk = _Desk()
        text = np.frombuffer(block, np.uint8)
        desk.ids = _with_room(desk.ids, len(block))
        desk.state[0] = 0
        for start, end, special in self.specials.split(block):
            if special is not None:
                desk.ids[desk.state[0]] = self.special_ids[special]
                desk.state[0] += 1
                continue
            while start < end:
                start = loops.encode_words(text, start, end, *self._model, *desk.arrays)
                if start < end:
                    desk.make_room(int(desk.state[1]))
        ids = desk.ids[: desk.state[0]].copy()
        self._idle.put(desk)
        return len(block), ids


class _Desk:
    """What one thread works on: a table of words met before, and scratch (see `loops.encode_words`)."""

    def __init__(self) -> None:
        self.keys = np.zeros((CACHE_SLOTS, 2), np.uint64)
        self.values = np.zeros((CACHE_SLOTS, 1 + loops.CACHED_IDS), np.int32)
        self.ids = np.zeros(0, np.int32)
        self.state = np.zeros(2, np.int64)
        self.make_room(1 << 10)

    def make_room(self, longest: int) -> None:
        """Give the scratch room for a word of ``longest`` bytes."""
        self.tokens = np.zeros(longest, np.int32)
        self.heap = np.zeros(2 * longest, np.uint64)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.keys, self.values, self.tokens, self.heap, self.ids, self.state

"""Learning with the compiled loops: counting words in threads, and making merges.

`count_words` is the fast form of the function of that name in `learn.py`, `make_merges` of `learn.learn_reference`.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer import machine_code
from lfs_cli.tokenizer.arrays import LONG_BITS, MIDDLE_BITS, SHORT_BITS, TABLES, Arrays, Desk, grown
from lfs_cli.tokenizer.blocks import Block
from lfs_cli.tokenizer.desk import address

MERGES_A_CALL = 256
"""Merges between two reports of progress, and between two chances to interrupt."""

OnProgress = Callable[[str, int, int], None]


class WordCounts(Desk):
    """How often each word occurs.

    Args:
        scanner: The loop that finds words.
    """

    def __init__(self, scanner: str) -> None:
        super().__init__(scanner, (SHORT_BITS[0], MIDDLE_BITS[0], LONG_BITS[0]))

    def __len__(self) -> int:
        return int(sum(self.fields[count] for _, _, count in TABLES))

    def add(self, data: bytes | bytearray, parts: Sequence[tuple[int, int]]) -> None:
        """Count the words of some parts of ``data``, each as if nothing were around it."""
        if not parts:
            return
        texts = np.array(parts, np.int64)
        texts[:, 1] -= texts[:, 0]
        view = np.frombuffer(data, np.uint8)
        texts[:, 0] += address(view)
        self.fields[[d.TEXTS, d.TEXT_COUNT, d.TEXT]] = address(texts), len(texts), 0
        count = machine_code.load("count_words")
        while count(self.address):
            self._make_room()

    def joined(self, other: "WordCounts") -> "WordCounts":
        """Return the sum of two tables, which is one of them."""
        large, small = (self, other) if len(self) >= len(other) else (other, self)
        large.merge(small)
        return large

    def merge(self, other: "WordCounts", least: int = 0) -> None:
        """Add the words of ``other`` that occur ``least`` times or more."""
        self.fields[[d.OTHER, d.OTHER_SLOT, d.LEAST_COUNT]] = other.address, 0, least
        add = machine_code.load("add_counts")
        while add(self.address):
            self._make_room()

    def words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the bytes of all words, one after another, where each ends, and how often each occurs."""
        entries = [int(self.fields[count]) for _, _, count in TABLES]
        letters = np.empty(15 * entries[0] + 31 * entries[1] + int(self.fields[d.ARENA_USED]), np.uint8)
        ends, counts = np.empty(sum(entries), np.int64), np.empty(sum(entries), np.int64)
        self.fields[[d.WORD_LETTERS, d.WORD_ENDS, d.WORD_COUNTS]] = address(letters), address(ends), address(counts)
        machine_code.load("list_words")(self.address)
        return letters[: ends[-1] if len(ends) else 0], ends, counts

    def keep_most_frequent(self, most: int) -> "WordCounts":
        """Return a table of at most ``most`` words, without those that occur as often as one that finds no room."""
        counts = self.words()[2]
        least = int(np.partition(counts, len(counts) - most - 1)[len(counts) - most - 1]) + 1
        kept = WordCounts(self._scanner)
        kept.merge(self, least)
        return kept

    def _make_room(self) -> None:
        longest = int(self.fields[d.SCRATCH_NEEDED])
        self.fields[d.SCRATCH_NEEDED] = 0
        self.grow_tables((40, 40, 40), longest)


@dataclass
class Dropped:
    """What was dropped when there were too many different words.

    Args:
        words: How many different words; one that comes again is another one.
        occurrences: How many of all words in the text.
    """

    words: int = 0
    occurrences: int = 0

    def add(self, before: Iterable[int], after: Iterable[int]) -> None:
        """Note the counts before and after words were dropped."""
        before, after = np.fromiter(before, np.int64), np.fromiter(after, np.int64)
        self.words += len(before) - len(after)
        self.occurrences += int(before.sum() - after.sum())


def count_words(
    epochs: Iterable[Iterator[Block]], scanner: str, workers: int, most: int | None, spare: list[bytearray],
    report: Callable[[int], None],
) -> tuple[WordCounts, Dropped]:  # fmt: skip
    """Return how often each word occurs, and what was dropped. Each thread counts in a table of its own.

    Args:
        epochs: The text, in parts after each of which words may be dropped.
        scanner: The loop that finds words.
        workers: Threads.
        most: Words to keep at most; None keeps all.
        spare: Receives the buffers of blocks that are done with.
        report: Called with the bytes counted so far, some ten times a second.
    """
    total, done, dropped = WordCounts(scanner), 0, Dropped()
    taking, stop = threading.Lock(), threading.Event()

    def work(blocks: Iterator[Block]) -> WordCounts:
        nonlocal done
        table = WordCounts(scanner)
        while not stop.is_set():
            with taking:
                block = next(blocks, None)
            if block is None:
                break
            table.add(block.data, [(start, end) for start, end, special in block.parts() if not special])
            spare.append(block.data)
            with taking:
                done += block.size
        return table

    with ThreadPoolExecutor(workers) as pool:
        try:
            for blocks in epochs:
                futures = [pool.submit(work, blocks) for _ in range(workers)]
                while wait(futures, timeout=0.1).not_done:
                    report(done)
                for table in [future.result() for future in futures]:
                    total = total.joined(table)
                if most is not None and len(total) > most:
                    kept = total.keep_most_frequent(most)
                    dropped.add(total.words()[2], kept.words()[2])
                    total = kept
        finally:
            stop.set()
    report(done)
    return total, dropped


def make_merges(
    letters: np.ndarray, ends: np.ndarray, counts: np.ndarray, wanted: int, order: Sequence[int] | None,
    report: OnProgress,
) -> list[tuple[bytes, bytes]]:  # fmt: skip
    """Return the merges that `learn.learn_reference` makes.

    Args:
        letters: The bytes of all words, one after another.
        ends: (words,), int64: where each word ends.
        counts: (words,), int64: occurrences of each word.
        wanted: Merges to make; fewer when no pair is left.
        order: Of equally frequent pairs the one whose bytes are greater is merged, if this is None. Else the one whose
            numbers are smaller, which are these for the 256 bytes, and then those of the merges from 256 on.
        report: Called with `merging`, the merges made and ``wanted``.
    """
    learner = _Learner(letters, ends, counts, wanted, order)
    while True:
        made = learner.advance(MERGES_A_CALL)
        report("merging", made, wanted)
        if learner.is_done:
            return learner.merges()


class _Learner(Arrays):
    """The desk at which merges are learned (see `loops_learn`)."""

    def __init__(
        self, letters: np.ndarray, ends: np.ndarray, counts: np.ndarray, wanted: int, order: Sequence[int] | None
    ) -> None:
        super().__init__()
        self._wanted = wanted
        vocab, places = 256 + wanted, int(ends[-1]) + len(ends) + 1 if len(ends) else 2
        self.put(d.WORD_LETTERS, letters)
        self.put(d.WORD_ENDS, ends)
        self.put(d.WORD_COUNTS, counts)
        self.fields[d.WORD_COUNT] = len(ends)
        self.put(d.TOKENS_OF_WORDS, np.empty(places, np.uint32))
        self.put(d.WORDS_OF_PLACES, np.empty(places, np.uint32))
        self.put(d.PLACES, np.empty(places, np.uint32))
        weights = self.put(d.WEIGHTS, np.zeros(2 << 16, np.int64))
        self.fields[d.PLACES_USED] = machine_code.load("spell_words")(self.address)
        self.fields[d.PLACES_SIZE] = places
        for place in (d.LEFT_NEW, d.RIGHT_NEW, d.LEFT_SEEN, d.RIGHT_SEEN):
            self.put(place, np.zeros(vocab, np.uint32))
        for place in (d.LEFT_LOSSES, d.RIGHT_LOSSES):
            self.put(place, np.zeros(vocab, np.int64))
        self.put(d.ORDER, np.zeros(vocab, np.uint32))[:256] = range(256) if order is None else order
        self.fields[d.TIES] = 0 if order is None else 1
        self._made = self.put(d.MADE, np.zeros((wanted, 2), np.uint32))
        self.put(d.TOKEN_ENDS, np.zeros(vocab + 1, np.int64))[:257] = range(257)
        self.put(d.LETTERS, np.arange(256, dtype=np.uint8))
        self.put(d.PREFIXES, np.zeros(vocab, np.uint64))[:256] = np.arange(256, dtype=np.uint64) << np.uint64(56)
        self._start(weights[: 1 << 16], weights[1 << 16 :])

    def _start(self, weights: np.ndarray, ends: np.ndarray) -> None:
        """Make the rows of the pairs of bytes, and the heap, which a sorted list is."""
        sizes = np.diff(ends, prepend=0)
        present = np.flatnonzero(sizes)
        rows = np.zeros(len(present), _ROW)
        rows["count"], rows["first"], rows["size"] = weights[present], (ends - sizes)[present], sizes[present]
        rows["left"], rows["right"] = present >> 8, present & 255
        if self.fields[d.TIES]:
            order = self.array(d.ORDER)
            best_first = np.lexsort((order[rows["right"]], order[rows["left"]], -rows["count"]))
        else:
            best_first = np.lexsort((-present, -rows["count"]))
        self.put(d.ROWS, rows)
        self.put(d.HEAP, np.stack([rows["count"][best_first], best_first], axis=1))
        self.put(d.FOUND, np.zeros((0, 2), np.uint32))
        self.fields[[d.PAIR_ROWS, d.HEAP_COUNT]] = len(present), len(present)
        self.fields[d.PAIR_SLOTS_BITS] = 0
        self._make_room(0)

    @property
    def is_done(self) -> bool:
        """Whether all merges are made, or no pair is left."""
        return self.fields[d.MERGES] == self._wanted or self.fields[d.HEAP_COUNT] == 0

    def advance(self, merges: int) -> int:
        """Make so many merges, and return how many there are."""
        self.fields[d.UNTIL] = min(self._wanted, int(self.fields[d.MERGES]) + merges)
        loop = machine_code.load("make_merges")
        loop(self.address)
        while self.fields[d.NEEDED]:
            self._make_room(int(self.fields[d.NEEDED]))
            loop(self.address)
        return int(self.fields[d.MERGES])

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return the merges made, as bytes."""
        made, ends = int(self.fields[d.MERGES]), self.array(d.TOKEN_ENDS).tolist()
        letters = self.array(d.LETTERS).tobytes()
        tokens = [letters[ends[t] : ends[t + 1]] for t in range(256 + made)]
        return [(tokens[left], tokens[right]) for left, right in self._made[:made].tolist()]

    def _make_room(self, new_places: int) -> None:
        """Make room for a merge that gives new pairs so many places."""
        fields = self.fields
        new_pairs = min(new_places, 2 * (257 + int(fields[d.MERGES])))
        pairs = int(fields[d.PAIR_ROWS]) + new_pairs
        self._grow(d.ROWS, pairs, d.PAIR_ROWS_SIZE)
        self._grow(d.HEAP, int(fields[d.HEAP_COUNT]) + new_pairs, d.HEAP_SIZE)
        self._grow(d.PLACES, int(fields[d.PLACES_USED]) + new_places, d.PLACES_SIZE)
        self._grow(d.FOUND, new_places, d.FOUND_SIZE)
        longest = 2 * int(self.array(d.TOKEN_ENDS)[256 + fields[d.MERGES]])  # no token is longer than all others
        self._grow(d.LETTERS, longest, d.LETTERS_SIZE)
        if 2 * pairs > 1 << fields[d.PAIR_SLOTS_BITS]:
            bits = max(10, (4 * pairs).bit_length())
            self.put(d.PAIR_SLOTS, np.zeros(1 << bits, np.uint32))
            fields[d.PAIR_SLOTS_BITS] = bits
            machine_code.load("fill_pair_slots")(self.address)

    def _grow(self, place: int, needed: int, size: int) -> None:
        array = self.array(place)
        if len(array) < needed:
            array = self.put(place, grown(array, needed))
        self.fields[size] = len(array)


_ROW = np.dtype([("count", "i8"), ("first", "i8"), ("size", "u4"), ("left", "u4"), ("right", "u4"), ("", "u4")])
"""A row of PAIRS (see `loops_learn`)."""

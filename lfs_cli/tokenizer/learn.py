"""Learning a vocabulary: count words, then merge the most frequent pair of neighbours, again and again.

    words     low 5   lower 2   newest 6   widest 3      each word begins as its bytes
    pairs     e s 9   s t 9     w e 8      ...
    merge 1   s t     (9 as often as e s, and `s t` is the greater of the two)
    merge 2   e st    9
    ...

`learn_reference` is the whole idea in a dozen lines, and the definition: it counts all pairs again after each merge.
The faster ways make the same merges in the same order, since a merge changes only the pairs around the places where it
happens: `learn_pairs` in plain Python, for texts so small that compiling would take longer, and `learner.make_merges`
with compiled loops (`loops_learn.py`).

Of equally frequent pairs the one whose bytes are greater is merged, the left token compared first; the rule of CS336.
Special tokens are cut out before anything is counted.

Two different merges never make the same token, so a token may be known by its bytes or by a number: what happens
between two ends that no merge crosses depends only on the bytes between them, so these are always merged alike.
"""

import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Literal

from lfs_cli.errors import ConfigError
from lfs_cli.tokenizer import formats
from lfs_cli.tokenizer.blocks import Block, FindPairs, Specials, read_blocks, read_sample, reading
from lfs_cli.tokenizer.bpe import COMPILED_BYTES, KEPT_BYTES, will_compile
from lfs_cli.tokenizer.split import Pattern, find_pattern

Merges = list[tuple[bytes, bytes]]
OnProgress = Callable[[str, int, int], None]
Ties = Literal["bytes", "ids"]

EPOCH_BYTES = 32_000_000
"""Text after which words are dropped, if there are more than may be: the same places for any number of threads."""


@dataclass(frozen=True)
class LearnStats:
    """What learning took and met.

    Args:
        bytes: Size of the text that was counted.
        words: How many words it has, those that were dropped included.
        distinct_words: How many different words the merges were learned from.
        dropped_words: How many different words were dropped because of ``max_words``.
        dropped_share: Their part of all words, from 0 to 1.
        count_seconds: Time of reading and counting, and of compiling if need be.
        merge_seconds: Time of merging.
    """

    bytes: int
    words: int
    distinct_words: int
    dropped_words: int
    dropped_share: float
    count_seconds: float
    merge_seconds: float


def learn_bpe(
    path: str | Path | Sequence[str | Path],
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    pattern: str = "gpt2",
    workers: int = 0,
    max_words: int | None = None,
    sample_bytes: int | None = None,
    ties: Ties = "bytes",
    on_progress: OnProgress | None = None,
    on_stats: Callable[[LearnStats], None] | None = None,
) -> tuple[dict[int, bytes], Merges]:
    """Learn byte-level BPE on text files of any size.

    Args:
        path: A text in UTF-8, or several, each a text of its own. A byte that is not valid counts as a character.
        vocab_size: Tokens wanted: 256 bytes, merges and special tokens. When the text runs out of pairs before, there
            are fewer.
        special_tokens: Texts that nothing is merged across and that are not counted.
        pattern: How text is cut into words: a name in `PATTERNS`.
        workers: Threads; 0 takes one for each core. The result is the same for any number.
        max_words: Different words to keep at most, for texts with so many that memory does not hold them (some 40
            bytes a word and thread). The rarest are dropped, after each `EPOCH_BYTES`; a warning tells how many.
        sample_bytes: Text to count at most, from each file in proportion to its size, evenly spread over it.
        ties: Which of equally frequent pairs is merged: ``"bytes"``, the one whose bytes are greater, or ``"ids"``,
            the one with smaller ids as Hugging Face numbers them, to compare the two.
        on_progress: Called with `counting` or `merging`, how much is done and how much there is: bytes, then merges.
        on_stats: Called once at the end. It then also is what tells of dropped words, instead of a warning.

    Returns:
        The vocabulary, in which the 256 bytes come first in their order, then the merges, then the special tokens;
        and the merges, in the order in which they were made.

    Raises:
        ConfigError: When ``vocab_size`` has no room for bytes and special tokens, or for an unknown pattern.
        DataError: When a file cannot be read.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    special_tokens = list(dict.fromkeys(special_tokens))
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"`vocab_size` ({vocab_size}) has no room for 256 bytes and {len(special_tokens)} special tokens",
            hint=f"set `vocab_size` to at least {smallest}",
        )
    text = Source(paths, find_pattern(pattern), Specials(special_tokens), sample_bytes)
    report = on_progress or (lambda phase, done, total: None)
    learn = _learn_in_python if _is_small(text) or vocab_size == smallest else _learn_compiled
    merges, stats = learn(text, vocab_size - smallest, ties, max_words, workers or os.cpu_count() or 1, report)
    if on_stats is not None:
        on_stats(stats)
    elif stats.dropped_words:
        warnings.warn(
            f"{stats.dropped_words:,} rare words, {stats.dropped_share:.1%} of the text, did not fit into "
            f"`max_words` ({max_words:,})",
            stacklevel=2,
        )
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += [text.encode() for text in special_tokens]
    return dict(enumerate(tokens)), merges


@dataclass
class Source:
    """What is learned from."""

    paths: Sequence[Path]
    pattern: Pattern
    specials: Specials
    sample_bytes: int | None

    def __post_init__(self) -> None:
        with reading(*self.paths):
            self.sizes = [path.stat().st_size for path in self.paths]
        self.size = sum(self.sizes)
        if self.sample_bytes is not None:
            self.size = min(self.size, self.sample_bytes)

    def blocks(self, spare: list[bytearray] | None = None, find: FindPairs | None = None) -> Iterator[Block]:
        """Yield the text, or the sample of it, in blocks that can be tokenized apart."""
        for path, size in zip(self.paths, self.sizes, strict=True):
            if self.size == sum(self.sizes):
                yield from read_blocks(path, self.pattern, self.specials, spare, find)
            else:
                share = self.size * size // sum(self.sizes)
                yield from read_sample(path, share, self.pattern, self.specials, spare, find)

    def epochs(
        self, max_words: int | None, spare: list[bytearray] | None = None, find: FindPairs | None = None
    ) -> Iterator[Iterator[Block]]:
        """Yield the blocks in parts of `EPOCH_BYTES`, or all in one when no words are dropped."""
        blocks = self.blocks(spare, find)
        if max_words is None:
            yield blocks
            return

        def epoch(first: Block) -> Iterator[Block]:
            taken = first.size
            yield first
            while taken < EPOCH_BYTES and (block := next(blocks, None)) is not None:
                taken += block.size
                yield block

        while (first := next(blocks, None)) is not None:
            yield epoch(first)


def _is_small(text: Source) -> bool:
    """Return whether plain Python is done before compiled loops would be ready."""
    if text.size >= COMPILED_BYTES:
        return False
    return text.size < KEPT_BYTES or will_compile("learning", COMPILED_BYTES, text.pattern.name)


def _learn_in_python(
    text: Source, wanted: int, ties: Ties, max_words: int | None, workers: int, report: OnProgress
) -> tuple[Merges, LearnStats]:
    started = time.perf_counter()
    words, dropped = count_words(text, max_words, report)
    counted = time.perf_counter()
    merges = learn_pairs(words, wanted, report, ties=ties)
    return merges, _stats(text, len(words), words.total(), *dropped, started, counted)


def _learn_compiled(
    text: Source, wanted: int, ties: Ties, max_words: int | None, workers: int, report: OnProgress
) -> tuple[Merges, LearnStats]:
    import numpy as np

    from lfs_cli.tokenizer import arrays, learner, machine_code

    scanner, started = text.pattern.scanner, time.perf_counter()
    machine_code.announce("learning", scanner)
    if scanner is None:
        in_python, dropped = count_words(text, max_words, report)
        letters, ends = np.frombuffer(b"".join(in_python), np.uint8), np.cumsum([*map(len, in_python)], dtype=np.int64)
        counts = np.array(list(in_python.values()), np.int64)
    else:
        spare: list[bytearray] = []
        counting = lambda done: report("counting", done, text.size)  # noqa: E731
        epochs = text.epochs(max_words, spare, arrays.find_pairs)
        table, lost = learner.count_words(epochs, scanner, workers, max_words, spare, counting)
        letters, ends, counts = table.words()
        dropped = lost.words, lost.occurrences
    counted = time.perf_counter()
    order = None if ties == "bytes" else huggingface_order()
    merges = learner.make_merges(letters, ends, counts, wanted, order, report)
    return merges, _stats(text, len(counts), int(counts.sum()), *dropped, started, counted)


def _stats(
    text: Source, distinct: int, kept: int, dropped: int, dropped_occurrences: int, started: float, counted: float
) -> LearnStats:
    return LearnStats(
        bytes=text.size,
        words=kept + dropped_occurrences,
        distinct_words=distinct,
        dropped_words=dropped,
        dropped_share=dropped_occurrences / max(1, kept + dropped_occurrences),
        count_seconds=counted - started,
        merge_seconds=time.perf_counter() - counted,
    )


def huggingface_order() -> list[int]:
    """Return the place of each byte in the order of the characters that stand for them (`formats`)."""
    characters = [character for _, character in sorted(formats.byte_to_character().items())]
    ordered = sorted(characters)
    return [ordered.index(character) for character in characters]


def count_words(text: Source, max_words: int | None, report: OnProgress) -> tuple[Counter[bytes], tuple[int, int]]:
    """Return how often each word occurs, in plain Python; and the words and occurrences that were dropped."""
    counts: Counter[str] = Counter()
    done = dropped_words = dropped_occurrences = 0
    for blocks in text.epochs(max_words):
        for block in blocks:
            for start, end, is_special in block.parts():
                if not is_special:
                    counts.update(text.pattern.split(block.data[start:end].decode("utf-8", "surrogateescape")))
            done += block.size
            report("counting", done, text.size)
        if max_words is not None and len(counts) > max_words:
            least = sorted(counts.values())[-max_words - 1] + 1
            kept = Counter({word: count for word, count in counts.items() if count >= least})
            dropped_words += len(counts) - len(kept)
            dropped_occurrences += counts.total() - kept.total()
            counts = kept
    in_bytes = Counter({word.encode("utf-8", "surrogateescape"): count for word, count in counts.items()})
    return in_bytes, (dropped_words, dropped_occurrences)


def learn_reference(words: Mapping[bytes, int], wanted: int) -> Merges:
    """Return up to ``wanted`` merges: the definition of learning, which everything faster must equal.

    >>> learn_reference({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, 3)
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]

    Args:
        words: How often each word occurs.
        wanted: Merges to make; fewer when every word has become one token.

    Source: Sennrich, Haddow & Birch, 2016 (arXiv:1508.07909), Algorithm 1, on bytes.
    """
    tokens = {word: [bytes([byte]) for byte in word] for word in words}
    merges: Merges = []
    while len(merges) < wanted:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(tokens[word]):
                counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            tokens[word] = _join(tokens[word], best, best[0] + best[1])
    return merges


def _join(tokens: list, pair: tuple, merged: bytes | int) -> list:
    """Return ``tokens`` with ``merged`` in place of each ``pair`` of neighbours, from left to right."""
    joined, i = [], 0
    while i < len(tokens):
        if tokens[i : i + 2] == list(pair):
            joined.append(merged)
            i += 2
        else:
            joined.append(tokens[i])
            i += 1
    return joined


def learn_pairs(
    words: Mapping[bytes, int],
    wanted: int,
    report: OnProgress = lambda phase, done, total: None,
    *,
    ties: Ties = "bytes",
) -> Merges:
    """Return the merges of `learn_reference`, with counts that are kept up to date instead of made anew.

    Each pair knows the words it occurs in, so that a merge visits only those. The most frequent pair is on top of a
    heap; an entry whose count is out of date when it comes up goes back with the right one. That is enough, as counts
    of old pairs only fall.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    orders: list = huggingface_order() if ties == "ids" else [_order(token) for token in tokens]
    spelled = [list(word) for word in words]
    frequencies = list(words.values())
    counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, ids in enumerate(spelled):
        for pair in pairwise(ids):
            counts[pair] += frequencies[i]
            places[pair].add(i)

    def entry(pair: tuple[int, int]) -> tuple:
        return -counts[pair], orders[pair[0]], orders[pair[1]], pair

    heap = [entry(pair) for pair in counts]
    heapify(heap)
    merges: Merges = []
    while heap and len(merges) < wanted:
        count, *_, pair = heappop(heap)
        if counts[pair] <= 0:
            continue
        if counts[pair] != -count:
            heappush(heap, entry(pair))
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        orders.append(len(orders) if ties == "ids" else _order(tokens[-1]))
        changed = set()
        for i in places.pop(pair):
            changed |= _merge_in_word(spelled, i, frequencies[i], pair, len(tokens) - 1, counts, places)
        for new in changed:
            heappush(heap, entry(new))
        report("merging", len(merges), wanted)
    return merges


def _merge_in_word(
    spelled: list[list[int]],
    i: int,
    frequency: int,
    pair: tuple[int, int],
    merged: int,
    counts: dict[tuple[int, int], int],
    places: dict[tuple[int, int], set[int]],
) -> set[tuple[int, int]]:
    """Merge ``pair`` in word ``i``, bring counts and places up to date, and return the pairs that are new there."""
    new = _join(spelled[i], pair, merged)
    if len(new) == len(spelled[i]):
        return set()  # an earlier merge has taken the pair away
    for old in pairwise(spelled[i]):
        counts[old] -= frequency
    made = set()
    for current in pairwise(new):
        counts[current] += frequency
        if merged in current:
            places[current].add(i)
            made.add(current)
    spelled[i] = new
    return made


def _order(token: bytes) -> str:
    """Return a text that sorts before those of lesser bytes, for a heap whose smallest entry comes first.

    Each byte is turned round, and the end sorts after everything, since `ab` is less than `abc`.
    """
    return bytes(255 - byte for byte in token).decode("latin-1") + "\u0100"

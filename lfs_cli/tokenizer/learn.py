"""Learning a vocabulary: count words, then merge the most frequent pair of neighbours, again and again.

    words     low 5   lower 2   newest 6   widest 3      each word begins as its bytes
    pairs     e s 9   s t 9     w e 8      ...
    merge 1   s t     (9 as often as e s, and `s t` is the greater of the two)
    merge 2   e st    9
    ...

`learn_reference` is the whole idea in a dozen lines, and the definition: it counts all pairs again after each merge.
The faster ways make the same merges in the same order, since a merge changes only the pairs around the places where it
happens: `learn_pairs` in plain Python, for texts so small that compiling would take longer, and `fast.learn` with
compiled loops.

Of equally frequent pairs the one whose bytes are greater is merged, the left token compared first; the rule of CS336.
Special tokens are cut out before anything is counted.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from lfs_cli.errors import ConfigError
from lfs_cli.tokenizer.blocks import Specials, read_blocks, reading
from lfs_cli.tokenizer.bpe import COMPILED_BYTES
from lfs_cli.tokenizer.split import Pattern, find_pattern

Merges = list[tuple[bytes, bytes]]
OnProgress = Callable[[str, int, int], None]


def learn_bpe(
    path: str | Path,
    vocab_size: int,
    special_tokens: Sequence[str],
    *,
    pattern: str = "gpt2",
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[dict[int, bytes], Merges]:
    """Learn byte-level BPE on a text file of any size.

    Args:
        path: Text in UTF-8. A byte that is not valid counts as a character of its own.
        vocab_size: Tokens wanted: 256 bytes, merges and special tokens. When the text runs out of pairs before, there
            are fewer.
        special_tokens: Texts that nothing is merged across and that are not counted.
        pattern: How text is cut into words: a name in `PATTERNS`.
        workers: Threads; 0 takes one for each core. The result is the same for any number.
        on_progress: Called with `counting` or `merging`, how much is done and how much there is: bytes, then merges.

    Returns:
        The vocabulary, in which the 256 bytes come first in their order, then the merges, then the special tokens;
        and the merges, in the order in which they were made.

    Raises:
        ConfigError: When ``vocab_size`` has no room for bytes and special tokens, or for an unknown pattern.
        DataError: When the file cannot be read.
    """
    path, words = Path(path), find_pattern(pattern)
    special_tokens = list(dict.fromkeys(special_tokens))
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ConfigError(
            f"`vocab_size` ({vocab_size}) has no room for 256 bytes and {len(special_tokens)} special tokens",
            hint=f"set `vocab_size` to at least {smallest}",
        )
    report = on_progress or (lambda phase, done, total: None)
    with reading(path):
        is_small = path.stat().st_size < COMPILED_BYTES
    wanted = vocab_size - smallest
    if is_small or not wanted:
        merges = learn_pairs(count_words(path, words, special_tokens, report), wanted, report)
    else:
        from lfs_cli.tokenizer import fast

        merges = fast.learn(path, words, special_tokens, wanted, workers or os.cpu_count() or 1, report)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left, right in merges]
    tokens += [text.encode() for text in special_tokens]
    return dict(enumerate(tokens)), merges


def count_words(path: Path, pattern: Pattern, special_tokens: Sequence[str], report: OnProgress) -> Counter[bytes]:
    """Return how often each word occurs in a file, in plain Python."""
    counts: Counter[str] = Counter()
    specials = Specials(special_tokens)
    total, done = path.stat().st_size, 0
    for block in read_blocks(path, pattern, specials):
        for start, end, special in specials.split(block):
            if special is None:
                counts.update(pattern.split(block[start:end].decode("utf-8", "surrogateescape")))
        done += len(block)
        report("counting", done, total)
    return Counter({word.encode("utf-8", "surrogateescape"): count for word, count in counts.items()})


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
    words: Mapping[bytes, int], wanted: int, report: OnProgress = lambda phase, done, total: None
) -> Merges:
    """Return the merges of `learn_reference`, with counts that are kept up to date instead of made anew.

    Each pair knows the words it occurs in, so that a merge visits only those. The most frequent pair is on top of a
    heap; an entry whose count is out of date when it comes up goes back with the right one. That is enough, as counts
    of old pairs only fall.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    orders = [_order(token) for token in tokens]
    spelled = [list(word) for word in words]
    frequencies = list(words.values())
    counts: defaultdict[tuple[int, int], int] = defaultdict(int)
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, ids in enumerate(spelled):
        for pair in pairwise(ids):
            counts[pair] += frequencies[i]
            places[pair].add(i)

    def entry(pair: tuple[int, int]) -> tuple[int, str, str, tuple[int, int]]:
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
        orders.append(_order(tokens[-1]))
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

"""The tokenizer: text to ids and back.

Byte-level BPE knows 256 tokens from the start, one for each byte, and a list of merges that were learned in order
(`learn.py`). To encode a word, begin with its bytes; as long as two neighbours are a merge, join the pair that was
learned first. With the merges (h, e) and (l, l) and (he, ll):

    h e l l o  ->  he l l o  ->  he ll o  ->  hell o

Every text can be encoded, since every byte can, and decoding gives exactly the same bytes back. Special tokens, such as
`<|endoftext|>`, are found first and never split; nothing is merged across them. The rest is cut into words
(`split.py`), and each word is encoded alone: `merge_word` is the definition.

Two ways lead to the same ids. Plain Python with a dictionary of words that were met before serves short texts: it needs
no numba, so that generating text starts at once. Compiled loops (`loops.py`) serve texts above `COMPILED_BYTES`.

Source: Gage, "A New Algorithm for Data Compression", 1994; Sennrich, Haddow & Birch, "Neural Machine Translation of
Rare Words with Subword Units", 2016 (arXiv:1508.07909). Bytes as the alphabet: Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import formats
from lfs_cli.tokenizer.blocks import BLOCK_BYTES, Specials, blocks_of, read_blocks, reading, to_utf8, utf8_pieces
from lfs_cli.tokenizer.split import Pattern, find_pattern

if TYPE_CHECKING:
    from lfs_cli.tokenizer.fast import Encoder

COMPILED_BYTES = 8_000_000
"""Texts of at least so many bytes are worth the compiled loops, which take seconds to compile once on a machine."""

READY_BYTES = 1 << 16
"""The same once the loops are ready in this process."""

LONG_WORD = 64
"""Bytes above which a word is encoded with a heap, so that time stays near-linear."""

REMEMBERED_WORDS = 1 << 16
"""Words whose ids are kept: nearly all words of a text, in about 16 MB."""

REMEMBERED_IN_STREAMS = 1 << 12
"""The same for `encode_iterable`, which promises less memory: the most frequent words, in some hundred kilobytes."""

Ranks = Mapping[tuple[int, int], tuple[int, int]]
"""Pair of ids -> (place in the list of merges, id of the merged token)."""


class Tokenizer:
    """Byte-level BPE with special tokens.

    Args:
        vocab: Id -> bytes of the token. A text with a byte that is no token cannot be encoded, so learned vocabularies
            have all 256 of them.
        merges: Pairs of tokens in the order in which they were learned.
        special_tokens: Texts that become one token each. Those that ``vocab`` lacks get the next free ids.
        pattern: How text is cut into words: a name in `PATTERNS`, or a pattern.

    Raises:
        DataError: When vocabulary and merges do not fit together.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str | Pattern = "gpt2",
    ) -> None:
        self.vocab: dict[int, bytes] = {int(id): bytes(token) for id, token in vocab.items()}
        self.merges: list[tuple[bytes, bytes]] = [(bytes(left), bytes(right)) for left, right in merges]
        self.special_ids = _add_specials(self.vocab, special_tokens or ())
        self.special_tokens = tuple(self.special_ids)
        self._pattern = find_pattern(pattern) if isinstance(pattern, str) else pattern
        self._specials = Specials(self.special_tokens)
        self._special_bytes = {text.encode(): id for text, id in self.special_ids.items()}
        self._byte_ids, self._ranks = _index(self.vocab, self.merges)
        self._words: dict[str, list[int]] = {}
        self._encoder: Encoder | None = None

    @classmethod
    def from_files(
        cls, vocab_path: str | Path, merges_path: str | Path, special_tokens: Sequence[str] | None = None
    ) -> "Tokenizer":
        """Return the tokenizer of GPT-2's two files, `vocab.json` and `merges.txt`. Raises DataError."""
        vocab, merges = formats.read_gpt2(Path(vocab_path), Path(merges_path))
        return cls(vocab, merges, special_tokens)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Return the tokenizer in a folder or file.

        Args:
            path: A `tokenizer.json` of lfs or Hugging Face, or a folder that holds one, or a folder with
                `vocab.json` and `merges.txt` (or `<name>_vocab.json` and `<name>_merges.txt`), or one of these two.
                In GPT-2's files a token that is neither a byte nor made by a merge is a special token.

        Raises:
            DataError: When there is no tokenizer, or it is damaged or of a kind that lfs does not know.
        """
        vocab, merges, special_tokens, pattern = formats.read(Path(path))
        return cls(vocab, merges, special_tokens, pattern=pattern)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into ``folder``, in the format of Hugging Face's `tokenizers`, and return its path."""
        return formats.write_huggingface(Path(folder), self.vocab, self.merges, self.special_ids, self._pattern)

    def save_gpt2(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `vocab.json` and `merges.txt` into ``folder`` and return their paths.

        They have no place for the pattern and do not mark the special tokens.
        """
        return formats.write_gpt2(Path(folder), self.vocab, self.merges, self.special_ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows that an embedding needs."""
        return max(self.vocab) + 1

    @property
    def pattern(self) -> str:
        """Name of the pattern; for a foreign one without a name, its expression."""
        return self._pattern.name

    @cached_property
    def hash(self) -> str:
        """64 hex digits that tell whether two tokenizers give the same ids, whatever file they came from."""
        content = {
            "vocab": sorted((id, token.hex()) for id, token in self.vocab.items()),
            "merges": [(left.hex(), right.hex()) for left, right in self.merges],
            "special_tokens": sorted(self.special_ids.items()),
            "pattern": self._pattern.expression,
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. A lone surrogate, which UTF-8 cannot hold, is read as U+FFFD.

        Raises DataError for a byte that the vocabulary lacks.

        >>> Tokenizer({id: bytes([id]) for id in range(256)}, []).encode("hé")
        [104, 195, 169]
        """
        data = to_utf8(text)
        if self._is_worth_compiling(len(data)):
            pieces = (data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES))
            blocks = blocks_of(pieces, self._pattern, self._specials, BLOCK_BYTES)
            return [id for _, ids in self._compiled().encode_blocks(blocks, 1) for id in ids.tolist()]
        return list(chain.from_iterable(self._encode_words(data)))

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """Yield the ids of the text that ``texts`` make together, such as the lines of a file.

        Ids come while the text does, as soon as what follows cannot change them; memory stays flat. Only a stretch
        in which words cannot end, such as a word of megabytes, is waited for.
        """
        for block in blocks_of(utf8_pieces(texts), self._pattern, self._specials, least=0):
            yield from chain.from_iterable(self._encode_words(block, REMEMBERED_IN_STREAMS))

    def encode_file(
        self, path: str | Path, *, workers: int = 0, on_progress: Callable[[int, int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the ids of a text file in order, a few megabytes of text at a time, in flat memory.

        They are the same for any number of workers, and the same as those of `encode` on the whole text. A byte that is
        not valid UTF-8 counts as a character of its own, like punctuation, and decodes to itself.

        Args:
            path: Text in UTF-8.
            workers: Threads; 0 takes one for each core.
            on_progress: Called with the bytes that are done and those of the whole file.

        Returns:
            Arrays of uint16, or of uint32 for a vocabulary of more than 65,536.

        Raises:
            DataError: When the file cannot be read.
        """
        path = Path(path)
        with reading(path):
            total = path.stat().st_size
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        blocks = read_blocks(path, self._pattern, self._specials)
        done = 0
        if self._is_worth_compiling(total):
            encoded = self._compiled().encode_blocks(blocks, workers or os.cpu_count() or 1)
        else:
            encoded = (
                (len(block), np.fromiter(chain.from_iterable(self._encode_words(block)), np.int32)) for block in blocks
            )
        for size, ids in encoded:
            done += size
            if on_progress is not None:
                on_progress(done, total)
            yield ids.astype(dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, with U+FFFD for bytes that are not valid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ``ids``, a list, array or tensor. Raises DataError for an id that no token has."""
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        try:
            return b"".join([self.vocab[id] for id in ids])
        except KeyError as error:
            raise DataError(
                f"no token has the id `{error.args[0]}`", hint=f"ids of this tokenizer are below {self.vocab_size:,}"
            ) from None

    def stream(self) -> "TextStream":
        """Return a decoder that is fed one id after another and never gives half a character."""
        return TextStream(self)

    def _encode_words(self, data: bytes, remembered: int = REMEMBERED_WORDS) -> Iterator[list[int]]:
        """Yield the ids of each word of UTF-8 ``data``, in plain Python. Bad bytes pass as surrogates (PEP 383)."""
        words = self._words
        for start, end, special in self._specials.split(data):
            if special is not None:
                yield [self._special_bytes[special]]
                continue
            for word in self._pattern.split(data[start:end].decode("utf-8", "surrogateescape")):
                ids = words.get(word)
                if ids is None:
                    ids = merge_ids(self._spell(word), self._ranks)
                    if len(word) <= LONG_WORD:
                        if len(words) >= remembered:
                            words.clear()
                        words[word] = ids
                yield ids

    def _spell(self, word: str) -> list[int]:
        """Return the ids of the bytes of ``word``."""
        try:
            return [self._byte_ids[byte] for byte in word.encode("utf-8", "surrogateescape")]
        except KeyError as error:
            raise DataError(
                f"the vocabulary has no token for the byte `0x{error.args[0]:02x}`",
                hint="use a tokenizer with all 256 bytes, such as one learned by `lfs tokenize`",
            ) from None

    def _is_worth_compiling(self, size: int) -> bool:
        enough = COMPILED_BYTES if self._encoder is None else min(COMPILED_BYTES, READY_BYTES)
        return size >= enough and self.pattern == "gpt2" and len(self._byte_ids) == 256

    def _compiled(self) -> "Encoder":
        if self._encoder is None:
            from lfs_cli.tokenizer.fast import Encoder

            sizes = {id: len(token) for id, token in self.vocab.items()}
            byte_ids = [self._byte_ids[byte] for byte in range(256)]
            self._encoder = Encoder(byte_ids, self._ranks, sizes, self._specials, self._special_bytes)
        return self._encoder


class TextStream:
    """Turns ids into text while they are made. A character of several tokens is held back until it is whole.

    Args:
        tokenizer: Says what an id stands for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """Return the characters that ``id`` completes, often none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD when a character was never completed."""
        return self._decoder.decode(b"", final=True)


def will_compile(task: str, size: int, pattern: str) -> bool:
    """Return whether work on a text of ``size`` bytes begins with seconds of compiling, as it does once on a machine.

    Args:
        task: ``"learning"`` or ``"encoding"``.
        size: Bytes of the text.
        pattern: Name of its pattern.
    """
    if size < COMPILED_BYTES or (task == "encoding" and pattern != "gpt2"):
        return False
    from lfs_cli.tokenizer import loops

    return not all(map(loops.is_compiled, ("counting", "merging") if task == "learning" else ("encoding",)))


def merge_word(word: bytes, merges: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """Return the tokens of one word: the definition of encoding, which everything faster must equal.

    >>> merge_word(b"hello", [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll")])
    [b'hell', b'o']
    """
    tokens = [bytes([byte]) for byte in word]
    while True:
        pairs = [pair for pair in pairwise(tokens) if pair in merges]
        if not pairs:
            return tokens
        left, right = min(pairs, key=merges.index)
        place = next(i for i, pair in enumerate(pairwise(tokens)) if pair == (left, right))
        tokens[place : place + 2] = [left + right]


def merge_ids(ids: list[int], ranks: Ranks) -> list[int]:
    """Return what is left of ``ids`` after all merges, the one that was learned first first, from left to right."""
    if len(ids) > LONG_WORD:
        return _merge_long(ids, ranks)
    while len(ids) > 1:
        best, place, merged = len(ranks), -1, 0
        for i, pair in enumerate(pairwise(ids)):
            found = ranks.get(pair)
            if found is not None and found[0] < best:
                (best, merged), place = found, i
        if place < 0:
            break
        ids[place : place + 2] = [merged]
    return ids


def _merge_long(ids: list[int], ranks: Ranks) -> list[int]:
    """Do the same in O(n log n).

    The ids are a linked list, and a heap holds (rank, place) of its pairs. An entry that no longer holds, because one
    of the two ids was merged with another, is dropped when it comes up.
    """
    size = len(ids)
    after, before = list(range(1, size + 1)), list(range(-1, size - 1))
    heap = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapify(heap)
    gone = -1

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < size and (pair := (ids[left], ids[right])) in ranks:
            heappush(heap, (ranks[pair][0], left))

    while heap:
        rank, left = heappop(heap)
        right = after[left]
        if ids[left] == gone or right >= size:
            continue
        found = ranks.get((ids[left], ids[right]))
        if found is None or found[0] != rank:
            continue
        ids[left], ids[right] = found[1], gone
        after[left] = after[right]
        if after[left] < size:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [id for id in ids if id != gone]


def _add_specials(vocab: dict[int, bytes], special_tokens: Sequence[str]) -> dict[str, int]:
    """Give each special token an id, adding to ``vocab`` those that it lacks. Returns text -> id."""
    ids = {token: id for id, token in sorted(vocab.items())}  # of equal tokens the last one is the special one
    special_ids = {}
    for text in dict.fromkeys(special_tokens):
        token = text.encode()
        if not token:
            raise DataError("a special token is empty", hint="name a text, such as `<|endoftext|>`")
        if token not in ids:
            ids[token] = max(vocab, default=-1) + 1
            vocab[ids[token]] = token
        special_ids[text] = ids[token]
    return special_ids


def _index(vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]]) -> tuple[dict[int, int], Ranks]:
    """Return the ids of single bytes, and the merges in terms of ids. Raises DataError when a token is missing."""
    ids = {token: id for id, token in sorted(vocab.items(), reverse=True)}  # of equal tokens the first one is ordinary
    if not vocab:
        raise DataError("the vocabulary is empty", hint="learn one with `lfs tokenize`")
    negative = min(vocab)
    if negative < 0:
        raise DataError(f"the vocabulary has the id `{negative}`", hint="number the tokens from 0")
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in ids:
                raise DataError(
                    f"merge {rank + 1} needs the token {token!r}, which the vocabulary lacks",
                    hint="use the vocabulary and the merges of one tokenizer",
                )
        ranks.setdefault((ids[left], ids[right]), (rank, ids[left + right]))
    return {byte: ids[bytes([byte])] for byte in range(256) if bytes([byte]) in ids}, ranks

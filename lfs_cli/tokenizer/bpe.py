"""The tokenizer: text to ids and back.

Byte-level BPE knows 256 tokens from the start, one for each byte, and a list of merges that were learned in order
(`learn.py`). To encode a word, begin with its bytes; as long as two neighbours are a merge, join the pair that was
learned first. With the merges (h, e) and (l, l) and (he, ll):

    h e l l o  ->  he l l o  ->  he ll o  ->  hell o

Every text can be encoded, since every byte can, and decoding gives exactly the same bytes back. Special tokens, such as
`<|endoftext|>`, are found first and never split; nothing is merged across them. The rest is cut into words
(`split.py`), and each word is encoded alone: `merge_word` is the definition.

Two ways lead to the same ids. Plain Python with a dictionary of words that were met before serves short texts: it needs
no compiler, so that generating text starts at once. Compiled loops (`loops_encode.py`) serve longer ones.

Source: Gage, "A New Algorithm for Data Compression", 1994; Sennrich, Haddow & Birch, "Neural Machine Translation of
Rare Words with Subword Units", 2016 (arXiv:1508.07909). Bytes as the alphabet: Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lfs_cli.errors import DataError, did_you_mean
from lfs_cli.tokenizer import formats
from lfs_cli.tokenizer.blocks import Specials, blocks_of, read_blocks, reading, to_utf8, utf8_pieces
from lfs_cli.tokenizer.split import PATTERNS, Pattern, find_pattern

if TYPE_CHECKING:
    from lfs_cli.tokenizer.encoder import Encoder

COMPILED_BYTES = 8_000_000
"""Texts of at least so many bytes are worth the compiled loops, which take seconds to compile once on a machine."""

KEPT_BYTES = 1 << 19
"""The same where they were compiled before, and only have to be loaded."""

READY_BYTES = 1 << 11
"""The same once they are loaded in this process."""

LONG_WORD = 64
"""Bytes above which a word is encoded with a heap, so that time stays near-linear."""

REMEMBERED_WORDS = 1 << 16
"""Words whose ids are kept: nearly all words of a text, in about 16 MB."""

REMEMBERED_IN_STREAMS = 1 << 12
"""The same for `encode_iterable`, which promises less memory: the most frequent words, in some hundred kilobytes."""

Special = Literal["allow", "forbid", "ignore"] | Collection[str]
"""What to do with special tokens that a text contains (`Tokenizer.encode`)."""

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
        whole_words: Tokens that no merges lead to, but that stand for a word which is just them. Learned vocabularies
            have none; Llama 3's has some hundreds.

    Raises:
        DataError: When vocabulary and merges do not fit together, or a whole word is not in the vocabulary.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str | Pattern = "gpt2",
        whole_words: Collection[bytes] = (),
    ) -> None:
        self.vocab: dict[int, bytes] = {int(id): bytes(token) for id, token in vocab.items()}
        self.merges: list[tuple[bytes, bytes]] = [(bytes(left), bytes(right)) for left, right in merges]
        self.special_ids = _add_specials(self.vocab, special_tokens or ())
        self.special_tokens = tuple(self.special_ids)
        self._pattern = find_pattern(pattern) if isinstance(pattern, str) else pattern
        self._specials = Specials(self.special_tokens)
        self._special_bytes = {text.encode(): id for text, id in self.special_ids.items()}
        self._byte_ids, self._ranks = _index(self.vocab, self.merges)
        self.whole_words = tuple(bytes(word) for word in whole_words)
        self._whole_ids = _whole_ids(self.vocab, self.whole_words)
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
        vocab, merges, special_tokens, pattern, whole_words = formats.read(Path(path))
        return cls(vocab, merges, special_tokens, pattern=pattern, whole_words=whole_words)

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into ``folder``, in the format of Hugging Face's `tokenizers`, and return its path."""
        ignore_merges = bool(self.whole_words)
        return formats.write_huggingface(
            Path(folder), self.vocab, self.merges, self.special_ids, self._pattern, ignore_merges=ignore_merges
        )

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
        } | ({"whole_words": sorted(word.hex() for word in self.whole_words)} if self.whole_words else {})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, *, special: Special = "allow") -> list[int]:
        """Return the ids of ``text``. A lone surrogate, which UTF-8 cannot hold, is read as U+FFFD.

        >>> Tokenizer({id: bytes([id]) for id in range(256)}, []).encode("hé")
        [104, 195, 169]

        Args:
            text: What to encode.
            special: What to do with text that spells a special token. ``"allow"``: it becomes the token. ``"ignore"``:
                it is text like any other. ``"forbid"``: it is refused, for text that others wrote. A collection of
                special tokens: these are allowed, the others ignored. Where two begin at one place, the longest counts.

        Raises:
            DataError: For a byte that the vocabulary lacks, or a special token that is forbidden.
        """
        if self._is_worth_compiling(len(text)):
            return self.encode_array(text, special=special).tolist()
        return list(chain.from_iterable(self._encode_words(to_utf8(text), self._allowed([text], special))))

    def encode_array(self, text: str | bytes, *, threads: int = 1, special: Special = "allow") -> np.ndarray:
        """Return the ids of ``text`` as an array, which is many times as fast as a list for long texts.

        Args:
            text: What to encode; bytes are UTF-8, of which what is not valid is encoded too (`encode_file`).
            threads: How many threads share the work; the ids are the same.
            special: As for `encode`.

        Returns:
            (tokens,), uint16, or uint32 for a vocabulary of more than 65,536.
        """
        return self.encode_arrays([text], threads=threads, special=special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, threads: int | None = None, special: Special = "allow"
    ) -> list[list[int]]:
        """Return the ids of each text; the arguments are those of `encode_arrays`, with all cores by default."""
        ids, ends = self.encode_arrays(texts, threads=threads or os.cpu_count() or 1, special=special)
        starts = [0, *ends[:-1].tolist()]
        return [ids[start:end].tolist() for start, end in zip(starts, ends.tolist(), strict=False)]

    def encode_arrays(
        self, texts: Sequence[str | bytes], *, threads: int = 1, special: Special = "allow"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of many texts in one array, the form in which nothing is made for each of them.

        Args:
            texts: What to encode, each alone; bytes are UTF-8.
            threads: How many threads share the work; the ids are the same.
            special: As for `encode`.

        Returns:
            The ids, (tokens,), uint16 or uint32; and where those of each text end, (texts,), int64.
        """
        allowed = self._allowed(texts, special)
        if self._is_worth_compiling(sum(map(len, texts))):
            return self._compiled().encode_texts(texts, allowed, self._special_bytes, threads)
        in_bytes = (to_utf8(text) if isinstance(text, str) else text for text in texts)
        each = [list(chain.from_iterable(self._encode_words(data, allowed))) for data in in_bytes]
        ends = np.cumsum([len(ids) for ids in each], dtype=np.int64)
        return np.fromiter(chain.from_iterable(each), self._dtype, int(ends[-1]) if each else 0), ends

    def encode_with_offsets(self, text: str, *, special: Special = "allow") -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of ``text``, and for each the part of the text that it stands for.

        The part is (start, stop) in characters: ``text[start:stop]``. A token of some bytes of a character stands for
        the whole character, so that neighbours may overlap.

        >>> Tokenizer({id: bytes([id]) for id in range(256)}, []).encode_with_offsets("aé")
        ([97, 195, 169], [(0, 1), (1, 2), (1, 2)])
        """
        ids = self.encode(text, special=special)
        sizes = np.array([len(self.vocab[id]) for id in ids], np.int64)
        ends = np.cumsum(sizes)
        characters = characters_of(text)
        starts, stops = characters[0][ends - sizes], characters[1][ends - 1]
        return ids, list(zip(starts.tolist(), stops.tolist(), strict=True))

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """Yield the ids of the text that ``texts`` make together, such as the lines of a file.

        Ids come while the text does, as soon as what follows cannot change them; memory stays flat. Only a stretch
        in which words cannot end, such as a word of megabytes, is waited for. Special tokens are allowed. It takes no
        compiled loops, whose tables are not so small: for a file `encode_file` is many times as fast.
        """
        for block in blocks_of(utf8_pieces(texts), self._pattern, self._specials, least=0):
            yield from chain.from_iterable(self._encode_words(block, self._specials, REMEMBERED_IN_STREAMS))

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
        path, threads = Path(path), workers or os.cpu_count() or 1
        with reading(path):
            total = path.stat().st_size
        if self._is_worth_compiling(total):
            encoded = self._compiled().encode_file(path, self._specials, self._special_bytes, threads)
        else:
            blocks = read_blocks(path, self._pattern, self._specials)
            whole = ((block.size, bytes(memoryview(block.data)[: block.size])) for block in blocks)
            encoded = (
                (size, np.fromiter(chain.from_iterable(self._encode_words(data, self._specials)), self._dtype))
                for size, data in whole
            )
        done = 0
        for size, ids in encoded:
            done += size
            if on_progress is not None:
                on_progress(done, total)
            yield ids

    def prepare(self, threads: int = 1) -> None:
        """Compile or load the compiled loops and fill their tables now, for so many threads.

        Without it the first long text does so. Nothing happens for a pattern that has none.
        """
        if self._can_compile:
            self._compiled().prepare(threads)

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

    def _allowed(self, texts: Iterable[str | bytes], special: Special) -> Specials:
        """Return what finds the special tokens that are allowed. Raises DataError for one in ``texts`` that is not."""
        if special == "allow":
            return self._specials
        if special == "ignore":
            return _NO_SPECIALS
        if special == "forbid":
            for text in texts:
                self._refuse_specials(text)
            return _NO_SPECIALS
        for token in special:
            if token not in self.special_ids:
                raise DataError(f"`{token}` is no special token", hint=did_you_mean(token, self.special_tokens))
        return Specials(special)

    def _refuse_specials(self, text: str | bytes) -> None:
        if not self._specials.may_be_in(text):
            return
        data = to_utf8(text) if isinstance(text, str) else text
        for start, end in self._specials.spans(data):
            place = len(data[:start].decode("utf-8", "replace"))
            raise DataError(
                f"the text has the special token `{data[start:end].decode()}` at character {place:,}",
                hint='pass `special="ignore"` to read it as text, or `special="allow"` to let it be the token',
            )

    def _encode_words(self, data: bytes, specials: Specials, remembered: int = REMEMBERED_WORDS) -> Iterator[list[int]]:
        """Yield the ids of each word of UTF-8 ``data``, in plain Python. Bad bytes pass as surrogates (PEP 383)."""
        words = self._words
        for start, end, special in specials.split(data):
            if special is not None:
                yield [self._special_bytes[special]]
                continue
            for word in self._pattern.split(data[start:end].decode("utf-8", "surrogateescape")):
                ids = words.get(word)
                if ids is None:
                    ids = self._whole_ids.get(word) or merge_ids(self._spell(word), self._ranks)
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

    @property
    def _dtype(self) -> type[np.unsignedinteger]:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def _can_compile(self) -> bool:
        """Whether the compiled loops can encode with this vocabulary and pattern."""
        fits = max(self.vocab) < 1 << 20 and len(self.merges) < (1 << 24) - 1
        has_loops = self._pattern.scanner is not None and len(self._byte_ids) == 256
        return has_loops and fits and not self.whole_words  # the loops know nothing but merges

    def _is_worth_compiling(self, size: int) -> bool:
        if (size < READY_BYTES and COMPILED_BYTES) or not self._can_compile:
            return False
        if self._encoder is not None or size >= COMPILED_BYTES:
            return True
        return size >= KEPT_BYTES and not will_compile("encoding", COMPILED_BYTES, self.pattern)

    def _compiled(self) -> "Encoder":
        if self._encoder is None:
            from lfs_cli.tokenizer.encoder import Encoder

            special = set(self.special_ids.values())
            tokens = {id: token for id, token in self.vocab.items() if id not in special}
            byte_ids = [self._byte_ids[byte] for byte in range(256)]
            self._encoder = Encoder(byte_ids, self._ranks, tokens, self._pattern, self._dtype)
        return self._encoder


_NO_SPECIALS = Specials(())


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


def characters_of(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return for each byte of ``text`` in UTF-8 where its character begins and ends, counted in characters.

    >>> [found.tolist() for found in characters_of("aé")]
    [[0, 1, 1], [1, 2, 2]]
    """
    data = np.frombuffer(to_utf8(text), np.uint8)
    sizes = np.ones(np.count_nonzero(data & 0xC0 != 0x80), np.int64)
    if len(sizes) < len(text):  # pairs of surrogates, which count as two characters in a `str` and are one in UTF-8
        units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        is_high = (units >= 0xD800) & (units < 0xDC00)
        is_second = np.zeros(len(units), bool)
        is_second[1:] = is_high[:-1] & (units[1:] >= 0xDC00) & (units[1:] < 0xE000)
        sizes = np.diff(np.append(np.flatnonzero(~is_second), len(units)))
    number = np.cumsum(data & 0xC0 != 0x80) - 1
    ends = np.cumsum(sizes)
    return (ends - sizes)[number], ends[number]


def will_compile(task: str, size: int, pattern: str) -> bool:
    """Return whether work on a text of ``size`` bytes begins with seconds of compiling, as it does once on a machine.

    Args:
        task: ``"learning"`` or ``"encoding"``.
        size: Bytes of the text.
        pattern: Name of its pattern.
    """
    scanner = PATTERNS[pattern].scanner if pattern in PATTERNS else None
    if size < COMPILED_BYTES or (task == "encoding" and scanner is None):
        return False
    from lfs_cli.tokenizer import machine_code

    return not machine_code.is_ready(task, scanner)


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


def _whole_ids(vocab: Mapping[int, bytes], words: Collection[bytes]) -> dict[str, list[int]]:
    """Return the ids of words that are tokens without merges. Raises DataError for one that is no token."""
    ids = {token: id for id, token in sorted(vocab.items(), reverse=True)} if words else {}
    for word in words:
        if word not in ids:
            raise DataError(f"the whole word {word!r} is not in the vocabulary", hint="leave it out")
    return {word.decode("utf-8", "surrogateescape"): [ids[word]] for word in words}


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

"""Encoding with the compiled loops: `Encoder` is the fast form of `bpe.merge_word`, for texts and files, in threads."""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer import machine_code
from lfs_cli.tokenizer.arrays import (
    ARENA_BYTES,
    LONG_BITS,
    MIDDLE_BITS,
    SHORT_BITS,
    Desk,
    find_in_rows,
    find_pairs,
    grown,
    memory,
    text_at,
)
from lfs_cli.tokenizer.blocks import Block, Specials, read_blocks
from lfs_cli.tokenizer.desk import address, aligned_zeros
from lfs_cli.tokenizer.split import Pattern

POOL_IDS = 1 << 16, 1 << 22
"""Ids of words that have many, at first and at most."""

PIECES_A_THREAD = 8
"""Pieces of a long text for each thread, so that none waits long for another that has got the slow ones."""

PIECE_BYTES = 1 << 16, 1 << 20
"""Bytes of such a piece at least and at most."""

GROUP_BYTES = 1 << 22
"""Bytes of the texts that a thread encodes before it takes others, at most."""

KEPT_IDS_BYTES = 1 << 26
"""Largest memory for ids that a desk keeps for the next text."""

ROOM = 64
"""Ids that a loop may write too much."""


class Encoder:
    """Encodes texts with `loops_encode.encode_texts`, in any number of threads.

    Args:
        byte_ids: Id of each of the 256 bytes.
        ranks: Pair of ids -> (place in the list of merges, id of the merged token).
        tokens: Id -> bytes of its token, without special tokens.
        pattern: A pattern with a scanner.
        dtype: Type of the ids, uint16 or uint32.
    """

    def __init__(
        self,
        byte_ids: Sequence[int],
        ranks: Mapping[tuple[int, int], tuple[int, int]],
        tokens: Mapping[int, bytes],
        pattern: Pattern,
        dtype: type[np.unsignedinteger],
    ) -> None:
        assert pattern.scanner is not None
        machine_code.announce("encoding", pattern.scanner)
        self.dtype = np.dtype(dtype)
        self.scanner = pattern.scanner
        self._pattern = pattern
        self._idle: SimpleQueue[_EncodingDesk] = SimpleQueue()
        count = len(ranks)
        pairs = np.fromiter(chain.from_iterable(ranks), np.int64, 2 * count).reshape(-1, 2)
        merged = np.fromiter(chain.from_iterable(ranks.values()), np.int64, 2 * count).reshape(-1, 2)
        merged_ids = np.zeros(int(merged[:, 0].max(initial=0)) + 1, np.uint32)
        merged_ids[merged[:, 0]] = merged[:, 1]
        sizes = np.fromiter(map(len, tokens.values()), np.int64, len(tokens))
        ids = np.fromiter(tokens, np.int64, len(tokens))
        token_sizes = np.zeros(int(ids.max()) + 1, np.uint32)
        token_sizes[ids] = sizes
        self.pair_bits = max(8, (2 * count + 1).bit_length())
        self.shared = {
            d.BYTE_IDS: np.array(byte_ids, np.uint32),
            d.MERGED_IDS: merged_ids,
            d.TOKEN_SIZES: token_sizes,
            d.BYTE_PAIRS: _byte_pairs(byte_ids, pairs, merged[:, 0], len(token_sizes)),
        }
        self.shared[d.PAIRS], self.shared[d.PAIR_FILTER] = _fill_pairs(pairs, merged[:, 0], self.pair_bits)
        self._letters = np.frombuffer(b"".join(tokens.values()) + bytes(d.PAD), np.uint8)
        starts = address(self._letters) + np.cumsum(sizes) - sizes
        are_words = np.flatnonzero((sizes > 1) & (sizes < 32))
        self.seeds = np.stack([starts, sizes], axis=1)[are_words]
        short = int(np.count_nonzero(sizes[are_words] < 16))
        self.first_bits = [
            max(SHORT_BITS[0], (3 * short).bit_length()),
            max(MIDDLE_BITS[0], (3 * (len(are_words) - short)).bit_length()),
            LONG_BITS[0],
        ]

    def prepare(self, threads: int) -> None:
        """Make the desks for so many threads now, so that the first text is encoded as fast as others."""
        for desk in [self._desk() for _ in range(threads)]:
            self._idle.put(desk)

    def encode_texts(
        self, texts: Sequence[str | bytes], specials: Specials, special_ids: Mapping[bytes, int], threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of many texts, one after another, and where those of each end.

        Args:
            texts: Texts, or their bytes as UTF-8.
            specials: Finds the special tokens.
            special_ids: Id of each special token.
            threads: How many share the work.
        """
        found = [text_at(text) for text in texts]  # the third of each keeps the memory until the end
        rows = np.array([(at, size) for at, size, _ in found], np.int64).reshape(-1, 2)
        last_rows = np.arange(1, len(rows) + 1)
        spans = list(self._specials_in(rows, specials))
        piece = None
        if threads > 1:
            piece = int(np.clip(rows[:, 1].sum() // (PIECES_A_THREAD * threads), *PIECE_BYTES))
        if spans or (piece is not None and 2 * rows[:, 1].max(initial=0) > 3 * piece):
            rows, last_rows = self._divided(rows, spans, special_ids, piece)
        ids, ends = self._encode_rows(rows, threads)
        return ids, np.concatenate([np.zeros(1, np.int64), ends])[last_rows]

    def _specials_in(self, rows: np.ndarray, specials: Specials) -> Iterator[tuple[int, int, bytes]]:
        """Yield (number of the text, offset, special token), in order."""
        if not specials.longest:
            return
        if len(specials.start) < 2:
            for i, (at, size) in enumerate(rows.tolist()):
                data = memory(at, size)
                yield from ((i, start, bytes(data[start:end])) for start, end in specials.spans(data))
            return
        last = (0, 0)
        for i, offset in find_in_rows(rows, specials.start[:2]):
            if (i, offset) >= last:
                at, size = rows[i].tolist()
                token = specials.match(ctypes.string_at(at + offset, min(specials.longest, size - offset)))
                if token is not None:
                    yield i, offset, token
                    last = (i, offset + len(token))

    def _divided(
        self,
        rows: np.ndarray,
        spans: Sequence[tuple[int, int, bytes]],
        special_ids: Mapping[bytes, int],
        piece: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return rows for special tokens and pieces of what is between them; and where the rows of each text end."""
        divided: list[tuple[int, int]] = []
        last_rows, waiting = [], deque(spans)
        for i, (at, size) in enumerate(rows.tolist()):
            start = 0
            while waiting and waiting[0][0] == i:
                _, offset, token = waiting.popleft()
                divided += self._pieces(at + start, offset - start, piece)
                divided.append((special_ids[token], -1))
                start = offset + len(token)
            divided += self._pieces(at + start, size - start, piece)
            last_rows.append(len(divided))
        return np.array(divided, np.int64).reshape(-1, 2), np.array(last_rows, np.int64)

    def _pieces(self, at: int, size: int, piece: int | None) -> Iterator[tuple[int, int]]:
        """Yield the address and the bytes of pieces of a text, cut where no word changes."""
        if piece is not None and 2 * size > 3 * piece:
            data, start, wanted = memory(at, size), 0, piece
            while 2 * wanted + piece < 2 * size:
                cut = self._pattern.find_cut(data, wanted, start + 1)
                if cut:
                    yield at + start, cut - start
                    start = cut
                wanted += piece
            at, size = at + start, size - start
        if size:
            yield at, size

    def _encode_rows(self, rows: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `encode` does, with the work shared."""
        if threads == 1 or len(rows) == 1:
            return self.encode(rows)
        before = np.cumsum([0, *_room(rows)])
        groups = max(PIECES_A_THREAD * threads, int(before[-1]) // GROUP_BYTES)
        cuts = np.searchsorted(before, (np.arange(groups) - 0.5) / groups * before[-1]).tolist()
        cuts.append(len(rows))
        ends = np.empty(len(rows), np.int64)
        waiting, parts = deque(enumerate(pairwise(cuts))), [np.empty(0, self.dtype)] * groups
        desks: list[_EncodingDesk] = []

        def work() -> None:
            desk, used = self._desk(), 0
            while waiting:
                try:
                    number, (first, last) = waiting.popleft()
                except IndexError:  # another thread was faster
                    break
                room = int(before[last] - before[first]) + ROOM
                if used + room > len(desk.ids):
                    desk.ids, used = np.empty(max(room, int(before[-1]) // threads), self.dtype), 0
                count = desk.encode(rows[first:last], desk.ids[used:], ends[first:last])
                parts[number] = desk.ids[used : used + count]
                used += count
            desks.append(desk)

        def place(first: int) -> None:
            for start, part in zip(starts[first:-1:threads], parts[first::threads], strict=True):
                ids[start : start + len(part)] = part

        with ThreadPoolExecutor(threads - 1) as pool:
            _call_all(pool, [work] * threads)
            starts = np.cumsum([0, *map(len, parts)]).tolist()
            ids = np.empty(starts[-1], self.dtype)
            _call_all(pool, [partial(place, first) for first in range(threads)])
        for (first, last), start in zip(pairwise(cuts), starts, strict=False):
            ends[first:last] += start
        for desk in desks:
            self._put_back(desk)
        return ids, ends

    def encode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of texts, one after another, and where the ids of each end.

        Args:
            rows: (texts, 2), int64: the address and the bytes of each text, or the id of a special token and -1. It is
                changed.
        """
        ids, ends = np.empty(int(_room(rows).sum()) + ROOM, self.dtype), np.empty(len(rows), np.int64)
        desk = self._desk()
        ids.resize(desk.encode(rows, ids, ends), refcheck=False)
        self._idle.put(desk)
        return ids, ends

    def encode_part(self, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the ids of texts, and write the ends of each, through memory that is used again and again."""
        desk = self._desk()
        room = int(_room(rows).sum()) + ROOM
        if len(desk.ids) < room:
            desk.ids = np.empty(room, self.dtype)
        ids = desk.ids[: desk.encode(rows, desk.ids, ends)].copy()
        self._put_back(desk)
        return ids

    def encode_file(
        self, path: Path, specials: Specials, special_ids: Mapping[bytes, int], threads: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the bytes of each block of a file and its ids, in order. At most ``threads`` + 2 are in memory.

        Args:
            path: Text in UTF-8.
            specials: Finds the special tokens.
            special_ids: Id of each special token.
            threads: How many share the work.
        """
        spare: list[bytearray] = []
        blocks = read_blocks(path, self._pattern, specials, spare, find_pairs)

        def work(block: Block) -> tuple[int, np.ndarray]:
            view = np.frombuffer(block.data, np.uint8)
            base = address(view)
            rows = [
                (base + start, end - start) if special is None else (special_ids[special], -1)
                for start, end, special in block.split()
            ]
            ids = self.encode_part(np.array(rows, np.int64), np.empty(len(rows), np.int64))
            spare.append(block.data)
            return block.size, ids

        if threads == 1:
            yield from map(work, blocks)
            return
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[tuple[int, np.ndarray]]] = deque()
            for block in blocks:
                ahead.append(pool.submit(work, block))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _put_back(self, desk: "_EncodingDesk") -> None:
        """Keep a desk for the next text, without memory that few texts need."""
        if desk.ids.nbytes > KEPT_IDS_BYTES:
            desk.ids = np.empty(0, self.dtype)
        self._idle.put(desk)

    def _desk(self) -> "_EncodingDesk":
        try:
            return self._idle.get_nowait()
        except Empty:
            return _EncodingDesk(self)


def _call_all(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at once, the first of them in this thread, and wait for them."""
    others = [pool.submit(call) for call in calls[1:]]
    calls[0]()
    for other in others:
        other.result()


def _room(rows: np.ndarray) -> np.ndarray:
    """Return how many ids each text has at most: one for a byte or a special token."""
    return np.where(rows[:, 1] < 0, 1, rows[:, 1])


class _EncodingDesk(Desk):
    """A desk with the merges of an `Encoder`, on which the tokens are the first words that are known."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._loop = machine_code.load("encode_texts")
        self.ids = np.empty(0, encoder.dtype)
        super().__init__(encoder.scanner, encoder.first_bits)

    def clear(self) -> None:
        super().clear()
        for place, array in self._encoder.shared.items():
            self.put(place, array)
        self.fields[d.PAIR_BITS] = self._encoder.pair_bits
        self.fields[d.ID_SHIFT] = self._encoder.dtype.itemsize.bit_length() - 1
        self.put(d.TOKENS, np.zeros(80, np.uint32))
        self.put(d.RANKS, np.zeros(80, np.uint32))
        self._set_scratch(1 << 16)
        self._set_pool(np.zeros(POOL_IDS[0], self._encoder.dtype))
        self.fields[d.POOL_USED] = 0
        self._remember_tokens()

    def encode(self, texts: np.ndarray, ids: np.ndarray, ends: np.ndarray) -> int:
        """Encode texts into ``ids`` and ``ends`` (see `Encoder.encode`). Returns how many ids there are."""
        self._begin(texts, ids)
        self.fields[d.ENDS] = address(ends)
        while self._loop(self.address):
            self._make_room()
        self._make_room()
        return int(self.fields[d.WRITTEN])

    def _begin(self, texts: np.ndarray, ids: np.ndarray) -> None:
        self.fields[[d.TEXTS, d.TEXT_COUNT, d.TEXT]] = address(texts), len(texts), 0
        self.fields[[d.IDS, d.WRITTEN]] = address(ids), 0

    def _remember_tokens(self) -> None:
        """Enter the tokens, most of which are words, in the order of their ids: the most frequent ones first."""
        encoder, ids = self._encoder, np.empty(1024 + ROOM, self._encoder.dtype)
        saved = self.fields.copy()
        self._begin(encoder.seeds, ids)
        add = machine_code.load("add_words")
        while add(self.address):
            self._make_room(is_bounded=False)
        for place in (d.TEXTS, d.TEXT_COUNT, d.TEXT, d.IDS, d.WRITTEN):
            self.fields[place] = saved[place]

    def _make_room(self, *, is_bounded: bool = True) -> None:
        if self.fields[d.SCRATCH_NEEDED]:
            self._set_scratch(int(self.fields[d.SCRATCH_NEEDED]))
            return
        if not self.fields[d.FULL]:
            if self.fields[d.SCRATCH_SIZE] > 1 << 24:
                self._set_scratch(1 << 16)
            return
        most = [bits[1] for bits in (SHORT_BITS, MIDDLE_BITS, LONG_BITS)] if is_bounded else (40, 40, 40)
        pool, used = self.array(d.POOL), int(self.fields[d.POOL_USED])
        is_large = len(pool) >= POOL_IDS[1] and used + 2048 > len(pool) and is_bounded
        is_large |= self.fields[d.ARENA_USED] + 2048 > ARENA_BYTES[1] and is_bounded
        if is_large or not self.grow_tables(most, 2048):
            self.clear()
            return
        if used + 2048 > len(pool):
            self._set_pool(grown(pool, 0))

    def _set_pool(self, pool: np.ndarray) -> None:
        self.put(d.POOL, pool)
        self.fields[d.POOL_SIZE] = len(pool)

    def _set_scratch(self, size: int) -> None:
        self.put(d.SCRATCH, np.empty(size, np.uint8))
        self.fields[[d.SCRATCH_SIZE, d.SCRATCH_NEEDED]] = size, 0


def _byte_pairs(byte_ids: Sequence[int], pairs: np.ndarray, ranks: np.ndarray, ids: int) -> np.ndarray:
    """Return the rank of the merge of each two bytes, 0xFFFFFFFF where there is none: (65536,), uint32."""
    byte_of = np.full(ids, -1, np.int64)
    byte_of[list(byte_ids)] = np.arange(256)
    left, right = byte_of[pairs[:, 0]], byte_of[pairs[:, 1]]
    is_first = (left >= 0) & (right >= 0)
    table = np.full(1 << 16, 0xFFFFFFFF, np.uint32)
    table[left[is_first] << 8 | right[is_first]] = ranks[is_first]
    return table


def _fill_pairs(pairs: np.ndarray, ranks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the table of merges that the loops use, and the filter before it."""
    rows = np.concatenate([pairs, ranks[:, None]], axis=1).astype(np.uint32)
    table, bits_of_hashes = aligned_zeros(8 << bits), np.zeros(d.FILTER_BYTES, np.uint8)
    table[:] = 255
    desk = d.new_desk()
    desk[[d.PAIRS, d.PAIR_BITS, d.PAIR_FILTER]] = address(table), bits, address(bits_of_hashes)
    desk[[d.PAIR_LIST, d.PAIR_COUNT]] = address(rows), len(rows)
    machine_code.load("fill_pairs")(address(desk))
    return table, bits_of_hashes

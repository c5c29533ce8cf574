"""Batches: windows of tokens, and the same windows moved by one as what to predict.

    tokens    the  cat sat on
    targets   cat  sat on  the

Training takes them in one of two orders:

    shuffled   every window once before any comes again; each reading has an order of its own, and begins elsewhere,
               for which less than two windows at the ends are left out, other ones each time
    random     drawn with replacement: when as many tokens were read as there are, 37 % of the text has not been seen

Which ones is a pure function of (seed, step, row), computed with a counter-based generator instead of one that is
carried along: to resume at step 500 is to ask for step 500, and each rank takes its rows of the one global batch
without a word to the others. The order of a reading is not kept anywhere either: a Feistel network turns the number of
a window in its reading into its place in the text. It permutes 2^n numbers, so what lies beyond the last window goes
through it again, until it does not.

Sources: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox, the counter-based generator).
         Luby & Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988 (the network);
         Black & Rogaway, "Ciphers with arbitrary finite domains", 2002, section 4 (going through it again).
         Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014, figure 17 (its function).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import ConfigError, DataError

ROUNDS = {"few": 16, "many": 6}
"""Of the Feistel network, an even number. Four hide a permutation of many numbers; with few, whose halves have two bits
or three, it takes more until all orders are about equally likely."""

FEW = 1_024
"""Windows of a text that are few."""

COPIED_TOKENS = 1 << 24
"""Tokens that `BatchesOnDevice` copies at a time."""


class Batches:
    """Windows of ``context_length`` tokens with their targets, for one rank, on the CPU.

    Args:
        tokens: The text to draw from.
        batch_size: Windows in one step, over all ranks.
        context_length: Tokens in a window (T).
        seed: Same seed, same windows.
        order: In which a step's windows come.
        rank: Whose rows to return.
        ranks: Number of processes that share each batch.

    Raises:
        ConfigError: When ``batch_size`` is not a multiple of ``ranks``.
        DataError: When the text is shorter than one window and its last target.
        ValueError: For an order of another name.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        batch_size: int,
        context_length: int,
        seed: int,
        order: Literal["shuffled", "random"] = "random",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise ConfigError(
                f"`batch_size` ({batch_size}) is not a multiple of the {ranks} processes that share it",
                hint=f"set `batch_size` to {-(-batch_size // ranks) * ranks}",
            )
        if order not in ("shuffled", "random"):
            raise ValueError(f"`order` must be `shuffled` or `random`, and is `{order}`")
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.order = order
        self.rank = rank
        self.ranks = ranks
        self.starts = count_starts(tokens, context_length)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of the batch of ``step``, from 0.

        Returns:
            tokens_BT and targets_BT, int64 on the CPU, where B is ``batch_size / ranks``.
        """
        return self.windows(self._share(self._shuffled(step) if self.order == "shuffled" else self._drawn(step)))

    def _drawn(self, step: int) -> np.ndarray:
        """Return where the windows of a batch start, (B,), drawn uniformly and with replacement."""
        generator = np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64))
        # The remainder favours small starts by less than starts / 2^64. NumPy promises that these raw numbers never
        # change between its versions, which it does not for `Generator.integers`.
        return generator.random_raw(self.batch_size) % np.uint64(self.starts)

    def _shuffled(self, step: int) -> np.ndarray:
        """Return where the windows of a batch start, (B,), each once in a reading of the text."""
        windows = max(1, self.starts // self.context_length)
        room = self.starts - (windows - 1) * self.context_length  # for where the first one starts
        first = step * self.batch_size
        readings = range(first // windows, (first + self.batch_size - 1) // windows + 1)
        starts: list[np.ndarray] = []
        for reading in readings:
            begin, end = max(first, reading * windows), min(first + self.batch_size, (reading + 1) * windows)
            generator = np.random.Philox(key=np.array([self.seed, reading], dtype=np.uint64))
            begins_at, *keys = generator.random_raw(1 + ROUNDS["few" if windows <= FEW else "many"])
            numbers = np.arange(begin - reading * windows, end - reading * windows, dtype=np.uint64)
            places = permuted(numbers, windows, keys)
            starts.append(begins_at % np.uint64(room) + places * np.uint64(self.context_length))
        return np.concatenate(starts)

    def sequential(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield windows that do not overlap, in order: the same ones each time, for validation.

        They are as many whole batches as the text has, at most ``batches``, spread evenly over it. A text too short
        for one whole batch gives a smaller one, of which a rank may get no row and then yields nothing.

        Yields:
            tokens_BT and targets_BT, int64 on the CPU: this rank's rows.
        """
        windows = 1 + (self.starts - 1) // self.context_length
        taken = min(batches * self.batch_size, windows)
        taken -= taken % self.batch_size if taken > self.batch_size else 0
        starts = np.arange(taken) * windows // taken * self.context_length
        for first in range(0, taken, self.batch_size):
            rows = self._share(starts[first : first + self.batch_size])
            if len(rows):
                yield self.windows(rows)

    def windows(self, starts_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the windows at ``starts_B`` and the same ones a token later, as int64 (B, T) each."""
        return gather(self.tokens, starts_B, self.context_length)

    def _share(self, rows: np.ndarray) -> np.ndarray:
        return rows[len(rows) * self.rank // self.ranks : len(rows) * (self.rank + 1) // self.ranks]


class BatchesOnDevice(Batches):
    """The same windows, cut on the device from a copy of the whole text that lies there.

    A step then sends the device the starts of its windows, B numbers, and the host touches no token.

    Args:
        batches: Which windows.
        device: Where the text goes, 2 or 4 bytes a token, and where the windows are.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.__dict__.update(batches.__dict__)
        self._is_short = self.tokens.dtype.itemsize == 2
        # Kept as signed integers, the only ones of two bytes that every device can gather
        kept = torch.int16 if self._is_short else torch.int32
        self._ids = torch.empty(len(self.tokens), dtype=kept, device=device)
        for start in range(0, len(self.tokens), COPIED_TOKENS):
            part = np.array(self.tokens[start : start + COPIED_TOKENS])  # a copy: torch wants to be able to write
            self._ids[start : start + len(part)] = torch.from_numpy(part.view(f"i{part.itemsize}"))
        self._steps_T = torch.arange(self.context_length + 1, device=device)

    @staticmethod
    def bytes_of(tokens: Tokens) -> int:
        """Return the bytes of ``tokens`` on the device."""
        return len(tokens) * tokens.dtype.itemsize

    def windows(self, starts_B: np.ndarray) -> tuple[Tensor, Tensor]:
        starts = torch.from_numpy(starts_B.astype(np.int64))
        if self._ids.is_cuda:
            starts = starts.pin_memory().to(self._ids.device, non_blocking=True)
        window = self._ids[starts.to(self._ids.device)[:, None] + self._steps_T].long()
        if self._is_short:
            window &= 0xFFFF  # ids from 32,768 on are negative as int16
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


class BatchesAhead(Batches):
    """The same batches, of which a thread reads the next one while the last is worked on: for texts on the disk.

    Args:
        batches: Which batches.
        pins: Put them where a GPU reads by itself, so that nobody waits for the copy.
    """

    def __init__(self, batches: Batches, *, pins: bool) -> None:
        self.__dict__.update(batches.__dict__)
        self._pins = pins
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        if self._ahead is not None and self._ahead[0] == step:
            asked = self._ahead[1]
        else:  # the first one, or one that nobody could foresee
            asked = self._reader.submit(self._read, step)
        self._ahead = step + 1, self._reader.submit(self._read, step + 1)
        return asked.result()

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        tokens_BT, targets_BT = super().at(step)
        return (tokens_BT.pin_memory(), targets_BT.pin_memory()) if self._pins else (tokens_BT, targets_BT)


def permuted(numbers: np.ndarray, count: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """Return what a permutation of 0 to ``count`` - 1 makes of ``numbers``, another one for other ``keys``.

    Args:
        numbers: (N,), uint64, below ``count``.
        count: How many numbers there are.
        keys: One for each round of the network, of which there are an even number.

    Returns:
        (N,), uint64, below ``count``.
    """
    bits = max(2, (count - 1).bit_length())
    halves = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    numbers = numbers.copy()
    beyond = np.ones(len(numbers), dtype=bool)
    while beyond.any():
        (high, low), x = halves, numbers[beyond]
        for key in keys:  # the lower half changes the upper one, and goes above it
            left, right = x >> low, x & ((np.uint64(1) << low) - np.uint64(1))
            x = right << high | (left ^ (_mixed(right ^ key) & ((np.uint64(1) << high) - np.uint64(1))))
            high, low = low, high
        numbers[beyond] = x
        beyond = numbers >= count
    return numbers


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return numbers of which each bit depends on all of ``x``, (N,), uint64; products lose what is beyond 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_batch(
    tokens: np.ndarray | Tokens, batch_size: int, context_length: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Return random windows of ``tokens`` with their targets, drawn by torch's global generator.

    Args:
        tokens: Ids in one dimension. A memory-mapped array is read only where the windows are.
        batch_size: Windows (B).
        context_length: Tokens in a window (T).
        device: Where the result goes.

    Returns:
        tokens_BT and targets_BT, int64 on ``device``.

    Raises:
        DataError: When ``tokens`` is shorter than one window and its last target.

    Source: Stanford CS336, assignment 1, `get_batch`.
    """
    tokens = Tokens.of(tokens)
    starts_B = torch.randint(count_starts(tokens, context_length), (batch_size,)).numpy()
    tokens_BT, targets_BT = gather(tokens, starts_B, context_length)
    return tokens_BT.to(device), targets_BT.to(device)


def count_starts(tokens: Tokens, context_length: int) -> int:
    """Return how many windows of ``context_length`` the text has, wherever they start.

    Raises:
        DataError: When there is none, since each needs one more token than its length, as its last target.
    """
    starts = len(tokens) - context_length
    if starts < 1:
        longest = len(tokens) - 1
        shorter = f", or a shorter context: `--set model.context_length={longest}`" if longest > 1 else ""
        raise DataError(
            f"{tokens.source} has {len(tokens):,} tokens, and a context of {context_length:,} needs at least "
            f"{context_length + 1:,}",
            hint=f"use a longer text{shorter}",
        )
    return starts


def gather(tokens: Tokens, starts_B: np.ndarray, context_length: int) -> tuple[Tensor, Tensor]:
    """Return the windows at ``starts_B`` and the same ones a token later, as int64 (B, T) each."""
    tokens_BT = np.empty((len(starts_B), context_length), dtype=np.int64)
    targets_BT = np.empty_like(tokens_BT)
    for row, start in enumerate(starts_B.tolist()):
        window = tokens[start : start + context_length + 1]
        tokens_BT[row] = window[:-1]
        targets_BT[row] = window[1:]
    return torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)


def document_lengths(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """Return the cumulative lengths of the documents in a batch, row after row, as attention takes them.

    A document begins at the start of a row and behind each end of text. Their number is not asked for, which on a GPU
    would mean to wait for it: there is room for one at each position, and those that are left have no length.

    >>> document_lengths(torch.tensor([[5, 9, 0], [7, 0, 8]]), end_of_text=0)
    tensor([0, 3, 5, 6, 6, 6, 6])

    Args:
        tokens_BT: (B, T), integers.
        end_of_text: Token that is the last of its document.

    Returns:
        (B T + 1,), int64, on the device of the tokens; not falling.
    """
    starts_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    starts_BT[:, 1:] = tokens_BT[:, :-1] == end_of_text
    total = tokens_BT.numel()
    positions = torch.arange(total, device=tokens_BT.device).masked_fill(~starts_BT.flatten(), total)
    return torch.cat([positions.sort().values, positions.new_full((1,), total)])

"""Batches: windows of tokens, and the same windows moved by one as what to predict.

    tokens    the  cat sat on
    targets   cat  sat on  the

Training draws windows at random. Which ones is a pure function of (seed, step, row), computed with a counter-based
generator instead of one that is carried along: to resume at step 500 is to ask for step 500, and each rank takes its
rows of the one global batch without a word to the others.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox, the counter-based generator).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import ConfigError, DataError


class Batches:
    """Windows of ``context_length`` tokens with their targets, for one rank.

    Args:
        tokens: The text to draw from.
        batch_size: Windows in one step, over all ranks.
        context_length: Tokens in a window (T).
        seed: Same seed, same windows.
        rank: Whose rows to return.
        ranks: Number of processes that share each batch.

    Raises:
        ConfigError: When ``batch_size`` is not a multiple of ``ranks``.
        DataError: When the text is shorter than one window and its last target.
    """

    def __init__(
        self, tokens: Tokens, *, batch_size: int, context_length: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if batch_size % ranks:
            raise ConfigError(
                f"`batch_size` ({batch_size}) is not a multiple of the {ranks} processes that share it",
                hint=f"set `batch_size` to {-(-batch_size // ranks) * ranks}",
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.starts = count_starts(tokens, context_length)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of the batch of ``step``, drawn uniformly and with replacement.

        Returns:
            tokens_BT and targets_BT, int64 on the CPU, where B is ``batch_size / ranks``.
        """
        generator = np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64))
        # The remainder favours small starts by less than starts / 2^64. NumPy promises that these raw numbers never
        # change between its versions, which it does not for `Generator.integers`.
        starts_B = generator.random_raw(self.batch_size) % np.uint64(self.starts)
        return gather(self.tokens, self._share(starts_B), self.context_length)

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
                yield gather(self.tokens, rows, self.context_length)

    def _share(self, rows: np.ndarray) -> np.ndarray:
        return rows[len(rows) * self.rank // self.ranks : len(rows) * (self.rank + 1) // self.ranks]


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

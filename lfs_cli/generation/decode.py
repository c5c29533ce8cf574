"""Prefill, then one token at a time: how a model continues lists of tokens.

Several prompts are decoded together without padding or masks. All rows of the batch stand at the same position: the
model first reads as much as the shortest prompt has; from then on a row takes its next token from its prompt while
there is one, and from the model afterwards. So every token has the position that it would have alone.

    prompt 0    a b c | p q r s t         letters before the bar are read, those after it written
    prompt 1    d e f g h | u v w
    length            3 4 5 6 7           tokens that each row has when the model is asked for the next

A text may grow longer than the model's context. The model then sees a window of the last tokens, whose start stays in
place while the window fills and then jumps by half a context (`window_start`): cached keys carry the positions they
were read at, so every jump costs one prefill. Decoding without a cache uses the same windows, and writes the same
tokens.

Source of the lockstep: Touvron et al., "LLaMA", 2023 (arXiv:2302.13971), the code published with it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from random import Random

import torch
from torch import Tensor

from lfs_cli.config import SamplingConfig
from lfs_cli.errors import CheckpointError
from lfs_cli.generation.sample import build_sampler, draw
from lfs_cli.model import KVCache, Transformer
from lfs_cli.model.device import precision

SHARED_PRODUCTS = 10_000_000
"""Products of a weight and a number from which on a CPU shares a forward pass among its cores: milliseconds of one."""


@torch.inference_mode()
def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue each prompt until it stops, yielding what is written one position after the other.

    A prompt continues in a batch as it does alone in the same place: prompt i has a random stream of its own, made from
    ``(seed, i)``, which gives one number to each token that it writes.

    Args:
        model: In evaluation mode.
        prompts: Token ids of each prompt: at least one, and at most as many as the model's context is long.
        max_tokens: Tokens written at most, for each prompt.
        sampling: How each token is chosen.
        seed: Chooses the random streams.
        stop_id: Token that ends a text. It is yielded, as the last one.
        vocab_size: Tokens that may be written: those below this id. By default all.
        dtype: Type of the matrix products when it is not that of the weights.
        cache: Keep the keys and values of earlier tokens; without, the window is read anew for every token.

    Yields:
        For each prompt the token written at this position, or None when it has none: its prompt is still being read,
        or its text has ended.

    Raises:
        CheckpointError: When the model's logits are not numbers.
    """
    context_length = model.config.context_length
    if not all(1 <= len(prompt) <= context_length for prompt in prompts):
        lengths = [len(prompt) for prompt in prompts]
        raise ValueError(f"generate_tokens reads prompts of 1 to {context_length} tokens, got {lengths}")

    sample = build_sampler(sampling or SamplingConfig())
    randoms = [Random(f"{seed}/{index}") for index in range(len(prompts))]
    rows = [list(prompt) for prompt in prompts]
    left = [max_tokens] * len(rows)
    longest = max(map(len, rows), default=0) + max_tokens
    reader = _Reader(model, len(rows), min(longest, context_length), dtype, cache)

    while any(left):
        length = min(len(row) for row, more in zip(rows, left, strict=True) if more)
        writes = [more > 0 and len(row) == length for row, more in zip(rows, left, strict=True)]
        logits_BV = reader.read(rows, length)[:, :vocab_size]
        uniform_B = torch.tensor(
            [_uniform(random) if write else 0.0 for random, write in zip(randoms, writes, strict=True)]
        )
        chosen = draw(sample(logits_BV), uniform_B.to(logits_BV.device)).tolist()
        for index, write in enumerate(writes):
            if write:
                rows[index].append(chosen[index])
                left[index] = 0 if chosen[index] == stop_id else left[index] - 1
        yield [token if write else None for token, write in zip(chosen, writes, strict=True)]


def window_start(length: int, context_length: int) -> int:
    """Return the first token that the model sees of a text of ``length`` tokens.

    It is 0 while the text fits. Then it is the least multiple of half a context that leaves a window that fits, so that
    the window has between half a context and a whole one. For a context of 8:

        length    1 ... 8   9 ... 12   13 ... 16   17 ... 20
        start     0         4          8           12
    """
    jump = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // jump)) * jump


def products_in(model: Transformer, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which ``model`` computes in ``dtype``: none when its weights have that type already."""
    weight = next(model.parameters())
    return nullcontext() if weight.dtype == dtype else precision(weight.device, dtype)


class _Reader:
    """Feeds the model what it has not seen of the current window, and returns the logits of the next token."""

    def __init__(
        self, model: Transformer, batch: int, capacity: int, dtype: torch.dtype | None, has_cache: bool
    ) -> None:
        weight = next(model.parameters())
        self.model = model
        self.device = weight.device
        self.dtype = dtype or weight.dtype
        self.weights = model.parameter_count()
        self.start = 0
        self.is_checked = False
        self.cache = KVCache(model.config, batch, capacity, self.device, self.dtype) if has_cache else None

    def read(self, rows: Sequence[Sequence[int]], length: int) -> Tensor:
        """Return float32 logits (B, V) of the token after the first ``length`` ones of each row.

        A row that has ended earlier is filled up with token 0, and its logits mean nothing.
        """
        start = window_start(length, self.model.config.context_length)
        first = start
        if self.cache is not None:
            if start != self.start:
                self.start = start
                self.cache.truncate(0)
            first += self.cache.length
        tokens = [[*row[first:length], *[0] * (length - max(first, len(row)))] for row in rows]
        tokens_BT = torch.tensor(tokens, device=self.device)
        with products_in(self.model, self.dtype), _threads_for(tokens_BT.numel() * self.weights):
            hidden_BTC = self.model.hidden(tokens_BT, self.cache)
            logits_BV = self.model.logits(hidden_BTC[:, -1]).float()
        if not self.is_checked:
            self.is_checked = True
            if not bool(logits_BV.isfinite().all()):
                raise CheckpointError(
                    f"the model's logits are not numbers in {str(self.dtype).removeprefix('torch.')}",
                    hint="try `--set dtype=float32`, or another checkpoint: `--set checkpoint=latest`",
                )
        return logits_BV


@contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """Let one thread do work that is too small to share.

    Torch waits for all threads after each of the many operations of a step, and a wait is long where another program
    has the core. Measured in turns on two cores shared with ten busy processes, a model of 1.6M weights wrote 1.8 to
    4.6 times as many tokens a second with one thread as with two; on idle cores it was not measured.
    """
    threads = torch.get_num_threads()
    if products >= SHARED_PRODUCTS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _uniform(random: Random) -> float:
    """Return a number in [0, 1) that float32 holds exactly, so that no rounding makes it 1."""
    return int(random.random() * 2**24) / 2**24

"""From the logits of the next token to one token: scale, leave out the unlikely ones, draw.

Every sampler maps logits to logits and leaves a token out by setting its logit to -inf, so samplers compose. They are
applied in the order of the file: temperature first, so that the others see the probabilities that are drawn from.
A temperature of 0 stands for `greedy`, after which one token is left.

The drawing itself takes its random number as an argument: the same number and logits give the same token everywhere.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from lfs_cli.config import SamplingConfig
from lfs_cli.registry import Registry, check_options

NUCLEUS = 256
"""Tokens that top-p ranks at first. Sorting all of 10,000 takes ten times as long, and is rarely needed."""


class Sampler(Protocol):
    """Change the logits of the next token. Settings are keyword-only; every row must keep at least one token."""

    def __call__(self, logits_BV: Tensor, **settings: Any) -> Tensor: ...


SAMPLERS: Registry[Sampler] = Registry("sampler", room="lfs_cli.generation")


@SAMPLERS.register("greedy")
def keep_best(logits_BV: Tensor) -> Tensor:
    """Keep the most likely token, of equals the one with the lowest id."""
    return keep_top_k(logits_BV, k=1)


@SAMPLERS.register("temperature")
def divide_by_temperature(logits_BV: Tensor, *, temperature: float) -> Tensor:
    """Divide the logits: below 1 the likely tokens gain, above 1 the unlikely ones.

    The largest logit becomes 0, so that a temperature next to 0 cannot overflow.
    """
    temperature = min(max(temperature, 1e-30), 1e30)  # both limits are far within float32
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


@SAMPLERS.register("top_k")
def keep_top_k(logits_BV: Tensor, *, k: int) -> Tensor:
    """Keep exactly the ``k`` most likely tokens, or all when there are fewer.

    Source: Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018 (arXiv:1805.04833), section 5.
    """
    k = min(k, logits_BV.shape[-1])
    least_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return _keep(logits_BV, least_B1, torch.full_like(least_B1, k, dtype=torch.long))


@SAMPLERS.register("top_p")
def keep_top_p(logits_BV: Tensor, *, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to at least ``p``, and never less than one.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019 (arXiv:1904.09751), section 3.1.
    """
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    vocab_size = logits_BV.shape[-1]
    candidates = min(NUCLEUS, vocab_size)
    while True:
        ranked_BK = logits_BV.topk(candidates, dim=-1).values
        sum_BK = (ranked_BK - total_B1).exp().cumsum(-1)
        if candidates == vocab_size or bool((sum_BK[:, -1] >= p).all()):
            break
        candidates = vocab_size
    count_B1 = ((sum_BK < p).sum(-1, keepdim=True) + 1).clamp(max=candidates)
    return _keep(logits_BV, ranked_BK.gather(-1, count_B1 - 1), count_B1)


@SAMPLERS.register("min_p")
def keep_min_p(logits_BV: Tensor, *, share: float) -> Tensor:
    """Keep the tokens that are at least ``share`` times as likely as the most likely one.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024 (arXiv:2407.01082), section 3.
    """
    if share <= 0:
        return logits_BV
    least_B1 = logits_BV.amax(-1, keepdim=True) + math.log(share)
    return logits_BV.masked_fill(logits_BV < least_B1, -math.inf)


def build_sampler(config: SamplingConfig) -> Callable[[Tensor], Tensor]:
    """Return the samplers that ``config`` asks for as one function from logits to logits, both (B, V).

    Raises:
        ConfigError: When `others` names an unknown sampler or a setting that it does not have.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        ("temperature", {"temperature": config.temperature}),
        *([("top_k", {"k": config.top_k})] if config.top_k > 0 else []),
        *([("top_p", {"p": config.top_p})] if config.top_p < 1 else []),
        *([("min_p", {"share": config.min_p})] if config.min_p > 0 else []),
        *config.others.items(),
    ]
    if config.temperature == 0:
        steps = [("greedy", {})]
    chain = [_prepare(name, settings) for name, settings in steps]

    def sample(logits_BV: Tensor) -> Tensor:
        for step in chain:
            logits_BV = step(logits_BV)
        return logits_BV

    return sample


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return for each row the token at which the running sum of probabilities passes a number in [0, 1).

    Args:
        logits_BV: (B, V), float32. Tokens with -inf are never drawn.
        uniform_B: (B,), float32, at most 1 - 2^-24: the largest one that cannot be rounded up to the whole sum.

    Returns:
        (B,), int64.
    """
    probability_BV = logits_BV.softmax(-1)
    sum_BV = probability_BV.cumsum(-1)
    passed_BV = sum_BV > uniform_B[:, None] * sum_BV[:, -1:]
    return (passed_BV & (probability_BV > 0)).to(torch.uint8).argmax(-1)  # argmax is the first of equals


def _prepare(name: str, settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    sampler = SAMPLERS.get(name)
    check_options("sampler", name, settings, list(signature(sampler).parameters)[1:])
    return partial(sampler, **settings)


def _keep(logits_BV: Tensor, least_B1: Tensor, count_B1: Tensor) -> Tensor:
    """Keep ``count`` tokens of each row, the least likely of which has logit ``least``; of equals the lowest ids."""
    above_BV = logits_BV > least_B1
    equal_BV = logits_BV == least_B1
    room_B1 = count_B1 - above_BV.sum(-1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))
    return logits_BV.masked_fill(~kept_BV, -math.inf)

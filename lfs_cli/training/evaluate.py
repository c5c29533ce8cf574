"""How well a model predicts text that it was not trained on: loss, perplexity and bits per byte."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfs_cli.corpus.shards import Tokens
from lfs_cli.training.step import LossFunction


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation: a line of metrics.jsonl.

    Args:
        step: Steps done before it.
        loss: Mean nats per token of the validation text.
        perplexity: e to the loss: the number of equally likely tokens that would be as hard to guess.
        bits_per_byte: Loss in bits per byte of text, which compares models with different tokenizers; None when the
            bytes behind the tokens are not known.
        tokens: Tokens that were predicted.
        seconds: Time that it took.
    """

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    seconds: float

    def line(self) -> dict[str, Any]:
        """Return the record as it stands in metrics.jsonl."""
        return {"kind": "evaluation", **asdict(self)}


def evaluate(
    model: nn.Module,
    loss_function: LossFunction,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    *,
    step: int,
    bytes_per_token: float | None,
    rows: int | None = None,
) -> Evaluation:
    """Return the mean loss over ``batches``, each token counting the same.

    Args:
        model: Put into evaluation mode meanwhile.
        loss_function: From tokens_BT and targets_BT to their mean loss.
        batches: (tokens_BT, targets_BT) on the host; the last one may be smaller.
        device: Where the model is.
        step: Steps done so far.
        bytes_per_token: Mean bytes of text behind one token, for bits per byte.
        rows: Sequences in one forward pass, for less memory; by default a whole batch. The result is the same.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    try:
        with torch.no_grad():
            for batch in batches:
                for tokens_BT, targets_BT in zip(*(tensor.split(rows or len(tensor)) for tensor in batch), strict=True):
                    loss = loss_function(tokens_BT.to(device), targets_BT.to(device))
                    total += loss.double().cpu() * targets_BT.numel()
                    tokens += targets_BT.numel()
    finally:  # `batches` may end by an error
        model.train(was_training)
    mean = (total / tokens).item()
    return Evaluation(
        step=step,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # e^709 is the largest that float64 holds
        bits_per_byte=mean / math.log(2) / bytes_per_token if bytes_per_token else None,
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def unigram_entropy(tokens: Tokens, limit: int = 10_000_000) -> float:
    """Return the entropy in nats of the token frequencies: the loss of a model that ignores all context.

    Args:
        tokens: The text.
        limit: Tokens that are counted at most, from the start.
    """
    counts = np.bincount(tokens[: min(len(tokens), limit)])
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())

"""One optimizer step: microbatches forward and backward, clip, update; and the record that is kept of it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lfs_cli.optimizers import Optimizer, clip_scale, step_scaled
from lfs_cli.training.randomness import random_states, restore_random_states
from lfs_cli.training.recovery import with_less_at_once

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""From tokens_BT and targets_BT to their mean loss in nats."""

Pass = Callable[[Tensor, Tensor, int], Tensor]
"""Forward and backward of one part of a batch: from tokens_BT, targets_BT and the number of equal parts to the share in
the batch's mean loss, which holds until the next pass. Adds its gradients to those of the weights."""


@dataclass(frozen=True)
class StepRecord:
    """What one training step did: a line of metrics.jsonl.

    Args:
        step: Steps done, this one included.
        loss: Mean nats per token of the step's batch, before its update, with the z-loss where there is one.
        lr: Learning rate of the first group.
        gradient_norm: Norm of all gradients together, before clipping.
        tokens: Tokens trained on so far.
        seconds: Seconds of training so far, without evaluations and checkpoints.
        tokens_per_second: Over the last steps.
        mfu: Share of the hardware's peak FLOP/s that went into the model, or None when the peak is not known.
        memory_bytes: Peak memory so far: of the GPU, or of the process.
    """

    step: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int

    def line(self) -> dict[str, Any]:
        """Return the record as it stands in metrics.jsonl."""
        return {"kind": "step", **asdict(self)}


def train_step(
    loss_function: LossFunction,
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[Optimizer],
    tokens_BT: Tensor,
    targets_BT: Tensor,
    *,
    passes: int,
    clip: float,
    accept: Callable[[float, float], bool] | None = None,
    on_less: Callable[[int], None] | None = None,
    draws: bool = False,
    one_pass: Pass | None = None,
) -> Tensor:
    """Move the weights once. Nothing here waits for the device, unless ``accept`` is given.

    Args:
        loss_function: Forward, up to the mean loss.
        parameters: Every weight that is trained.
        optimizers: Together they move each of them once.
        tokens_BT: (B, T) input tokens, on the device.
        targets_BT: (B, T) the tokens that follow them.
        passes: Forward and backward passes that the batch is split into; must divide B. The result is the same.
        clip: Largest norm of all gradients together; 0 for no limit.
        accept: Is told the two numbers before the weights move. When it says no, weights and optimizers stay as they
            are, to the bit. Asking it waits for the device, which costs nothing on a CPU.
        on_less: Is told the sequences in a pass whenever they become fewer, as memory ran out. Without it that is an
            error, as it always is during the update.
        draws: Whether the model draws random numbers: then more passes begin where the failed ones began.
        one_pass: Does what `plain_pass` does with ``loss_function``, in another way, such as a `GraphedPass`.

    Returns:
        (2,), float32, on the device: the mean loss before the update, and the gradients' norm before clipping.
    """
    attempt = partial(_accumulate, one_pass or partial(plain_pass, loss_function), tokens_BT, targets_BT)
    rows, device = len(tokens_BT) // passes, tokens_BT.device
    if on_less is None:
        loss = attempt(rows)
    else:
        states = random_states(device) if draws else None

        def undo() -> None:
            _drop_gradients(parameters)
            if states is not None:
                restore_random_states(states, device)

        loss = with_less_at_once(attempt, rows, len(tokens_BT), device, undo=undo, on_less=on_less)
    norm, scale = clip_scale(parameters, clip or float("inf"))
    numbers = torch.stack((loss, norm.float()))
    if accept is None or accept(*numbers.tolist()):
        step_scaled(optimizers, scale)
    _drop_gradients(parameters)
    return numbers


def plain_pass(loss_function: LossFunction, tokens_BT: Tensor, targets_BT: Tensor, passes: int) -> Tensor:
    """Do a `Pass` by autograd."""
    share = loss_function(tokens_BT, targets_BT) / passes
    share.backward()
    return share.detach()


def _accumulate(one_pass: Pass, tokens_BT: Tensor, targets_BT: Tensor, rows: int) -> Tensor:
    """Add the gradients of a batch to those of the weights, so many sequences at a time, and return its mean loss."""
    passes = len(tokens_BT) // rows
    loss = torch.zeros((), device=tokens_BT.device)
    for tokens, targets in zip(tokens_BT.chunk(passes), targets_BT.chunk(passes), strict=True):
        loss += one_pass(tokens, targets, passes)
    return loss


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for weight in parameters:
        weight.grad = None


class Readback:
    """A few numbers on their way from the device to the host, without stopping the device.

    Args:
        numbers: (N,), on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Return the numbers, waiting only for the work that was queued before them."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()

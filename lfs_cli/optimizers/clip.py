"""Gradient clipping: when the gradient is too long, shorten it and keep its direction.

`clip_gradients` does that at once. Training asks for the factor alone, `clip_scale`, and hands it to the optimizers
with `step_scaled`: one that has a kernel multiplies as it reads, and saves a pass over all gradients. On a GPU the
factor comes from kernels too (`kernels/clip.py`).

Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013 (arXiv:1211.5063), Algorithm 1.
"""

from collections.abc import Iterable
from functools import cache
from inspect import signature
from math import isinf

import torch
from torch import Tensor

from lfs_cli.kernels.clip import length_and_factor
from lfs_cli.optimizers.base import Optimizer


def clip_scale(parameters: Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor | None]:
    """Return how long all gradients together are, and what to multiply them by so that it is ``max_norm`` at most.

    Both are made on the device, and the CPU does not wait for them.

    Args:
        parameters: Weights; those without a gradient are passed over.
        max_norm: Largest length of all gradients taken as one vector; infinity for any.

    Returns:
        The length, a scalar in float32 or better, which is not a number when a gradient is not. And the factor, in the
        same type: ``max_norm`` / (length + 1e-6), or 1 for gradients that are short enough; None where all are.
    """
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    if not gradients:
        return torch.zeros(()), None
    norm, scale = length_and_factor(gradients, max_norm)
    return norm, None if isinf(max_norm) else scale


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by ``max_norm`` / (norm + 1e-6) when their common norm is above ``max_norm``.

    The decision is made on the device, so the CPU does not wait for it.

    Args:
        parameters: Weights; those without a gradient are passed over.
        max_norm: Largest length of all gradients taken as one vector.

    Returns:
        That length before clipping, a scalar in float32 or better. Not a number when a gradient is not.
    """
    parameters = list(parameters)
    norm, scale = clip_scale(parameters, max_norm)
    if scale is not None:
        _multiply_gradients(parameters, scale)
    return norm


def step_scaled(optimizers: Iterable[torch.optim.Optimizer], scale: Tensor | None) -> None:
    """Move all weights once, by their gradients times ``scale``.

    Optimizers that take no ``scale``, as those of torch, find their gradients multiplied.

    Args:
        optimizers: Of which no two move the same weight.
        scale: (), on the device of the weights; None for 1.
    """
    for optimizer in optimizers:
        if scale is None:
            optimizer.step()
        elif isinstance(optimizer, Optimizer) and _takes_scale(type(optimizer)):
            optimizer.step(scale=scale)
        else:
            _multiply_gradients((weight for group in optimizer.param_groups for weight in group["params"]), scale)
            optimizer.step()


@cache
def _takes_scale(kind: type[Optimizer]) -> bool:
    """Whether ``step`` of an optimizer is still one with a scale: a plugin may have written its own."""
    return "scale" in signature(kind.step).parameters


def _multiply_gradients(parameters: Iterable[Tensor], scale: Tensor) -> None:
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    if gradients:  # torch's operations on lists refuse empty ones
        torch._foreach_mul_(gradients, scale)

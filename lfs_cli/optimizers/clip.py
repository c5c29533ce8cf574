"""Gradient clipping: when the gradient is too long, shorten it and keep its direction.

Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013 (arXiv:1211.5063), Algorithm 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

EPSILON = 1e-6


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by ``max_norm`` / (norm + 1e-6) when their common norm is above ``max_norm``.

    The decision is made on the device, so the CPU does not wait for it.

    Args:
        parameters: Weights; those without a gradient are passed over.
        max_norm: Largest length of all gradients taken as one vector.

    Returns:
        That length before clipping, a scalar in float32 or better. Not a number when a gradient is not.
    """
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    if not gradients:
        return torch.zeros(())
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.stack(torch._foreach_norm(gradients, 2, wide)).norm()
    scale = torch.where(norm > max_norm, max_norm / (norm + EPSILON), 1.0)
    torch._foreach_mul_(gradients, scale)
    return norm

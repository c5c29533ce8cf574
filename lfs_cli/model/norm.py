"""Normalization: keeping the size of a vector in hand.

    r = 1 / sqrt(mean(x^2) + epsilon)        y = x r w

Computed in float32 at least, since the sum of many squares needs the digits; the result has the type of the input.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467), eq. 4.
"""

import torch
from torch import Tensor, nn

from lfs_cli.kernels.operation import as_compiled, on_gpu
from lfs_cli.kernels.rms_norm import rms_norm
from lfs_cli.registry import Registry

NORMS: Registry[type[nn.Module]] = Registry("norm", room="lfs_cli.model")


@NORMS.register("rms_norm")
class RMSNorm(nn.Module):
    """Scales each vector to unit mean square, then each channel by a learned weight that starts at 1.

    Args:
        width: Channels.
        epsilon: Added to the mean square.
    """

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # What torch.compile traces makes a kernel of its own, together with what stands before and behind
        if as_compiled() or (on_gpu(x) and not torch.compiler.is_compiling()):
            return rms_norm(x, self.weight, self.epsilon)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * r * self.weight).to(x.dtype)


@NORMS.register("none")
class NoNorm(nn.Module):
    """Leaves its input alone: the ablation that shows what normalization is for."""

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

"""Feed-forward layers: what each position computes on its own, F hidden channels wide.

    swiglu   down(silu(gate(x)) * up(x))
    silu     down(silu(up(x)))
    relu2    down(relu(up(x))^2)                 silu(z) = z sigmoid(z)

At equal size, `swiglu` has F = 8/3 C and the other two F = 4 C. The last matrix of each is called `down`: with
`model.zero_init` it starts at zero.

Sources: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202), eq. 6: gate, up, down are its W, V, W2.
         So et al., "Primer", 2021 (arXiv:2109.08668), section 3, for the squared ReLU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.operation import compute_dtype
from lfs_cli.kernels.product import gated_layer, pays
from lfs_cli.kernels.swiglu import swiglu
from lfs_cli.model.layers import Linear, kept_cast, pays_to_stack, stacked, sums_wide
from lfs_cli.registry import Registry

FEED_FORWARDS: Registry[type[nn.Module]] = Registry("feed-forward", room="lfs_cli.model")


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x): a ReLU without the corner."""
    return _SiLU.apply(x)


class _SiLU(torch.autograd.Function):
    """SiLU that keeps only its input: with s = sigmoid(x), dx = dy s (1 + x (1 - s)). Differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.sigmoid().mul_(x)
        return y.view_as(y)  # for torch 2.11, whose compiler takes the gradient of what was changed in place for zero

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (dy,), (x,) = gradients, ctx.saved_tensors
        s = x.sigmoid()
        y = s * x
        return y.addcmul_(y, s, value=-1).add_(s).mul_(dy)  # y (1 - s) + s, in one new tensor


@FEED_FORWARDS.register("swiglu")
class SwiGLU(nn.Module):
    """Multiplies two views of the input, one of them gated by SiLU.

    Args:
        width: Channels in and out (C).
        hidden: Hidden channels (F).

    Attributes:
        is_joined: Whether products and gates may be one operation, whose results are kept or forgotten together.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.is_joined = True
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self._joins(x):
            casts = kept_cast(x, (self.gate, self.up)), kept_cast(x, (self.down,))
            return gated_layer(x.to(compute_dtype(x)), self.gate.weight, self.up.weight, self.down.weight, *casts)
        if pays_to_stack(x):
            return self.down(swiglu(stacked(x, (self.gate, self.up))))
        return self.down(silu(self.gate(x)) * self.up(x))

    def _joins(self, x: Tensor) -> bool:
        """Return whether one operation does it all: it calls no layer, so only where these are what they seem."""
        down = self.down
        is_plain = all(type(layer) is Linear for layer in (self.gate, self.up, down))
        if not (self.is_joined and is_plain) or down._forward_hooks or down._forward_pre_hooks:
            return False
        return sums_wide(x) and pays(x, compute_dtype(x), len(self.gate.weight))


@FEED_FORWARDS.register("silu")
class SiLU(nn.Module):
    """One hidden layer with SiLU between two matrices: SwiGLU without the gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.up(x)))


@FEED_FORWARDS.register("relu2")
class ReLU2(nn.Module):
    """One hidden layer with a squared ReLU between two matrices."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().square())

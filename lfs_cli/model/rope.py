"""Rotary positions: turn each pair of channels by an angle that grows with the position.

    angle(t, i) = t theta^(-2i / D)          for pair i of D / 2
    y_2i   = x_2i cos - x_2i+1 sin
    y_2i+1 = x_2i sin + x_2i+1 cos

A dot product of two vectors so turned depends on the distance of their positions only. The angles' sines and cosines
are computed in float64 once, kept in float32 whatever type the model has, and never saved.

Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864), eq. 15 and 34.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys by their positions.

    Args:
        theta: Base of the wavelengths, in positions.
        head_dim: Channels of a head (D); even.
        context_length: Positions that are prepared, 0 to context_length - 1.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, theta: float, head_dim: int, context_length: int) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, and head_dim ({head_dim}) is odd")
        self.theta, self.head_dim, self.context_length = theta, head_dim, context_length
        self._prepare(torch.get_default_device(), torch.float32)

    def forward(self, x: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """Rotate ``x`` by its positions.

        Args:
            x: (..., T, D). Rotated in float32 at least.
            positions: (..., T), integers; its leading dimensions broadcast against those of ``x``.
            start: Without ``positions``, those are start, start + 1, ...

        Returns:
            (..., T, D), in the type of ``x``.
        """
        if positions is None:
            cos, sin = self.tables(start, start + x.shape[-2])
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        if not torch.compiler.is_compiling() and _lies_in_pairs(x):
            # The same turn as a product of complex numbers, five times as fast on a CPU; elsewhere they are not at home
            turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
            return torch.view_as_real(turned).flatten(-2)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)

    def tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles at positions from ``start`` to before ``stop``, (T, D / 2) each."""
        if stop > self.context_length:
            raise ValueError(f"position {stop - 1} is beyond the context of {self.context_length} tokens")
        return self.cos[start:stop], self.sin[start:stop]

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fill the tables, each (context_length, D / 2)."""
        cpu = torch.device("cpu")
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=cpu)
        positions = torch.arange(self.context_length, dtype=torch.float64, device=cpu)
        angles = torch.outer(positions, self.theta ** (-pairs / self.head_dim))
        self.register_buffer("cos", angles.cos().to(dtype).to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the model to its device, but not to a type with fewer digits than float32."""
        super()._apply(fn, recurse)
        self._prepare(self.cos.device, torch.promote_types(self.cos.dtype, torch.float32))
        return self


def _lies_in_pairs(x: Tensor) -> bool:
    """Whether float32 numbers on the CPU can be read as complex ones where they lie."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    *rows, channels = x.stride()
    return channels == 1 and not any(place % 2 for place in (x.storage_offset(), *rows))

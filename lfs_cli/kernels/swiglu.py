"""The functions between the two products of a feed-forward layer: SwiGLU, SiLU and squared ReLU, in one pass each.

Sources: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202), eq. 6.
         So et al., "Primer", 2021 (arXiv:2109.08668), section 3, for the squared ReLU.

Math, with s = sigmoid(x); for `swiglu` a row holds F gates x, then F factors u:

    swiglu   y = x s u          dx = dy u s (1 + x (1 - s))          du = dy x s
    silu     y = x s            dx = dy s (1 + x (1 - s))
    relu2    y = max(x, 0)^2    dx = 2 dy max(x, 0)

Numerics: everything between loading and storing is float32.
Memory:   saves the input alone, which the product before it has just made; y is computed again nowhere, as the product
          behind it keeps it. Backward writes gates' and factors' gradients into one tensor, the shape of the input.
Layout:   one program owns BLOCK numbers of y, counted through all rows, so that none is idle whatever F is. Gate and
          factor of a channel lie F apart, so that one product with the stacked matrices makes both, and its backward
          reads the gradient in one piece. F is known to the compiler, as a division by it would take longer than the
          rest.
Traffic:  swiglu reads 2 F and writes F numbers a row; backward reads 3 F and writes 2 F.
Where:    on a GPU in training; on Hopper GPUs and for many rows `product.py` has SwiGLU behind the product before it.
Limits:   float32, bfloat16 or float16. PyTorch does the rest: float64, other devices, no Triton, and whatever the
          kernels do wrong in the self-check, once a process for each kind and type.
Measured: with `rope.py`, see there. Alone beside the compiler, by `lfs bench kernels`: forward 1.00, backward 1.37
          times as fast. One H200, 2026-11-29, 32,768 rows, F = 1,344, beside programs of 1,024 channels of one row:
          forward 0.067 and 0.068 ms, backward 0.108 and 0.122; F = 2,048: no difference.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import operation, unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

BLOCK = 1024
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(N, F: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return where the numbers of this program lie in the input and in the output, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at + at // F * ((INPUTS - 1) * F), at, at < N


@triton.jit
def _forward(x_ptr, y_ptr, N, F: tl.constexpr, KIND: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK of the N numbers of y, whose rows have F channels, and those of the input INPUTS F."""
    at, at_y, inside = _place(N, F, INPUTS, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    positive = tl.maximum(x, 0.0)
    y = positive * positive if KIND == "relu2" else x / (1.0 + tl.exp2(-x * LOG2_E))
    if KIND == "swiglu":
        y *= tl.load(x_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at_y, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, N, F: tl.constexpr, KIND: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write dx, and du behind it, of BLOCK of the N numbers of y."""
    at, at_y, inside = _place(N, F, INPUTS, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(dy_ptr + at_y, mask=inside, other=0.0).to(tl.float32)
    if KIND == "relu2":
        dx *= 2.0 * tl.maximum(x, 0.0)
    else:
        s = 1.0 / (1.0 + tl.exp2(-x * LOG2_E))
        if KIND == "swiglu":
            tl.store(dx_ptr + at + F, (dx * x * s).to(dx_ptr.dtype.element_ty), mask=inside)
            dx *= tl.load(x_ptr + at + F, mask=inside, other=0.0).to(tl.float32)
        dx *= s * (1.0 + x * (1.0 - s))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``. Differentiable, once.

    Args:
        gate_up: (..., 2 F): F gates, then F factors, as one product with the stacked matrices makes them.

    Returns:
        (..., F).

    Raises:
        ValueError: When the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"expected as many gates as factors, got {gate_up.shape[-1]} channels")
    return _apply("swiglu", gate_up)


def silu(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(x)``, (...), in the type of ``x``. Differentiable, once."""
    return _apply("silu", x)


def relu2(x: Tensor) -> Tensor:
    """Return ``max(x, 0) ** 2``, (...), in the type of ``x``. Differentiable, once."""
    return _apply("relu2", x)


def unavailable(x: Tensor) -> str | None:
    """Say why the kernels cannot run on this tensor, or None when they can. PyTorch takes their place then."""
    return unavailable_reason(x.device.type, x.dtype)


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of `swiglu` at ``gate_up``, (..., 2 F), from that of its result, (..., F)."""
    return (_reference_backward if unavailable(gate_up) else _backward_operation)("swiglu", dy, gate_up)


def reference_activation(kind: str, x: Tensor) -> Tensor:
    """The definition, in float32 or better.

    Args:
        kind: ``swiglu``, ``silu`` or ``relu2``.
        x: (..., 2 F) for ``swiglu``, else (..., F).

    Returns:
        (..., F), in the type of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "relu2":
        return wide.relu().square().to(x.dtype)
    gate, up = wide.chunk(2, -1) if kind == "swiglu" else (wide, 1)
    return (gate * gate.sigmoid() * up).to(x.dtype)


def _apply(kind: str, x: Tensor) -> Tensor:
    return reference_activation(kind, x) if unavailable(x) else _Activation.apply(kind, x)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x)
        return _forward_operation(kind, x)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, _backward_operation(ctx.kind, gradients[0], x)


@operation("activation")
def _forward_operation(kind: str, x: Tensor) -> Tensor:
    return (_launch_forward if _is_right(kind, x) else reference_activation)(kind, x)


@torch.library.register_fake("lfs::activation")
def _empty_result(kind: str, x: Tensor) -> Tensor:
    F = x.shape[-1] // 2 if kind == "swiglu" else x.shape[-1]
    return torch.empty((*x.shape[:-1], F), dtype=x.dtype, device=x.device)


@operation("activation_backward")
def _backward_operation(kind: str, dy: Tensor, x: Tensor) -> Tensor:
    return (_launch_backward if _is_right(kind, x) else _reference_backward)(kind, dy, x)


@torch.library.register_fake("lfs::activation_backward")
def _(_kind: str, _dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _is_right(kind: str, x: Tensor) -> bool:
    """Return whether the kernels are to be used, as they do on a small case what the definitions do."""
    return is_trusted(kind, partial(_errors, kind), x.device, x.dtype, allowed=LARGEST_ERROR[x.dtype])


def _errors(kind: str, device: torch.device, dtype: torch.dtype) -> list[float]:
    F = BLOCK - 16  # a block that crosses rows, and a part of one
    generator = torch.Generator(device).manual_seed(0)
    channels = 2 * F if kind == "swiglu" else F
    x, dy = (torch.randn(3, n, generator=generator, device=device).to(dtype) for n in (channels, F))
    right = reference_activation(kind, x.double()), _reference_backward(kind, dy.double(), x.double())
    return relative_errors((_launch_forward(kind, x), _launch_backward(kind, dy, x)), right)


def _reference_backward(kind: str, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `reference_activation`, in float32 or better."""
    dy, wide = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (dy, x))
    if kind == "relu2":
        return (2 * dy * wide.relu()).to(x.dtype)
    gate, up = wide.chunk(2, -1) if kind == "swiglu" else (wide, 1)
    s = gate.sigmoid()
    dx = dy * up * s * (1 + gate * (1 - s))
    return (torch.cat((dx, dy * gate * s), -1) if kind == "swiglu" else dx).to(x.dtype)


def _launch_forward(kind: str, x: Tensor) -> Tensor:
    y = _empty_result(kind, x)
    _launch(_forward, kind, y, x.contiguous(), y)
    return y


def _launch_backward(kind: str, dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_backward, kind, dy, dy.contiguous(), x.contiguous(), dx)
    return dx


def _launch(kernel: Any, kind: str, y: Tensor, *tensors: Tensor) -> None:
    """Start a program for every BLOCK numbers of ``y``."""
    F = y.shape[-1]
    if not y.numel():
        return
    with torch.cuda.device_of(y):
        kernel[(triton.cdiv(y.numel(), BLOCK),)](
            *tensors,
            y.numel(),
            F=F,
            KIND=kind,
            INPUTS=2 if kind == "swiglu" else 1,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )

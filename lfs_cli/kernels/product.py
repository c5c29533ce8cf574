"""Matrix products together with what stands right behind them, so that it costs little time of its own.

Sources: those of `swiglu.py` and `rope.py`, whose mathematics this is.

Math, with x of R rows and C channels:

    gated       a = x W^T, F gates beside F factors        y = swiglu(a)
    back        dy = do V, V the (C, F) matrix behind y    da = the gradient of swiglu at a, from dy
    turned      a = x W^T, heads of D channels             those before `turned` channels, turned by their positions
    weights     dW = dy^T x, summed and kept in float32

Numerics: a product's sums are rounded once, to the type of x, before what stands behind them, as if both were apart:
          on the same sums the results are the same to the bit.
Memory:   what the parts would save. Without `turned`, queries and keys would be in memory before and after they are
          turned.
Where:    Hopper GPUs, by `hopper_product.py`; elsewhere, for gates with more than `LARGEST_GATED` channels of x, and in
          the place of a kernel that fails its self-check, one after the other. Layers ask `pays` before.
Limits:   bfloat16 and float16; channels in multiples of 8, whose rows begin at multiples of 16 bytes; D divides 128.
Measured: see `hopper_product.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels import rope, swiglu
from lfs_cli.kernels.hopper_attention import describe, layout_of, no_hopper_reason_in_trace, processors
from lfs_cli.kernels.operation import operation
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

ROWS, TURNED_ROWS = 4096, 8192
"""Fewer are not faster: they do not keep all processors busy, and the host has more to do for them."""

LARGEST_GATED = 2048
"""Above so many channels of x, cuBLAS and then SwiGLU are faster: two of its processors share what they read."""

TILE_ROWS, TILE_COLUMNS, STEP = 128, 128, 64
"""Of the kernels, which have them written down, too."""

STAGES = 3
MULTIPLIER, FINISHER, LOADER, BEFORE = 160, 160, 32, 128
"""Registers of each thread: of those that multiply, finish and load, and of all until they part."""


def gated_layer(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_up_cast: Tensor | None = None,
    down_cast: Tensor | None = None,
) -> Tensor:
    """Return ``swiglu(x @ [gate; up].T) @ down.T``. Differentiable, once; keeps what its parts would keep.

    Args:
        x: (..., C), in the type of the products.
        gate: (F, C), like `up` in any floating type: float32 weights have float32 gradients, which were never rounded.
        up: (F, C).
        down: (C, F).
        gate_up_cast: Gate and up below it, (2 F, C), in the type of ``x``, where that is at hand.
        down_cast: Down in that type.

    Returns:
        (..., C).

    Raises:
        ValueError: For shapes that do not fit together.
    """
    (F, C), shapes = gate.shape, f"{tuple(gate.shape)}, {tuple(up.shape)} and {tuple(down.shape)}"
    if up.shape != gate.shape or down.shape != (C, F) or x.shape[-1] != C:
        raise ValueError(f"expected x (..., C), gate and up (F, C) and down (C, F), got {tuple(x.shape)}, {shapes}")
    return _GatedLayer.apply(x, gate, up, down, gate_up_cast, down_cast)


class _GatedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_up_cast: Tensor | None,
        down_cast: Tensor | None,
    ) -> Tensor:
        gate_up_NC, down_CF = matrix_for(x, gate_up_cast, (gate, up)), matrix_for(x, down_cast, (down,))
        a_RN, y_RF = gated_product(as_rows(x), gate_up_NC)
        ctx.save_for_backward(x, gate_up_NC, down_CF, a_RN, y_RF)
        return (y_RF @ down_CF.T).view(x.shape)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_NC, down_CF, a_RN, y_RF = ctx.saved_tensors
        do_RC = as_rows(gradients[0])
        x_wanted, gate_wanted, up_wanted, down_wanted, *_ = ctx.needs_input_grad
        ddown = weight_gradient(do_RC, y_RF) if down_wanted else None
        dx = dgate = dup = None
        if x_wanted or gate_wanted or up_wanted:
            da_RN = gated_product_backward(do_RC, down_CF, a_RN)
            dx = (da_RN @ gate_up_NC).view(x.shape) if x_wanted else None
            if gate_wanted or up_wanted:
                dgate, dup = weight_gradient(da_RN, as_rows(x)).chunk(2)
        return dx, dgate, dup, ddown, None, None


def as_rows(x: Tensor) -> Tensor:
    """Return a tensor as a matrix, (rows, channels)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def matrix_for(x: Tensor, cast: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """Return the matrices that ``x`` is multiplied by, one below the other in its type: ``cast``, if it is given."""
    if cast is not None:
        return cast
    matrices = [weight.to(x.dtype) for weight in weights]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


@operation("weight_gradient")
def weight_gradient(dy_RN: Tensor, x_RC: Tensor) -> Tensor:
    """Return the gradient of a matrix, dy^T x, (N, C), in float32."""
    if not dy_RN.is_cuda or dy_RN.dtype not in (torch.bfloat16, torch.float16):  # no other product widens what it sums
        return dy_RN.T.float() @ x_RC.float()
    return torch.mm(dy_RN.T, x_RC, out_dtype=torch.float32)


@torch.library.register_fake("lfs::weight_gradient")
def _(dy_RN: Tensor, x_RC: Tensor) -> Tensor:
    return dy_RN.new_empty((dy_RN.shape[1], x_RC.shape[1]), dtype=torch.float32)


@operation("gated_product")
def gated_product(x_RC: Tensor, gate_up_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product and SwiGLU of it.

    Args:
        x_RC: (R, C), bfloat16 or float16 where it is to be fast.
        gate_up_NC: (2 F, C): the matrix of gates, then that of factors.

    Returns:
        Gates and factors (R, 2 F), and y (R, F).
    """
    F = len(gate_up_NC) // 2
    is_small = x_RC.shape[1] <= LARGEST_GATED
    if is_small and _is_usable(x_RC, F) and _is_right("gated product", _gated_errors, x_RC, F):
        return _launch_gated(_aligned(x_RC), _aligned(gate_up_NC))
    gate_up = x_RC @ gate_up_NC.T
    return gate_up, swiglu.swiglu(gate_up)


@torch.library.register_fake("lfs::gated_product")
def _empty_gated(x_RC: Tensor, gate_up_NC: Tensor) -> tuple[Tensor, Tensor]:
    R, N = len(x_RC), len(gate_up_NC)
    return x_RC.new_empty((R, N)), x_RC.new_empty((R, N // 2))


@operation("gated_product_backward")
def gated_product_backward(do_RC: Tensor, down_CF: Tensor, gate_up_RN: Tensor) -> Tensor:
    """Return the gradient of gates and factors, (R, 2 F), from that of what the next product makes of y.

    Args:
        do_RC: (R, C). The gradient of y V^T.
        down_CF: (C, F): V.
        gate_up_RN: (R, 2 F).
    """
    F = down_CF.shape[1]
    if _is_usable(do_RC, F) and _is_right("gated product backward", _gated_backward_errors, do_RC, F):
        return _launch_gated_backward(*map(_aligned, (do_RC, down_CF, gate_up_RN)))
    return swiglu.swiglu_gradient(do_RC @ down_CF, gate_up_RN)


@torch.library.register_fake("lfs::gated_product_backward")
def _(_do: Tensor, _down: Tensor, gate_up_RN: Tensor) -> Tensor:
    return gate_up_RN.new_empty(gate_up_RN.shape)


@operation("turned_product")
def turned_product(x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return the product, (R, N), with its first heads turned, as `rope.py` turns them.

    Args:
        x_RC: (R, C): sequences of T positions, one after the other.
        matrix_NC: (N, C).
        cos: (T, D / 2), float32, of each position.
        sin: (T, D / 2), float32.
        heads: How many heads of D channels are turned. What follows stays as it is.
    """
    N, D = len(matrix_NC), 2 * cos.shape[1]
    if 128 % D == 0 and _is_usable(x_RC, N) and _is_right("turned product", _turned_errors, x_RC, N, D):
        return _launch_turned(_aligned(x_RC), _aligned(matrix_NC), cos.contiguous(), sin.contiguous(), heads)
    return _turned_apart(x_RC, matrix_NC, cos, sin, heads)


@torch.library.register_fake("lfs::turned_product")
def _empty_turned(x_RC: Tensor, matrix_NC: Tensor, *_: Any) -> Tensor:
    return x_RC.new_empty((len(x_RC), len(matrix_NC)))


def pays(x: Tensor, dtype: torch.dtype, columns: int, rows: int = ROWS) -> bool:
    """Return whether a layer gains by these kernels. torch.compile may trace it.

    Args:
        x: (..., C).
        dtype: That it is multiplied in.
        columns: Channels of the result, of which kernels have several tiles.
        rows: From how many rows on.
    """
    channels = x.shape[-1]
    return x.numel() >= rows * channels and unavailable_reason(x.device, dtype, channels, columns) is None


def unavailable_reason(device: torch.device, dtype: torch.dtype, *channels: int) -> str | None:
    """Say why the kernels cannot take a product, or None when they can.

    Args:
        device: Where.
        dtype: Of x.
        channels: C, and those of the result.
    """
    reason = no_hopper_reason_in_trace(device)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the type is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if any(n % 8 for n in channels):
        return f"{', '.join(map(str, channels))} channels are not all a multiple of 8"
    if channels[-1] <= TILE_COLUMNS:
        return f"the result has {channels[-1]} channels, and a tile of them {TILE_COLUMNS}"
    return None


def _is_usable(x_RC: Tensor, columns: int) -> bool:
    return len(x_RC) > 0 and unavailable_reason(x_RC.device, x_RC.dtype, x_RC.shape[1], columns) is None


def _is_right(kernel: str, errors_of: Callable[..., list[float]], x: Tensor, *case: int) -> bool:
    """Return whether a kernel is to be used, as it does on few rows what the definition does."""
    return is_trusted(kernel, errors_of, x.device, x.dtype, *case, allowed=LARGEST_ERROR[x.dtype])


def _numbers(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """Return random matrices for a self-check."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


CHECK_ROWS, CHECK_CHANNELS = 200, 456
"""Of a self-check: whole tiles and steps and parts of them, and more steps than `STAGES` twice. One program has all
tiles, so that it goes from one to the next as in a call."""


def _gated_errors(device: torch.device, dtype: torch.dtype, F: int) -> list[float]:
    x, matrix = _numbers(device, dtype, (CHECK_ROWS, CHECK_CHANNELS), (2 * F, CHECK_CHANNELS))
    matrix /= CHECK_CHANNELS**0.5
    right = x.double() @ matrix.double().T
    return relative_errors(_launch_gated(x, matrix, programs=1), (right, swiglu.reference_activation("swiglu", right)))


def _gated_backward_errors(device: torch.device, dtype: torch.dtype, F: int) -> list[float]:
    shapes = (CHECK_ROWS, CHECK_CHANNELS), (CHECK_CHANNELS, F), (CHECK_ROWS, 2 * F)
    do, down, gate_up = _numbers(device, dtype, *shapes)
    down /= CHECK_CHANNELS**0.5
    right = swiglu.swiglu_gradient(do.double() @ down.double(), gate_up.double())
    return relative_errors([_launch_gated_backward(do, down, gate_up, programs=1)], [right])


def _turned_errors(device: torch.device, dtype: torch.dtype, N: int, D: int) -> list[float]:
    x, matrix = _numbers(device, dtype, (CHECK_ROWS, CHECK_CHANNELS), (N, CHECK_CHANNELS))
    matrix /= CHECK_CHANNELS**0.5
    (angles,) = _numbers(device, torch.float32, (CHECK_ROWS // 2, D // 2))
    turn = angles.cos(), angles.sin(), max(1, N // D - 1)
    right = _turned_apart(x.double(), matrix.double(), *turn)
    return relative_errors([_launch_turned(x, matrix, *turn, programs=1)], [right])


def _turned_apart(x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The product, then rotation, which takes the place of what it has read."""
    a_BTN = (x_RC @ matrix_NC.T).unflatten(0, (len(x_RC) // len(cos), len(cos)))
    heads_BTHD = a_BTN[..., : heads * 2 * cos.shape[1]].unflatten(2, (heads, -1))
    none_BTGD = heads_BTHD[:, :, :0]
    if rope.unavailable(heads_BTHD, none_BTGD):
        turned_BTHD, _ = rope.reference_qk_norm_rope(heads_BTHD, none_BTGD, cos, sin)
    else:
        turned_BTHD, _ = torch.ops.lfs.qk_norm_rope.default(heads_BTHD, none_BTGD, cos, sin, None, None, 0.0)
    heads_BTHD.copy_(turned_BTHD)
    return a_BTN.flatten(0, 1)


def _aligned(x: Tensor) -> Tensor:
    """Return a matrix whose rows lie one after the other, from a multiple of 16 bytes on, as the copy engine asks."""
    is_fit = x.is_contiguous() and not x.storage_offset() % 8
    return x if is_fit else x.clone(memory_format=torch.contiguous_format)


def _launch_gated(x_RC: Tensor, gate_up_NC: Tensor, *, programs: int | None = None) -> tuple[Tensor, Tensor]:
    from lfs_cli.kernels import hopper_swiglu

    gate_up_RN, y_RF = _empty_gated(x_RC, gate_up_NC)
    (gates, ups), (gate, up) = gate_up_NC.chunk(2), gate_up_RN.chunk(2, 1)
    result = describe(gate, TILE_ROWS // 2, TILE_COLUMNS), describe(up, TILE_ROWS // 2, TILE_COLUMNS), y_RF
    matrices = describe(gates, TILE_COLUMNS, STEP), describe(ups, TILE_COLUMNS, STEP)
    _launch(
        hopper_swiglu.forward,
        x_RC,
        *matrices,
        *result,
        width=TILE_COLUMNS,
        columns=y_RF.shape[1],
        programs=programs,
    )
    return gate_up_RN, y_RF


def _launch_gated_backward(
    do_RC: Tensor, down_CF: Tensor, gate_up_RN: Tensor, *, programs: int | None = None
) -> Tensor:
    from lfs_cli.kernels import hopper_swiglu

    gradient_RN = torch.empty_like(gate_up_RN)
    matrices = (describe(matrix, STEP, TILE_COLUMNS) for matrix in (down_CF, down_CF[:, TILE_COLUMNS:]))
    what = {"width": 2 * TILE_COLUMNS, "columns": down_CF.shape[1], "programs": programs}
    _launch(hopper_swiglu.backward, do_RC, *matrices, gate_up_RN, gradient_RN, **what)
    return gradient_RN


def _launch_turned(
    x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int, *, programs: int | None = None
) -> Tensor:
    from lfs_cli.kernels import hopper_turned

    y_RN = _empty_turned(x_RC, matrix_NC)
    matrices = (describe(matrix, TILE_COLUMNS, STEP) for matrix in (matrix_NC, matrix_NC[TILE_COLUMNS:]))
    T, half = cos.shape
    what = {"width": 2 * TILE_COLUMNS, "columns": len(matrix_NC), "programs": programs}
    _launch(hopper_turned.forward, x_RC, *matrices, y_RN, cos, sin, T, 2 * heads * half, **what, D=2 * half)
    return y_RN


def _launch(
    kernel: Any, x_RC: Tensor, *arguments: Any, width: int, columns: int, programs: int | None, **constants: int
) -> None:
    """Start so many programs, or one a processor, for tiles of so many columns of the result."""
    (R, C), device = x_RC.shape, x_RC.device
    across = -(-columns // width)
    tiles = -(-R // TILE_ROWS) * across
    with torch.cuda.device_of(x_RC):
        kernel[(min(programs or processors(device), tiles),)](
            describe(x_RC, TILE_ROWS // 2, STEP),
            *arguments,
            tiles,
            across,
            -(-C // STEP),
            R,
            COLUMNS=columns,
            STAGES=STAGES,
            SUMS=layout_of((TILE_ROWS // 2, TILE_COLUMNS), x_RC.dtype),
            REGISTERS=MULTIPLIER,
            FINISHER_REGISTERS=FINISHER,
            LOADER_REGISTERS=LOADER,
            **constants,
            num_warps=4,
            maxnreg=BEFORE,
            enable_fp_fusion=True,
        )

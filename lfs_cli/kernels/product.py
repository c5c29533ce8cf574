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
Where:    Hopper GPUs, by `hopper_product.py`, from `ROWS` rows on; elsewhere one after the other.
Limits:   bfloat16 and float16; channels in multiples of 8, whose rows begin at multiples of 16 bytes.
Measured: see `hopper_product.py`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lfs_cli.kernels import rope, swiglu
from lfs_cli.kernels.hopper_attention import describe, layout_of
from lfs_cli.kernels.operation import no_hopper_reason, operation
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

ROWS = 4096
"""Fewer do not keep all processors busy, and PyTorch takes less of the host's time."""

LARGEST_GATED = 2048
"""Channels of x from which the gated product is slower than one by cuBLAS and SwiGLU behind it: PyTorch's shares what
it reads between processors, which counts more the less of the time is spent on results."""

TILE_ROWS, TILE_COLUMNS, STEP = 128, 128, 64
STAGES = 3
MULTIPLIER, FINISHER, LOADER, BEFORE = 160, 160, 32, 128
"""Registers of each thread: of those that multiply, finish and load, and of all until they part."""


def as_rows(x: Tensor) -> Tensor:
    """Return a tensor as a matrix, (rows, channels)."""
    return x.reshape(-1, x.shape[-1])


def matrix_for(x: Tensor, cast: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """Return the matrices that ``x`` is multiplied by, one below the other in its type: ``cast``, if it is given."""
    if cast is not None:
        return cast
    matrices = [weight.to(x.dtype) for weight in weights]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]


@operation("weight_gradient")
def weight_gradient(dy_RN: Tensor, x_RC: Tensor) -> Tensor:
    """Return the gradient of a matrix, dy^T x, (N, C), in float32."""
    if not dy_RN.is_cuda:  # no product of narrow numbers is wide on other devices
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
        gate_up_NC: (2 F, C), contiguous: the matrix of gates, then that of factors.

    Returns:
        Gates and factors (R, 2 F), and y (R, F).
    """
    F = len(gate_up_NC) // 2
    is_small = x_RC.shape[1] <= LARGEST_GATED
    if is_small and _is_usable(x_RC, F) and _is_right("gated product", _gated_errors, x_RC, F):
        return _launch_gated(x_RC.contiguous(), gate_up_NC)
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
        down_CF: (C, F), contiguous: V.
        gate_up_RN: (R, 2 F), contiguous.
    """
    F = down_CF.shape[1]
    if _is_usable(do_RC, F) and _is_right("gated product backward", _gated_backward_errors, do_RC, F):
        return _launch_gated_backward(do_RC.contiguous(), down_CF, gate_up_RN)
    return swiglu.swiglu_gradient(do_RC @ down_CF, gate_up_RN)


@torch.library.register_fake("lfs::gated_product_backward")
def _(_do: Tensor, _down: Tensor, gate_up_RN: Tensor) -> Tensor:
    return gate_up_RN.new_empty(gate_up_RN.shape)


@operation("turned_product")
def turned_product(x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return the product, (R, N), with its first heads turned, as `rope.py` turns them.

    Args:
        x_RC: (R, C): sequences of T positions, one after the other.
        matrix_NC: (N, C), contiguous.
        cos: (T, D / 2), float32, contiguous, of each position.
        sin: (T, D / 2), float32, contiguous.
        heads: How many heads of D channels are turned. What follows stays as it is.
    """
    N, D = len(matrix_NC), 2 * cos.shape[1]
    if _is_usable(x_RC, N) and _is_right("turned product", _turned_errors, x_RC, N, D):
        return _launch_turned(x_RC.contiguous(), matrix_NC, cos, sin, heads)
    return _reference_turned(x_RC, matrix_NC, cos, sin, heads)


@torch.library.register_fake("lfs::turned_product")
def _empty_turned(x_RC: Tensor, matrix_NC: Tensor, *_: Any) -> Tensor:
    return x_RC.new_empty((len(x_RC), len(matrix_NC)))


def unavailable_reason(device: torch.device, dtype: torch.dtype, *channels: int) -> str | None:
    """Say why the kernels cannot take a product, or None when they can. They pay from `ROWS` rows on.

    Args:
        device: Where.
        dtype: Of x.
        channels: C, and those of the result.
    """
    reason = no_hopper_reason(device)
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
    return len(x_RC) >= ROWS and unavailable_reason(x_RC.device, x_RC.dtype, x_RC.shape[1], columns) is None


def _is_right(kernel: str, errors_of: Callable[..., list[float]], x: Tensor, *case: int) -> bool:
    """Return whether a kernel is to be used, as it does on few rows what the definition does."""
    return is_trusted(kernel, errors_of, x.device, x.dtype, *case, allowed=LARGEST_ERROR[x.dtype])


def _numbers(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """Return random matrices for a self-check."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


CHECK_ROWS, CHECK_CHANNELS = 200, 72
"""Of a self-check: whole tiles and steps, and parts of them."""


def _gated_errors(device: torch.device, dtype: torch.dtype, F: int) -> list[float]:
    x, matrix = _numbers(device, dtype, (CHECK_ROWS, CHECK_CHANNELS), (2 * F, CHECK_CHANNELS))
    matrix /= CHECK_CHANNELS**0.5
    right = x.double() @ matrix.double().T
    return relative_errors(_launch_gated(x, matrix), (right, swiglu.reference_activation("swiglu", right)))


def _gated_backward_errors(device: torch.device, dtype: torch.dtype, F: int) -> list[float]:
    shapes = (CHECK_ROWS, CHECK_CHANNELS), (CHECK_CHANNELS, F), (CHECK_ROWS, 2 * F)
    do, down, gate_up = _numbers(device, dtype, *shapes)
    down /= CHECK_CHANNELS**0.5
    right = swiglu.swiglu_gradient(do.double() @ down.double(), gate_up.double())
    return relative_errors([_launch_gated_backward(do, down, gate_up)], [right])


def _turned_errors(device: torch.device, dtype: torch.dtype, N: int, D: int) -> list[float]:
    x, matrix = _numbers(device, dtype, (CHECK_ROWS, CHECK_CHANNELS), (N, CHECK_CHANNELS))
    matrix /= CHECK_CHANNELS**0.5
    angles = 6.3 * torch.rand(CHECK_ROWS // 2, D // 2, device=device)
    turn = angles.cos(), angles.sin(), max(1, N // D - 1)
    return relative_errors([_launch_turned(x, matrix, *turn)], [_reference_turned(x.double(), matrix.double(), *turn)])


def _reference_turned(x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    a_BTN = (x_RC @ matrix_NC.T).unflatten(0, (-1, len(cos)))
    turned_BTHD = a_BTN[..., : heads * 2 * cos.shape[1]].unflatten(2, (heads, -1))
    turned_BTHD.copy_(rope.reference_qk_norm_rope(turned_BTHD, turned_BTHD[:, :, :0], cos, sin)[0])
    return a_BTN.flatten(0, 1)


def _launch_gated(x_RC: Tensor, gate_up_NC: Tensor) -> tuple[Tensor, Tensor]:
    from lfs_cli.kernels import hopper_swiglu

    gate_up_RN, y_RF = _empty_gated(x_RC, gate_up_NC)
    (gates, ups), (gate, up) = gate_up_NC.chunk(2), gate_up_RN.chunk(2, 1)
    result = describe(gate, TILE_ROWS // 2, TILE_COLUMNS), describe(up, TILE_ROWS // 2, TILE_COLUMNS), y_RF
    matrices = describe(gates, TILE_COLUMNS, STEP), describe(ups, TILE_COLUMNS, STEP)
    _launch(hopper_swiglu.forward, x_RC, *matrices, *result, width=TILE_COLUMNS, columns=y_RF.shape[1])
    return gate_up_RN, y_RF


def _launch_gated_backward(do_RC: Tensor, down_CF: Tensor, gate_up_RN: Tensor) -> Tensor:
    from lfs_cli.kernels import hopper_swiglu

    gradient_RN = torch.empty_like(gate_up_RN)
    matrices = (describe(matrix, STEP, TILE_COLUMNS) for matrix in (down_CF, down_CF[:, TILE_COLUMNS:]))
    columns = {"width": 2 * TILE_COLUMNS, "columns": down_CF.shape[1]}
    _launch(hopper_swiglu.backward, do_RC, *matrices, gate_up_RN, gradient_RN, **columns)
    return gradient_RN


def _launch_turned(x_RC: Tensor, matrix_NC: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    from lfs_cli.kernels import hopper_turned

    y_RN = _empty_turned(x_RC, matrix_NC)
    matrices = (describe(matrix, TILE_COLUMNS, STEP) for matrix in (matrix_NC, matrix_NC[TILE_COLUMNS:]))
    T, half = cos.shape
    columns = {"width": 2 * TILE_COLUMNS, "columns": len(matrix_NC)}
    _launch(hopper_turned.forward, x_RC, *matrices, y_RN, cos, sin, T, 2 * heads * half, **columns, D=2 * half)
    return y_RN


def _launch(kernel: Any, x_RC: Tensor, *arguments: Any, width: int, columns: int, **constants: int) -> None:
    """Start one program a processor, for tiles of so many columns of the result."""
    (R, C), device = x_RC.shape, x_RC.device
    across = -(-columns // width)
    tiles = -(-R // TILE_ROWS) * across
    with torch.cuda.device_of(x_RC):
        kernel[(min(_processors(device), tiles),)](
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


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

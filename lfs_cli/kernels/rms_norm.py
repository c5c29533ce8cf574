"""RMSNorm, and RMSNorm of a sum: the residual stream takes a sub-layer's result and is normalized for the next.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467), eq. 4.

Math, for one row of C channels; without a residual h = x:

    h  = x + residual                 r = 1 / sqrt(mean(h^2) + epsilon)
    n  = h r                          y = n w

    g  = dy w                         dh = r (g - n mean(g n)) + what comes to h from elsewhere
    dw = sum over rows of dy n        dx = dresidual = dh

Numerics: everything between loading and storing is float32. h is rounded to its type once and normalized as rounded,
          as it will be read by backward.
Memory:   saves h, which the model keeps anyway; r is computed again.
Layout:   a program owns whole rows, as many as make a tile of about `TILE` numbers, so that a sum over channels stays
          inside it. Forward: one tile. Backward: a fixed share of the rows, tile after tile, the next ones on their way
          to shared memory while one is worked on; the parts of dw add up in a float32 tile in registers, each program
          writes one row of a (programs, C) table, and `_sum_rows` sums that. No atomics: equal runs on one GPU are
          bit-equal.
Traffic:  forward reads x and residual and writes h and y, each once; backward reads h, dy and dh and writes one tensor.
          These bytes over the memory bandwidth are the floor of the time.
Limits:   C <= 8,192, float32, bfloat16 or float16. PyTorch does the rest: float64, other devices, no Triton, and
          whatever the kernels do wrong in the self-check, once a process for each C and type.
Where:    on a GPU outside of what torch.compile traces: with `compile=blocks` the norms before and behind the blocks,
          without it all, and those of a model that writes. Within, the compiler does one pass of a norm and the sum
          before it, at 4 TB/s on an H200 (2026-11-29, gpt2_small.json), and one of its backward and the sum after it,
          for which these kernels stand in forecasts. This backward was tried in its place, with that sum in it. A step
          of speedrun.json got 2.4 ms shorter then, but its optimizer had become 2.3 ms faster at the same time.
Measured: one H200, 2026-11-29, bfloat16, 32,768 rows, backward with dh, the L2 cache emptied before: C = 768 in 0.062
          ms, C = 512 in 0.047; what torch.compile makes of the formulas 0.102 and 0.068, and this kernel before its
          loads were on their way ahead (4 programs a processor, 2,048 numbers a tile) 0.098 and 0.069. Tried were 1,
          2 and 4 programs a processor, 1 to 8 rows, 4 and 8 warps, 1 to 3 stages.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import operation, programs_for, unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

MAX_CHANNELS = 8192
TILE = 4096
"""Numbers that a program works on at once."""

BACKWARD_PROGRAMS = 2
"""For every processor."""

BUFFER_BYTES = 96 * 1024
"""Of shared memory at most, for the tiles that are on their way in backward."""


@triton.jit
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    R,
    epsilon,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write y of BLOCK_R rows, and h where there is a residual; else both pointers are None."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    at = rows[:, None] * C + c[None, :]
    inside = (rows < R)[:, None] & (c < C)[None, :]
    h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, rounded, mask=inside)
        h = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(h * h, 1) * (1.0 / C) + epsilon)
    w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (h * r[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    dx_ptr,
    dweights_ptr,
    R,
    rows_each,
    epsilon,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write dx of `rows_each` rows, and their part of dw. `dh_ptr`, what comes to h from elsewhere, may be None."""
    first = tl.program_id(0).to(tl.int64) * rows_each
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(0, rows_each, BLOCK_R, num_stages=STAGES):
        rows = first + start + tl.arange(0, BLOCK_R)
        at = rows[:, None] * C + c[None, :]
        inside = (rows < R)[:, None] & (c < C)[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(h * h, 1) * (1.0 / C) + epsilon)
        n = h * tl.where(rows < R, r, 0.0)[:, None]  # without an epsilon, r is infinite where there is no row
        dw += dy * n
        g = dy * w[None, :]
        dx = r[:, None] * (g - n * (tl.sum(g * n, 1) * (1.0 / C))[:, None])
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweights_ptr + tl.program_id(0) * C + c, tl.sum(dw, 0), mask=c < C)


@triton.jit
def _sum_rows(x_ptr, sum_ptr, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write the sum over R rows of BLOCK_C of the C columns. PyTorch's own takes 11 us for 528 rows on an H200."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        inside = (rows < R)[:, None] & (c < C)[None, :]
        total += tl.load(x_ptr + rows[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(sum_ptr + c, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=c < C)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5, *, dtype: torch.dtype | None = None) -> Tensor:
    """Scale each row to unit mean square, then each channel by its weight. Differentiable, once.

    Args:
        x: (..., C).
        weight: (C,).
        epsilon: Added to the mean square.
        dtype: Of the result; by default that of ``x``.

    Returns:
        (..., C).

    Raises:
        ValueError: When ``weight`` does not fit ``x``.
    """
    _check(x, weight)
    dtype = dtype or x.dtype
    if unavailable(x, weight):
        return reference_rms_norm(x, weight, epsilon, dtype=dtype)
    return _RMSNorm.apply(x, None, weight, epsilon, dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float = 1e-5, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``rms_norm(h)`` and h = ``x + residual``, in one pass over memory. Differentiable, once.

    Args:
        x: (..., C): what a sub-layer gave out.
        residual: (..., C): the residual stream before it, often in a wider type.
        weight: (C,).
        epsilon: Added to the mean square.
        dtype: Of the first result; by default that of ``x``. h has the wider type of ``x`` and ``residual``.

    Returns:
        The norm and the sum, (..., C) each.

    Raises:
        ValueError: When the shapes do not fit together.
    """
    _check(x, weight)
    if x.shape != residual.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(x.shape)} and {tuple(residual.shape)}")
    dtype = dtype or x.dtype
    if unavailable(x, weight) or unavailable(residual, weight):
        return _reference_forward(x, residual, weight, epsilon, dtype)
    return _RMSNorm.apply(x, residual, weight, epsilon, dtype)


def unavailable(x: Tensor, weight: Tensor) -> str | None:
    """Say why the kernels cannot run on these tensors, or None when they can. PyTorch takes their place then."""
    reason = unavailable_reason(x.device.type, x.dtype) or unavailable_reason(weight.device.type, weight.dtype)
    return reason or (f"it has at most {MAX_CHANNELS:,} channels" if x.shape[-1] > MAX_CHANNELS else None)


def reference_rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5, *, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, in float32 or better. `rms_norm` has the arguments."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * r * weight).to(dtype or x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or x.shape[-1:] != weight.shape or not len(weight):
        raise ValueError(f"expected x (..., C) and weight (C,), got {tuple(x.shape)} and {tuple(weight.shape)}")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, h = _forward_operation(x, residual, weight, epsilon, dtype)
        ctx.save_for_backward(x if residual is None else h, weight)
        ctx.set_materialize_grads(False)
        ctx.epsilon, ctx.types = epsilon, (x.dtype, None if residual is None else residual.dtype)
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dy, dh = gradients if len(gradients) == 2 else (gradients[0], None)
        x_type, residual_type = ctx.types
        dweight = None
        if dy is not None:
            dh, dweight = _backward_operation(dy, dh, h, weight, ctx.epsilon)
        if dh is None:
            return None, None, None, None, None
        return dh.to(x_type), dh.to(residual_type) if residual_type else None, dweight, None, None


@operation("rms_norm")
def _forward_operation(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return y, and h, which is empty without a residual."""
    run = _launch_forward if _is_right("forward", x, weight, dtype, residual is not None) else _reference_forward
    return run(x, residual, weight, epsilon, dtype)


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    C = x.shape[-1]
    R = x.numel() // C
    y, h = _empty_results(x, residual, dtype)
    block_r, block_c, warps = _blocks(C, numbers=16)
    if R:
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(R, block_r),)](
                x.contiguous(),
                None if residual is None else residual.contiguous(),
                weight.contiguous(),
                y,
                None if residual is None else h,
                R,
                epsilon,
                C=C,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return y, h


@torch.library.register_fake("lfs::rms_norm")
def _(
    x: Tensor, residual: Tensor | None, _weight: Tensor, _epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _empty_results(x, residual, dtype)


def _empty_results(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if residual is None:
        return y, torch.empty(0, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)


@operation("rms_norm_backward")
def _backward_operation(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of h and of the weight."""
    run = _launch_backward if _is_right("backward", h, weight, dy.dtype, dh is not None) else _reference_backward
    return run(dy, dh, h, weight, epsilon)


def _launch_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    C = h.shape[-1]
    R = h.numel() // C
    block_r, block_c, warps = _blocks(C, numbers=32)
    tiles = triton.cdiv(R, block_r)
    programs = min(tiles, programs_for(h.device, BACKWARD_PROGRAMS))
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not R:
        return dx, torch.zeros_like(weight)
    dweights = torch.empty((programs, C), dtype=torch.float32, device=h.device)
    dweight = torch.empty_like(weight)
    with torch.cuda.device_of(h):
        _backward[(programs,)](
            dy.contiguous(),
            None if dh is None else dh.contiguous(),
            h.contiguous(),
            weight.contiguous(),
            dx,
            dweights,
            R,
            triton.cdiv(tiles, programs) * block_r,
            epsilon,
            C=C,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            STAGES=_stages(block_r * block_c, h.element_size()),
            num_warps=warps,
            enable_fp_fusion=True,
        )
        _sum_rows[(triton.cdiv(C, 16),)](dweights, dweight, programs, C, BLOCK_R=64, BLOCK_C=16)
    return dx, dweight


@torch.library.register_fake("lfs::rms_norm_backward")
def _(_dy: Tensor, _dh: Tensor | None, h: Tensor, weight: Tensor, _epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), torch.empty_like(weight)


def _reference_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 or better."""
    h = x if residual is None else x + residual
    return reference_rms_norm(h, weight, epsilon, dtype=dtype), x.new_empty(0) if residual is None else h


def _reference_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The gradients of the definition, in float32 or better."""
    wide = torch.promote_types(h.dtype, torch.float32)
    r = torch.rsqrt(h.to(wide).square().mean(-1, keepdim=True) + epsilon)
    n, g = h * r, dy.to(wide) * weight
    dx = r * (g - n * (g * n).mean(-1, keepdim=True)) + (0 if dh is None else dh)
    return dx.to(h.dtype), (dy.to(wide) * n).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)


def _is_right(step: str, x: Tensor, weight: Tensor, other: torch.dtype, is_sum: bool) -> bool:
    """Return whether a kernel is to be used, as it does on a small case what its definition does.

    The case needs no kernel that the call does not.

    Args:
        step: "forward" or "backward".
        x: (..., C). What is normalized.
        weight: (C,).
        other: Type of the result, or of its gradient.
        is_sum: Whether there is a residual, or a gradient of the sum.
    """
    case = step, x.shape[-1], x.dtype, weight.dtype, other, is_sum
    types = (x.dtype, other) if step == "forward" else (x.dtype, weight.dtype)
    return is_trusted(f"RMSNorm {step}", _errors, x.device, *case, allowed=max(LARGEST_ERROR[each] for each in types))


def _errors(
    device: torch.device,
    step: str,
    C: int,
    dtype: torch.dtype,
    weight_type: torch.dtype,
    other: torch.dtype,
    is_sum: bool,
) -> list[float]:
    """Return the errors of one step, with several tiles for each program of backward."""
    generator = torch.Generator(device).manual_seed(0)
    # A multiple of 16 in all and for a program, as in a call: Triton would compile another kernel for other numbers
    R = 16 * programs_for(device, BACKWARD_PROGRAMS) if step == "backward" else 48
    drawn = [torch.randn(R, C, generator=generator, device=device, dtype=torch.float32) for _ in range(3)]
    h, residual, dy = (x.to(each) for x, each in zip(drawn, (dtype, dtype, other), strict=True))
    weight = torch.randn(C, generator=generator, device=device, dtype=torch.float32).to(weight_type)
    second, second_wide = (residual, residual.double()) if is_sum else (None, None)
    if step == "forward":
        exact = _reference_forward(h.double(), second_wide, weight.double(), 0.1, torch.float64)
        return relative_errors(_launch_forward(h, second, weight, 0.1, other), exact)
    exact = _reference_backward(dy.double(), second_wide, h.double(), weight.double(), 0.1)
    return relative_errors(_launch_backward(dy, second, h, weight, 0.1), exact)


def _blocks(C: int, numbers: int) -> tuple[int, int, int]:
    """Return BLOCK_R, BLOCK_C and warps: so many numbers a thread, as far as 16 warps allow."""
    block_c = triton.next_power_of_2(C)
    block_r = max(1, min(32, TILE // block_c))
    return block_r, block_c, min(16, max(1, block_r * block_c // (32 * numbers)))


def _stages(tile: int, element_size: int) -> int:
    """Return how many tiles of h, dy and dh backward has on their way, and at work, at once: up to three of each."""
    return max(1, min(3, BUFFER_BYTES // (3 * tile * element_size)))

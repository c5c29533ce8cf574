"""QK-norm and rotary positions of queries and keys, in one pass over both.

Sources: Su et al., "RoFormer", 2021 (arXiv:2104.09864), eq. 34, for the rotation.
         Henry et al., "Query-Key Normalization for Transformers", 2020 (arXiv:2010.04245); here RMSNorm, before RoPE.

Math, for one head x of D channels at position t, with cos and sin of angle(t, i) for each pair i:

    r = 1 / sqrt(mean(x^2) + epsilon)         n = x r w             without weights, n = x
    y_2i   = n_2i cos_i - n_2i+1 sin_i
    y_2i+1 = n_2i sin_i + n_2i+1 cos_i

    backward: dn is dy turned back, by (cos, -sin); then, with g = dn w,
    dx = r (g - x r mean(g x r))              dw = sum over rows and heads of dn x r

Numerics: everything between loading and storing is float32; cos and sin are read as they are given, float32.
Memory:   saves q and k only with weights, and then as they came; r is computed again. Without them nothing but the
          tables, which all layers share.
Layout:   one program owns BLOCK_T positions of one sequence after the other and loops over all heads of q, then of k:
          cos and sin are read once for all of them. q and k are read where they lie, so they may be parts of one tensor
          of queries, keys and values; results are contiguous. Backward may write over what it reads, so that
          `rotary_attention.py` turns gradients where they lie: a program has read a tile whole before it writes it, and
          no other program touches it. With weights, backward gives each program a fixed share of the positions; its
          parts of dw add up in registers and are written as one row of a table that PyTorch sums. No atomics: equal
          runs on one GPU are bit-equal.
Traffic:  q and k read once and written once; backward with weights reads them a second time.
Limits:   D a power of two from 2 to 512; float32, bfloat16 or float16. PyTorch does the rest, and whatever the kernels
          do wrong in the self-check, once a process for each D and type, with and without weights.
Measured: one H200, 2026-11-29, in a compiled step of gpt2_small.json, for a layer of 32,768 positions: backward, and
          that of `swiglu.py`, 0.22 ms together, and stacking the gradients of q, k and v 0.07. The compiler's own took
          0.58 (rotation and stacking) and 0.21 (gate).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import operation, programs_for, unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors

MAX_HEAD_DIM = 512
TILE = 2048
"""Numbers of one head that a program works on at once."""


@triton.jit
def _pairs(x, BLOCK_T: tl.constexpr, D: tl.constexpr):
    """Return the even and the odd channels of a (BLOCK_T, D) tile, each (BLOCK_T, D / 2)."""
    return tl.split(tl.reshape(x, [BLOCK_T, D // 2, 2]))


@triton.jit
def _turned(even, odd, cos, sin, BLOCK_T: tl.constexpr, D: tl.constexpr):
    """Return a (BLOCK_T, D) tile whose pairs are turned by the angle."""
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_T, D])


@triton.jit
def _turn_heads(
    x_ptr,
    y_ptr,
    weight_ptr,
    x_strides,
    n,
    inside,
    cos,
    sin,
    epsilon,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Normalize, if `weight_ptr` is not None, and turn all heads at positions `n` (an index over B x T)."""
    d = tl.arange(0, D)
    mask = inside[:, None] & (d < D)[None, :]
    for head in tl.range(0, HEADS):
        x = tl.load(x_ptr + (n * x_strides[0] + head * x_strides[1])[:, None] + d[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if weight_ptr is not None:
            r = 1.0 / tl.sqrt(tl.sum(x * x, 1) * (1.0 / D) + epsilon)
            x = x * r[:, None] * tl.load(weight_ptr + d).to(tl.float32)[None, :]
        even, odd = _pairs(x, BLOCK_T, D)
        y = _turned(even, odd, cos, sin, BLOCK_T, D)
        tl.store(y_ptr + ((n * HEADS + head) * D)[:, None] + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn_heads_back(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dx_strides,
    x_strides,
    n,
    inside,
    cos,
    sin,
    dw,
    epsilon,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the gradients of all heads at positions `n`, and return `dw` with their part of the weight's added.

    dx lies as dy does, and may be the same tensor.
    """
    d = tl.arange(0, D)
    mask = inside[:, None] & (d < D)[None, :]
    for head in tl.range(0, HEADS):
        at = (n * dx_strides[0] + head * dx_strides[1])[:, None] + d[None, :]
        even, odd = _pairs(tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32), BLOCK_T, D)
        dx = _turned(even, odd, cos, -sin, BLOCK_T, D)
        if weight_ptr is not None:
            x = tl.load(x_ptr + (n * x_strides[0] + head * x_strides[1])[:, None] + d[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            r = 1.0 / tl.sqrt(tl.sum(x * x, 1) * (1.0 / D) + epsilon)
            x *= r[:, None]
            dw += dx * x
            g = dx * tl.load(weight_ptr + d).to(tl.float32)[None, :]
            dx = r[:, None] * (g - x * (tl.sum(g * x, 1) * (1.0 / D))[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dw


@triton.jit
def _angles(cos_ptr, sin_ptr, n, inside, T, D: tl.constexpr):
    """Return cos and sin at positions n mod T, (BLOCK_T, D / 2) each."""
    i = tl.arange(0, D // 2)
    at = ((n % T) * (D // 2))[:, None] + i[None, :]
    mask = inside[:, None] & (i < D // 2)[None, :]
    return tl.load(cos_ptr + at, mask=mask, other=1.0), tl.load(sin_ptr + at, mask=mask, other=0.0)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    q_strides,
    k_strides,
    N,
    T,
    epsilon,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Turn the queries and keys of BLOCK_T of the N = B T positions. Strides are those of (position, head)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = n < N
    cos, sin = _angles(cos_ptr, sin_ptr, n, inside, T, D)
    _turn_heads(q_ptr, q_out_ptr, q_weight_ptr, q_strides, n, inside, cos, sin, epsilon, H, D, BLOCK_T)
    _turn_heads(k_ptr, k_out_ptr, k_weight_ptr, k_strides, n, inside, cos, sin, epsilon, G, D, BLOCK_T)


@triton.jit
def _backward(
    dq_out_ptr,
    dk_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    dweights_ptr,
    dq_strides,
    dk_strides,
    q_strides,
    k_strides,
    N,
    T,
    each,
    epsilon,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the gradients at `each` positions, and their part of both weights': a row (2, D) of `dweights_ptr`."""
    dw_q = tl.zeros([BLOCK_T, D], tl.float32)
    dw_k = tl.zeros([BLOCK_T, D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * each
    for start in tl.range(0, each, BLOCK_T):
        n = first + start + tl.arange(0, BLOCK_T)
        inside = n < N
        cos, sin = _angles(cos_ptr, sin_ptr, n, inside, T, D)
        dw_q = _turn_heads_back(
            dq_out_ptr,
            q_ptr,
            q_weight_ptr,
            dq_ptr,
            dq_strides,
            q_strides,
            n,
            inside,
            cos,
            sin,
            dw_q,
            epsilon,
            H,
            D,
            BLOCK_T,
        )
        dw_k = _turn_heads_back(
            dk_out_ptr,
            k_ptr,
            k_weight_ptr,
            dk_ptr,
            dk_strides,
            k_strides,
            n,
            inside,
            cos,
            sin,
            dw_k,
            epsilon,
            G,
            D,
            BLOCK_T,
        )
    if dweights_ptr is not None:
        at = dweights_ptr + tl.program_id(0) * 2 * D + tl.arange(0, D)
        tl.store(at, tl.sum(dw_q, 0))
        tl.store(at + D, tl.sum(dw_k, 0))


def qk_norm_rope(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Normalize each head, if weights are given, then turn its pairs of channels by their positions.

    Differentiable once, in q, k and the weights.

    Args:
        q_BTHD: (B, T, H, D).
        k_BTGD: (B, T, G, D), in the type of ``q_BTHD``.
        cos: (T, D / 2), float32: of positions 0 to T - 1, or of others, such as ``rope.cos[start : start + T]``.
        sin: (T, D / 2), float32.
        q_weight: (D,), or None for no norm.
        k_weight: (D,); given when ``q_weight`` is.
        epsilon: Added to the mean square.

    Returns:
        Queries and keys as they came, contiguous.

    Raises:
        ValueError: For shapes that do not fit together.
    """
    check(q_BTHD, k_BTGD, cos, sin, q_weight, k_weight)
    if unavailable(q_BTHD, k_BTGD):
        return reference_qk_norm_rope(q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)
    return _Rope.apply(q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)


def unavailable(q_BTHD: Tensor, k_BTGD: Tensor) -> str | None:
    """Say why the kernels cannot run on these tensors, or None when they can. PyTorch takes their place then."""
    D = q_BTHD.shape[-1]
    if D & (D - 1) or D > MAX_HEAD_DIM:
        return f"it needs a power of two up to {MAX_HEAD_DIM} as channels per head, not {D}"
    return unavailable_reason(q_BTHD.device.type, q_BTHD.dtype)


def reference_qk_norm_rope(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 or better. `qk_norm_rope` has the arguments."""

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        n = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + epsilon) * weight
        even, odd = n.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(x.dtype)

    return turned(q_BTHD, q_weight), turned(k_BTGD, k_weight)


def check(
    q_BTHD: Tensor, k_BTGD: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> None:
    """Raise ValueError, in the terms of `qk_norm_rope`, unless these fit together."""
    shapes = f"q {tuple(q_BTHD.shape)}, k {tuple(k_BTGD.shape)}"
    if q_BTHD.ndim != 4 or k_BTGD.ndim != 4 or q_BTHD.shape[:2] != k_BTGD.shape[:2]:
        raise ValueError(f"expected q (B, T, H, D) and k (B, T, G, D), got {shapes}")
    (T, _, D), k_D = q_BTHD.shape[1:], k_BTGD.shape[3]
    if k_D != D or D % 2 or D == 0:
        raise ValueError(f"expected heads of one even number of channels, got {shapes}")
    if q_BTHD.dtype != k_BTGD.dtype:
        raise ValueError(f"q and k differ in type: {q_BTHD.dtype}, {k_BTGD.dtype}")
    if cos.shape != (T, D // 2) or sin.shape != (T, D // 2):
        raise ValueError(f"expected cos and sin {(T, D // 2)}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight are given together, or not at all")
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (D,):
            raise ValueError(f"expected weights {(D,)}, got {tuple(weight.shape)}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.epsilon = epsilon
        ctx.save_for_backward(*((None, None) if q_weight is None else (q_BTHD, k_BTGD)), cos, sin, q_weight, k_weight)
        return _forward_operation(q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        dq, dk, dweights = _backward_operation(*gradients, q, k, cos, sin, q_weight, k_weight, ctx.epsilon)
        dq_weight, dk_weight = (None, None) if q_weight is None else dweights.to(q_weight.dtype)
        return dq, dk, None, None, dq_weight, dk_weight, None


@operation("qk_norm_rope")
def _forward_operation(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    by = _launch_forward if _is_right(q_BTHD, k_BTGD, q_weight) else reference_qk_norm_rope
    return by(q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)


@torch.library.register_fake("lfs::qk_norm_rope")
def _(q_BTHD: Tensor, k_BTGD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_BTHD.new_empty(q_BTHD.shape), k_BTGD.new_empty(k_BTGD.shape)


@operation("qk_norm_rope_backward")
def _backward_operation(
    dq_out: Tensor,
    dk_out: Tensor,
    q_BTHD: Tensor | None,
    k_BTGD: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q and k, contiguous, and of both weights, (2, D), float32."""
    by = _launch_backward if _is_right(dq_out, dk_out, q_weight) else _reference_backward
    return by(dq_out, dk_out, q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)


@torch.library.register_fake("lfs::qk_norm_rope_backward")
def _(dq_out: Tensor, dk_out: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dweights = dq_out.new_empty((2, dq_out.shape[3]), dtype=torch.float32)
    return dq_out.new_empty(dq_out.shape), dk_out.new_empty(dk_out.shape), dweights


def _is_right(q_BTHD: Tensor, k_BTGD: Tensor, q_weight: Tensor | None) -> bool:
    """Return whether the kernels are to be used, as they do on a small case what the definitions do."""
    (H, D), G, dtype = q_BTHD.shape[2:], k_BTGD.shape[2], q_BTHD.dtype
    case = dtype, D, q_weight is not None
    return is_trusted("rotation", partial(_errors, H, G), q_BTHD.device, *case, allowed=LARGEST_ERROR[dtype])


def _errors(H: int, G: int, device: torch.device, dtype: torch.dtype, D: int, is_weighted: bool) -> list[float]:
    """Run the kernels that the call at hand needs, on parts of one tensor as it does, and the definitions."""
    generator = torch.Generator(device).manual_seed(0)
    B, T = 3, 16  # multiples of 16, so that Triton compiles no other kernel for them
    heads = torch.randn(B, T, 2 * (H + G), D, generator=generator, device=device).to(dtype)
    q, k, dq_out, dk_out = heads.split((H, G, H, G), dim=2)
    angles = 6.3 * torch.rand(T, D // 2, generator=generator, device=device)
    weights = torch.randn(2, D, generator=generator, device=device) if is_weighted else (None, None)
    saved = (q, k) if is_weighted else (None, None)

    def run(forward: Any, backward: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        q, k, dq_out, dk_out, *rest = tensors
        found = (*forward(q, k, *rest[2:], 1e-5), *backward(dq_out, dk_out, *rest, 1e-5))
        return found if is_weighted else found[:4]

    tensors = (q, k, dq_out, dk_out, *saved, angles.cos(), angles.sin(), *weights)
    right = run(reference_qk_norm_rope, _reference_backward, *(None if x is None else x.double() for x in tensors))
    return relative_errors(run(_launch_forward, _launch_backward, *tensors), right)


def _reference_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q_BTHD: Tensor | None,
    k_BTGD: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `reference_qk_norm_rope`, in float32 or better."""
    wide = torch.promote_types(dq_out.dtype, torch.float32)
    turned_back = reference_qk_norm_rope(dq_out.to(wide), dk_out.to(wide), cos, -sin)
    found, dweights = [], torch.zeros(2, dq_out.shape[3], dtype=wide, device=dq_out.device)
    for dn, x, weight, dweight in zip(turned_back, (q_BTHD, k_BTGD), (q_weight, k_weight), dweights, strict=True):
        dx = dn
        if x is not None and weight is not None:
            r = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + epsilon)
            n, g = x * r, dn * weight
            dx = r * (g - n * (g * n).mean(-1, keepdim=True))
            dweight.copy_((dn * n).sum((0, 1, 2)))
        found.append(dx.to(dq_out.dtype))
    return *found, dweights


def _launch_forward(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    (B, T, H, D), G = q_BTHD.shape, k_BTGD.shape[2]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHD, k_BTGD))
    q_BTHD, k_BTGD = _in_rows(q_BTHD), _in_rows(k_BTGD)
    block_t = _block_t(D)
    if B * T:
        with torch.cuda.device_of(q_BTHD):
            _forward[(triton.cdiv(B * T, block_t),)](
                q_BTHD,
                k_BTGD,
                cos.contiguous(),
                sin.contiguous(),
                q_weight,
                k_weight,
                q_out,
                k_out,
                _strides(q_BTHD),
                _strides(k_BTGD),
                B * T,
                T,
                epsilon,
                H=H,
                G=G,
                D=D,
                BLOCK_T=block_t,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return q_out, k_out


def _launch_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q_BTHD: Tensor | None,
    k_BTGD: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq_out, dk_out))
    gradients = dq_out.contiguous(), dk_out.contiguous()
    dweights = _launch_into(*gradients, dq, dk, q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon)
    return dq, dk, dq.new_zeros((2, dq.shape[3]), dtype=torch.float32) if dweights is None else dweights


def turn_back(
    dq_out: Tensor,
    dk_out: Tensor,
    dq: Tensor,
    dk: Tensor,
    q_BTHD: Tensor | None,
    k_BTGD: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> Tensor | None:
    """Run backward into tensors that are given: for operations that take it as their last step.

    Args:
        dq_out: (B, T, H, D). Gradient of the turned queries; positions at one stride, channels side by side.
        dk_out: (B, T, G, D), likewise.
        dq: Written: that of the queries. Lies as ``dq_out`` does, and may be it.
        dk: Written: that of the keys, likewise.
        q_BTHD: The queries as they came, where there are weights.
        k_BTGD: The keys, likewise.
        cos: As in `qk_norm_rope`, like all that follow.
        sin: (T, D / 2).
        q_weight: (D,), or None.
        k_weight: (D,), or None.
        epsilon: Added to the mean square.

    Returns:
        Gradients of both weights, (2, D), float32; None without weights.
    """
    rest = q_BTHD, k_BTGD, cos, sin, q_weight, k_weight, epsilon
    if unavailable(dq_out, dk_out) is None and _is_right(dq_out, dk_out, q_weight):
        return _launch_into(dq_out, dk_out, dq, dk, *rest)
    *found, dweights = _reference_backward(dq_out, dk_out, *rest)
    dq.copy_(found[0])
    dk.copy_(found[1])
    return None if q_weight is None else dweights


def _launch_into(
    dq_out: Tensor,
    dk_out: Tensor,
    dq: Tensor,
    dk: Tensor,
    q_BTHD: Tensor | None,
    k_BTGD: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
) -> Tensor | None:
    (B, T, H, D), G = dq_out.shape, dk_out.shape[2]
    q_BTHD, k_BTGD = (None if x is None else _in_rows(x) for x in (q_BTHD, k_BTGD))
    block_t = _block_t(D)
    tiles = triton.cdiv(B * T, block_t)
    programs = tiles if q_weight is None else min(tiles, programs_for(dq.device))
    dweights = None
    if q_weight is not None:
        dweights = torch.empty((programs, 2, D), dtype=torch.float32, device=dq.device)
    if tiles:
        with torch.cuda.device_of(dq):
            _backward[(programs,)](
                dq_out,
                dk_out,
                q_BTHD,
                k_BTGD,
                cos.contiguous(),
                sin.contiguous(),
                q_weight,
                k_weight,
                dq,
                dk,
                dweights,
                _strides(dq),
                _strides(dk),
                (0, 0) if q_BTHD is None else _strides(q_BTHD),
                (0, 0) if k_BTGD is None else _strides(k_BTGD),
                B * T,
                T,
                triton.cdiv(tiles, programs) * block_t,
                epsilon,
                H=H,
                G=G,
                D=D,
                BLOCK_T=block_t,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return None if dweights is None else dweights.sum(0)


def _in_rows(x_BTHD: Tensor) -> Tensor:
    """Return a tensor whose B x T positions lie at one stride, and its channels side by side; a copy if need be."""
    B, T = x_BTHD.shape[:2]
    at_one_stride = 1 in (B, T) or x_BTHD.stride(0) == T * x_BTHD.stride(1)
    return x_BTHD if at_one_stride and x_BTHD.stride(3) == 1 else x_BTHD.contiguous()


def _strides(x_BTHD: Tensor) -> tuple[int, int]:
    """Return those of (position, head). A single position of a sequence may claim any stride: the next is B's."""
    return x_BTHD.stride(0 if x_BTHD.shape[1] == 1 else 1), x_BTHD.stride(2)


def _block_t(D: int) -> int:
    return max(1, TILE // D)

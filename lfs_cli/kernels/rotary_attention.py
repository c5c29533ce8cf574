"""QK-norm, rotary positions and attention of heads in one tensor, whose gradient is made in one tensor too.

Sources: those of `rope.py` and `flash_attention.py`, whose kernels these are; here is what lies between them.

Math, with qkv the H query heads, G key heads and G value heads that one product with stacked weights makes:

    q', k' = turned(norm(q)), turned(norm(k))          o, L = attention(q', k', v')         v' = v, or v + added
    dq', dk', dv' = attention's gradients              dqkv = [back(dq'), back(dk'), dv']   dadded = dv'

Memory:   saves qkv, q', k', o and L: no more than the two operations save by themselves, as v is a part of qkv. With
          norm weights backward reads q and k in it. Where something is added to values, v' is saved too.
Layout:   forward reads qkv where it lies. Backward writes dq', dk' and dv into dqkv, each where it belongs, and then
          turns the first two in place. Without a norm, the kernels for Hopper GPUs turn both where they round them.
Traffic:  saves putting dq, dk and dv together, which reads and writes as much as there is of qkv: 0.07 ms for a layer
          of gpt2_small.json, see `rope.py`.
Measured: one H200, 2026-11-29, a compiled step of gpt2_small.json under the profiler: 1.14 of 54.3 ms less, of which
          0.84 for stacking gradients and 0.30 for turning dq where it is rounded. In one of speedrun.json,
          with 8 layers that add to their values, 2026-11-30: 40.8 ms, where separate operations had taken 43.7 the day
          before, up to 0.4 of which were Muon's.
Short:    where `short_attention.py` can run and there is no norm, one kernel turns and attends, and one goes all the
          way back. Then q' and k' are nowhere in memory, and qkv, o and L are what is saved. Shapes alone decide that,
          so that a trace of torch.compile decides as the call does; a kernel that fails its self-check is replaced
          inside of the operation.
Turned:   without norms, and where `hopper_product.py` can run, the product that makes qkv turns queries and keys, which
          are in memory once then: qkv, o and L are what is saved.
Limits:   those of both. Where the kernel of `rope.py` cannot run, the two operations take its place.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels import reference_attention, rope, short_attention
from lfs_cli.kernels.flash_attention import LARGEST_ERROR, checked_options, flash_attention, run_backward, unpacked
from lfs_cli.kernels.hopper_attention import is_aligned
from lfs_cli.kernels.operation import compute_dtype, operation
from lfs_cli.kernels.product import as_rows, matrix_for, weight_gradient
from lfs_cli.kernels.self_check import is_trusted, relative_errors


def rotary_attention(
    qkv_BTC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    added_BTGD: Tensor | None = None,
    epsilon: float = 1e-5,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return `flash_attention` of queries and keys that `qk_norm_rope` has turned. Differentiable, once.

    Works where those two do: under torch.compile, in CUDA graphs, under activation checkpointing, and under autocast,
    to whose type it casts first.

    Args:
        qkv_BTC: (B, T, (H + 2 G) D): query heads, then key heads, then value heads.
        cos: (T, D / 2), float32, of each position.
        sin: (T, D / 2), float32.
        q_weight: (D,), or None for no norm.
        k_weight: (D,); given when ``q_weight`` is.
        heads: H.
        kv_heads: G, which divides H.
        added_BTGD: (B, T, G, D). Added to the values; None for nothing.
        epsilon: Of the norm.
        causal: As in `flash_attention`, like all that follow.
        window: How far a query sees.
        documents: Cumulative lengths.
        implementation: What computes attention.

    Returns:
        (B, T, H, D), contiguous.

    Raises:
        ValueError: For shapes or options that do not fit together.
    """
    if qkv_BTC.ndim != 3 or heads < 1 or kv_heads < 1 or heads % kv_heads or qkv_BTC.shape[2] % (heads + 2 * kv_heads):
        raise ValueError(
            f"expected qkv (B, T, (H + 2 G) D) and G that divides H, got {tuple(qkv_BTC.shape)}, {heads} and {kv_heads}"
        )
    qkv_BTMD = qkv_BTC.to(compute_dtype(qkv_BTC)).unflatten(2, (heads + 2 * kv_heads, -1))
    q_BTHD, k_BTGD, v_BTGD = unpacked(qkv_BTMD, heads)
    turn = cos, sin, q_weight, k_weight
    rope.check(q_BTHD, k_BTGD, *turn)
    mask = {"causal": causal, "window": window, "documents": documents}
    if added_BTGD is not None and added_BTGD.shape != v_BTGD.shape:
        raise ValueError(f"expected {tuple(v_BTGD.shape)} to add to values, got {tuple(added_BTGD.shape)}")
    more = {"has_norm": q_weight is not None, "adds_values": added_BTGD is not None, "implementation": implementation}
    if not_short(q_BTHD, k_BTGD, v_BTGD, **mask, **more) is None:
        *_, deterministic, _ = checked_options(q_BTHD, k_BTGD, causal, None, None, None, None, None, implementation)
        scale = q_BTHD.shape[3] ** -0.5
        return _ShortAttention.apply(qkv_BTMD, heads, cos, sin, scale, deterministic, implementation)
    if rope.unavailable(q_BTHD, k_BTGD):
        q_BTHD, k_BTGD = rope.qk_norm_rope(q_BTHD, k_BTGD, *turn, epsilon=epsilon)
        v_BTGD = v_BTGD if added_BTGD is None else v_BTGD + added_BTGD.to(v_BTGD.dtype)
        return flash_attention(q_BTHD, k_BTGD, v_BTGD, **mask, implementation=implementation)
    options = checked_options(q_BTHD, k_BTGD, causal, None, window, None, documents, None, implementation)
    return _RotaryAttention.apply(qkv_BTMD, heads, added_BTGD, *turn, epsilon, *options)


def project_and_attend(
    x_BTC: Tensor,
    weights: Sequence[Tensor],
    cast_NC: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return `rotary_attention` of what a product makes of ``x``, which turns on the way. Differentiable, once.

    It is for where `product.pays`; elsewhere it takes longer than the two by themselves.

    Args:
        x_BTC: (B, T, C), in the type of the product.
        weights: Matrices of queries, keys and values, (its heads D, C) each.
        cast_NC: These below each other in the type of the product, or None.
        cos: (T, D / 2), float32.
        sin: (T, D / 2), float32.
        heads: H.
        causal: As in `flash_attention`, like all that follow.
        window: How far a query sees.
        documents: Cumulative lengths.
        implementation: What computes attention.

    Returns:
        (B, T, H, D), contiguous.

    Raises:
        ValueError: For shapes or options that do not fit together.
    """
    (B, T, C), (query, key, value), D = x_BTC.shape, weights, 2 * cos.shape[1]
    fit = query.shape == (heads * D, C) and key.shape == value.shape == (len(key) // D * D, C)
    if not fit or cos.shape != (T, D // 2) or sin.shape != cos.shape or not len(key) or heads * D % len(key):
        shapes = ", ".join(str(tuple(x.shape)) for x in (x_BTC, *weights, cos, sin))
        raise ValueError(
            f"expected x (B, T, C), matrices of H, G and G heads, (heads D, C) each, and cos and sin (T, D / 2), "
            f"got {shapes} and {heads} heads"
        )
    one_BT1D = x_BTC[..., :1, None].expand(B, T, 1, D)  # options depend on shapes alone
    options = checked_options(one_BT1D, one_BT1D, causal, None, window, None, documents, None, implementation)
    return _ProjectAndAttend.apply(x_BTC, cast_NC, cos, sin, heads, options[0], options[1:], *weights)


class _ProjectAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        cast_NC: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        spans_2BT: Tensor | None,
        options: tuple[Any, ...],
        *weights: Tensor,
    ) -> Tensor:
        matrix_NC, D = matrix_for(x_BTC, cast_NC, weights), 2 * cos.shape[1]
        turned = heads + len(weights[1]) // D
        qkv_RN = torch.ops.lfs.turned_product.default(as_rows(x_BTC), matrix_NC, cos, sin, turned)
        qkv_BTMD = qkv_RN.view(*x_BTC.shape[:2], len(matrix_NC) // D, D)
        o_BTHD, L_BHT = torch.ops.lfs.flash_attention.default(*unpacked(qkv_BTMD, heads), spans_2BT, *options)
        ctx.save_for_backward(x_BTC, matrix_NC, qkv_BTMD, o_BTHD, L_BHT, cos, sin, spans_2BT)
        ctx.options, ctx.rows = options, [len(weight) for weight in weights]
        return o_BTHD

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, matrix_NC, qkv_BTMD, o_BTHD, L_BHT, cos, sin, spans_2BT = ctx.saved_tensors
        q_BTHD, k_BTGD, _ = unpacked(qkv_BTMD, o_BTHD.shape[2])
        tensors = *gradients, qkv_BTMD, q_BTHD, k_BTGD, None, o_BTHD, L_BHT, cos, sin, None, None
        dqkv_BTMD, _ = _backward_operation(*tensors, 0.0, spans_2BT, *ctx.options)
        dqkv_RN = dqkv_BTMD.view(x_BTC.shape[:2].numel(), len(matrix_NC))
        dx = (dqkv_RN @ matrix_NC).view(x_BTC.shape) if ctx.needs_input_grad[0] else None
        dweights: Sequence[Tensor | None] = [None for _ in ctx.rows]
        if any(ctx.needs_input_grad[7:]):
            dweights = weight_gradient(dqkv_RN, as_rows(x_BTC)).split(ctx.rows)
        return dx, *(None for _ in range(6)), *dweights


def not_short(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    has_norm: bool = False,
    adds_values: bool = False,
    implementation: str = "auto",
) -> str | None:
    """Say why the kernels for short sequences do not turn and attend to such heads, or None when they do.

    Looks at types, shapes and the device, so the tensors may be fake. The arguments are those of `rotary_attention`,
    and whether there are norm weights and something is added to values.
    """
    if implementation not in ("auto", "hopper"):
        return "another kernel is asked for by name"
    if has_norm:
        return "it has no QK-norm"
    if adds_values:
        return "it adds nothing to values"
    mask = {"causal": causal, "window": window, "documents": documents}
    return short_attention.unavailable_reason(q_BTHD, k_BTGD, v_BTGD, **mask)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTMD: Tensor,
        heads: int,
        added_BTGD: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        epsilon: float,
        spans_2BT: Tensor | None,
        *options: Any,
    ) -> Tensor:
        q_BTHD, k_BTGD, v_BTGD = unpacked(qkv_BTMD, heads)
        sum_BTGD = None
        if added_BTGD is not None:
            v_BTGD = sum_BTGD = v_BTGD + added_BTGD.to(v_BTGD.dtype)
        turn = cos, sin, q_weight, k_weight
        # As operations, so that checkpointing knows what it keeps
        q_BTHD, k_BTGD = torch.ops.lfs.qk_norm_rope.default(q_BTHD, k_BTGD, *turn, epsilon)
        o_BTHD, L_BHT = torch.ops.lfs.flash_attention.default(q_BTHD, k_BTGD, v_BTGD, spans_2BT, *options)
        ctx.save_for_backward(qkv_BTMD, q_BTHD, k_BTGD, sum_BTGD, o_BTHD, L_BHT, *turn, spans_2BT)
        ctx.epsilon, ctx.options = epsilon, options
        ctx.added_type = None if added_BTGD is None else added_BTGD.dtype
        return o_BTHD

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, spans_2BT = ctx.saved_tensors
        dqkv_BTMD, dweights = _backward_operation(*gradients, *tensors, ctx.epsilon, spans_2BT, *ctx.options)
        q_weight = tensors[-2]
        dq_weight, dk_weight = (None, None) if q_weight is None else dweights.to(q_weight.dtype)
        dadded = None
        if ctx.added_type is not None:
            dadded = unpacked(dqkv_BTMD, tensors[1].shape[2])[2].to(ctx.added_type)
        return dqkv_BTMD, None, dadded, None, None, dq_weight, dk_weight, None, None, *(None for _ in ctx.options)


@operation("rotary_attention_backward")
def _backward_operation(
    do_BTHD: Tensor,
    qkv_BTMD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    sum_BTGD: Tensor | None,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    epsilon: float,
    spans_2BT: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of all M heads in one contiguous tensor, and of both norm weights, (2, D), float32.

    Values are those in qkv, or the sums of them and of what was added. Its queries and keys are read with norm weights
    alone, and without those may be turned already.
    """
    options = (spans_2BT, causal, scale, window, softcap, deterministic, implementation)
    dqkv_BTMD = torch.empty(qkv_BTMD.shape, dtype=qkv_BTMD.dtype, device=qkv_BTMD.device)
    (q_in, k_in, v_BTGD), (dq, dk, dv) = (unpacked(x, q_BTHD.shape[2]) for x in (qkv_BTMD, dqkv_BTMD))
    tensors = do_BTHD, q_BTHD, k_BTGD, v_BTGD if sum_BTGD is None else sum_BTGD, o_BTHD, L_BHT
    if q_weight is None:
        run_backward(*tensors, *options, turn=(cos, sin), dq=dq, dk=dk, dv=dv)
        return dqkv_BTMD, dq.new_zeros((2, dq.shape[3]), dtype=torch.float32)
    run_backward(*tensors, *options, dq=dq, dk=dk, dv=dv)
    dweights = rope.turn_back(dq, dk, dq, dk, q_in, k_in, cos, sin, q_weight, k_weight, epsilon)
    assert dweights is not None  # as there are weights
    return dqkv_BTMD, dweights


@torch.library.register_fake("lfs::rotary_attention_backward")
def _(_do: Tensor, qkv_BTMD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dweights = qkv_BTMD.new_empty((2, qkv_BTMD.shape[3]), dtype=torch.float32)
    return qkv_BTMD.new_empty(qkv_BTMD.shape), dweights


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BTMD: Tensor, heads: int, cos: Tensor, sin: Tensor, *options: Any) -> Tensor:
        o_BTHD, L_BHT = _short_operation(qkv_BTMD, heads, cos, sin, *options)
        ctx.save_for_backward(qkv_BTMD, o_BTHD, L_BHT, cos, sin)
        ctx.heads, ctx.options = heads, options
        return o_BTHD

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BTMD, o_BTHD, L_BHT, cos, sin = ctx.saved_tensors
        tensors = *gradients, qkv_BTMD, o_BTHD, L_BHT
        dqkv_BTMD = _short_backward_operation(*tensors, ctx.heads, cos, sin, *ctx.options)
        return dqkv_BTMD, None, None, None, *(None for _ in ctx.options)


@operation("short_attention")
def _short_operation(
    qkv_BTMD: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D), contiguous, and L (B, H, T), of queries and keys that are not turned yet."""
    if _is_short_right("forward", qkv_BTMD, heads):
        return short_attention.forward(*unpacked(_aligned(qkv_BTMD), heads), cos, sin, scale)
    q_BTHD, k_BTHD, v_BTHD = _turned(qkv_BTMD, heads, cos, sin)
    options = None, True, scale, None, None, deterministic, implementation
    return torch.ops.lfs.flash_attention.default(q_BTHD, k_BTHD, v_BTHD, *options)


@torch.library.register_fake("lfs::short_attention")
def _(qkv_BTMD: Tensor, heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, D = *qkv_BTMD.shape[:2], qkv_BTMD.shape[3]
    return qkv_BTMD.new_empty((B, T, heads, D)), qkv_BTMD.new_empty((B, heads, T), dtype=torch.float32)


@operation("short_attention_backward")
def _short_backward_operation(
    do_BTHD: Tensor,
    qkv_BTMD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    deterministic: bool,
    implementation: str,
) -> Tensor:
    """Return the gradient of all M heads, as they came, in one contiguous tensor."""
    dqkv_BTMD = torch.empty(qkv_BTMD.shape, dtype=qkv_BTMD.dtype, device=qkv_BTMD.device)
    into = dict(zip(("dq", "dk", "dv"), unpacked(dqkv_BTMD, heads), strict=True))
    if _is_short_right("backward", qkv_BTMD, heads):
        saved = *unpacked(_aligned(qkv_BTMD), heads), o_BTHD, L_BHT, _aligned(do_BTHD.contiguous())
        short_attention.backward(*saved, cos, sin, scale, **into)
        return dqkv_BTMD
    saved = do_BTHD, *_turned(qkv_BTMD, heads, cos, sin), o_BTHD, L_BHT
    options = None, True, scale, None, None, deterministic, implementation
    run_backward(*saved, *options, turn=(cos, sin), **into)
    return dqkv_BTMD


@torch.library.register_fake("lfs::short_attention_backward")
def _(_do: Tensor, qkv_BTMD: Tensor, *_: Any) -> Tensor:
    return qkv_BTMD.new_empty(qkv_BTMD.shape)


def _aligned(x_BTMD: Tensor) -> Tensor:
    """Return a tensor that the copy engine can read; a copy if need be, such as of a gradient that is expanded."""
    return x_BTMD if is_aligned(x_BTMD) else x_BTMD.clone(memory_format=torch.contiguous_format)


def _turned(qkv_BTMD: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys turned, and values: for another kernel in the place of one that is wrong."""
    q_BTHD, k_BTHD, v_BTHD = unpacked(qkv_BTMD, heads)
    is_kernel = rope.unavailable(q_BTHD, k_BTHD) is None
    turn = torch.ops.lfs.qk_norm_rope.default if is_kernel else rope.reference_qk_norm_rope
    q_BTHD, k_BTHD = turn(q_BTHD, k_BTHD, cos, sin, None, None, 0.0)
    return q_BTHD, k_BTHD, v_BTHD


def _is_short_right(step: str, qkv_BTMD: Tensor, heads: int) -> bool:
    """Return whether a kernel for short sequences is to be used, as it does on few heads what the definitions do."""
    T, dtype = qkv_BTMD.shape[1], qkv_BTMD.dtype
    case = dtype, short_attention.blocks_of(T)
    errors_of = partial(_short_errors, step, T, heads)
    return is_trusted(f"short attention {step}", errors_of, qkv_BTMD.device, *case, allowed=LARGEST_ERROR[dtype])


def _short_errors(step: str, T: int, heads: int, device: torch.device, dtype: torch.dtype, _blocks: int) -> list[float]:
    """Run one step of the kernels, on parts of one tensor as a call does, and the definitions in float64."""
    generator = torch.Generator(device).manual_seed(0)
    B, D, heads = 3, short_attention.HEAD_DIM, min(heads, 2)
    qkv, do = (torch.randn(B, T, n, D, generator=generator, device=device).to(dtype) for n in (3 * heads, heads))
    angles = 6.3 * torch.rand(T, D // 2, generator=generator, device=device)
    turn, how = (angles.cos(), angles.sin()), {"causal": True, "scale": D**-0.5}
    q, k, v = unpacked(qkv, heads)
    wide = *rope.reference_qk_norm_rope(q.double(), k.double(), *turn), v.double()
    o, L = reference_attention.forward(*wide, **how)
    if step == "forward":
        return relative_errors(short_attention.forward(q, k, v, *turn, how["scale"]), (o, L))
    dq, dk, dv = reference_attention.backward(*wide, o, L, do.double(), **how)
    exact = *rope.reference_qk_norm_rope(dq, dk, angles.cos(), -angles.sin()), dv
    found = unpacked(torch.empty_like(qkv), heads)
    into = dict(zip(("dq", "dk", "dv"), found, strict=True))
    short_attention.backward(q, k, v, o.to(dtype), L.float(), do, *turn, how["scale"], **into)
    return relative_errors(found, exact)

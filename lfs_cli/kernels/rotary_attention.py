"""QK-norm, rotary positions and attention of heads in one tensor, whose gradient is made in one tensor too.

Sources: those of `rope.py` and `flash_attention.py`, whose kernels these are; here is what lies between them.

Math, with qkv the H query heads, G key heads and G value heads that one product with stacked weights makes:

    q', k' = turned(norm(q)), turned(norm(k))          o, L = attention(q', k', v)
    dq', dk', dv = attention's gradients               dqkv = [back(dq'), back(dk'), dv]

Memory:   saves qkv, q', k', o and L: no more than the two operations save by themselves, as v is a part of qkv. With
          norm weights backward reads q and k in it.
Layout:   forward reads qkv where it lies. Backward writes dq', dk' and dv into dqkv, each where it belongs, and then
          turns the first two in place. Without a norm, the kernels for Hopper GPUs turn dq' where they round it.
Traffic:  saves putting dq, dk and dv together, which reads and writes as much as there is of qkv: 0.07 ms for a layer
          of gpt2_small.json, see `rope.py`.
Measured: one H200, 2026-11-29, a compiled step of gpt2_small.json under the profiler: 1.14 of 54.3 ms less, of which
          0.84 for stacking gradients and 0.30 for turning dq where it is rounded.
Limits:   those of both. Where the kernel of `rope.py` cannot run, the two operations take its place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfs_cli.kernels import rope
from lfs_cli.kernels.flash_attention import checked_options, flash_attention, run_backward, unpacked
from lfs_cli.kernels.operation import compute_dtype, operation


def rotary_attention(
    qkv_BTC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
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
    if rope.unavailable(q_BTHD, k_BTGD):
        q_BTHD, k_BTGD = rope.qk_norm_rope(q_BTHD, k_BTGD, *turn, epsilon=epsilon)
        how = {"causal": causal, "window": window, "documents": documents, "implementation": implementation}
        return flash_attention(q_BTHD, k_BTGD, v_BTGD, **how)
    options = checked_options(q_BTHD, k_BTGD, causal, None, window, None, documents, None, implementation)
    return _RotaryAttention.apply(qkv_BTMD, heads, *turn, epsilon, *options)


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTMD: Tensor,
        heads: int,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        epsilon: float,
        spans_2BT: Tensor | None,
        *options: Any,
    ) -> Tensor:
        q_BTHD, k_BTGD, v_BTGD = unpacked(qkv_BTMD, heads)
        turn = cos, sin, q_weight, k_weight
        # As operations, so that checkpointing knows what it keeps
        q_BTHD, k_BTGD = torch.ops.lfs.qk_norm_rope.default(q_BTHD, k_BTGD, *turn, epsilon)
        o_BTHD, L_BHT = torch.ops.lfs.flash_attention.default(q_BTHD, k_BTGD, v_BTGD, spans_2BT, *options)
        ctx.save_for_backward(qkv_BTMD, q_BTHD, k_BTGD, o_BTHD, L_BHT, *turn, spans_2BT)
        ctx.epsilon, ctx.options = epsilon, options
        return o_BTHD

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, spans_2BT = ctx.saved_tensors
        dqkv_BTMD, dweights = _backward_operation(*gradients, *tensors, ctx.epsilon, spans_2BT, *ctx.options)
        q_weight = tensors[-2]
        dq_weight, dk_weight = (None, None) if q_weight is None else dweights.to(q_weight.dtype)
        return dqkv_BTMD, None, None, None, dq_weight, dk_weight, None, None, *(None for _ in ctx.options)


@operation("rotary_attention_backward")
def _backward_operation(
    do_BTHD: Tensor,
    qkv_BTMD: Tensor,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
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
    """Return the gradient of all M heads in one contiguous tensor, and of both norm weights, (2, D), float32."""
    options = (spans_2BT, causal, scale, window, softcap, deterministic, implementation)
    dqkv_BTMD = torch.empty(qkv_BTMD.shape, dtype=qkv_BTMD.dtype, device=qkv_BTMD.device)
    (q_in, k_in, v_BTGD), (dq, dk, dv) = (unpacked(x, q_BTHD.shape[2]) for x in (qkv_BTMD, dqkv_BTMD))
    tensors = do_BTHD, q_BTHD, k_BTGD, v_BTGD, o_BTHD, L_BHT
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

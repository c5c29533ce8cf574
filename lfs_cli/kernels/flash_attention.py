"""Attention whose memory grows with T, not T x S: the public functions, and the choice of what computes them.

Three files compute the same thing, with the same functions (`unavailable_reason`, `forward`, `backward`):

    hopper_attention.py      for Hopper GPUs and the shapes of most models: the fastest
    triton_attention.py      for every NVIDIA GPU since compute capability 8.0, every shape and mask
    reference_attention.py   for everything else, by the definition, with all T x S scores in memory

`choose` takes the first of them that can run and says why. Forward and backward choose separately: each needs only
q, k, v, o and L, whoever made them. L, (B, H, T) in float32, is the log-sum-exp of each query's scores, by the natural
logarithm, so that exp(score - L) is the softmax. Nothing else is kept for backward.

Self-check: before a kernel is first used in a process, for each type and head dimension, it computes a small case that
is compared with the definition in float64. A kernel that does not compile, or is wrong, is passed over with a warning:
better a slow run than one on wrong numbers. It takes milliseconds, once the kernel is compiled.

To torch.compile each function is one opaque operation, in one graph with what is around it. Nothing waits for the GPU
or asks it for a number, so CUDA graphs can hold it, after one call outside of them in which the kernels are compiled.

Order of this file: the choice, the self-check, operations and their gradients, public functions.
"""

from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfs_cli.kernels.operation import compute_dtype, operation
from lfs_cli.kernels.reference_attention import document_spans
from lfs_cli.kernels.rope import reference_qk_norm_rope, turn_back
from lfs_cli.kernels.self_check import (
    Case,
    Check,
    Listed,
    begin_checks,
    fault_of,
    find_fault,
    is_known,
    known_fault,
    listed_checks,
    relative_errors,
)

IMPLEMENTATIONS = ("hopper", "triton", "reference")
"""Best first. Each is the file `<name>_attention.py`."""

DETERMINISTIC = ("triton", "reference")
"""Those whose gradients are equal to the bit in equal runs. Outputs always are."""

TURNED = "turned backward"
"""The step whose gradients are those of queries and keys before they were turned."""

TURNING = ("hopper",)
"""Those that turn the gradients of queries and keys back where they round them, one pass over them less."""

UNORDERED = "its gradients are summed in no fixed order, and deterministic ones are asked for"

CHECKED_LENGTH = 256
"""Queries and keys of the self-check: two blocks of any kernel."""

LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of the self-check, relative to the size of the result: about four roundings of the type; float32 sums in another
order. A forgotten mask, scale or block is off by far more."""


def choose(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    deterministic: bool | None = None,
    implementation: str = "auto",
) -> tuple[str, str]:
    """Say what `flash_attention` would run for these arguments, and why.

    Looks at types, shapes, strides and the device, not at numbers: the tensors may be fake, as `FakeTensorMode` makes.

    Returns:
        One of `IMPLEMENTATIONS`, and why no better one, such as "not hopper: it has no windows". The gradients are
        those of a later one where it sums in no fixed order and ``deterministic`` asks for one; the reason says so.

    Raises:
        ValueError: When ``implementation`` is named, not "auto", and cannot run.
    """
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    how = {"causal": causal, "window": window, "softcap": softcap, "documents": documents}
    refused = {}
    for name in _candidates(implementation):
        refusal = _refusal("forward", name, q_BTHD, k_BSGD, v_BSGD, how)
        is_unordered = deterministic and name not in DETERMINISTIC
        if refusal is None and is_unordered and name == implementation:
            refusal = UNORDERED
        if refusal is None:
            better = "; ".join(f"not {other}: {reason}" for other, reason in refused.items())
            why = better or ("chosen by name" if name == implementation else "the fastest here")
            return name, f"{why}; another for gradients, summed in a fixed order" if is_unordered else why
        refused[name] = refusal
    raise ValueError(f"flash_attention cannot run here: {refused[implementation]}")


def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why no kernel can run on such tensors here, or `None` when one can. The reference always can.

    Args:
        device_type: Such as "cuda" or "cpu". A CPU will do where kernels are interpreted (`TRITON_INTERPRET=1`).
        dtype: Type of queries, keys and values.
        head_dim: Channels per head (D).

    Returns:
        A phrase for a message, such as "head dimension 512 is above 256".
    """
    return _module("triton").unavailable_for(torch.device(device_type), dtype, head_dim)


def _candidates(implementation: str) -> tuple[str, ...]:
    if implementation == "auto":
        return IMPLEMENTATIONS
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: choose auto, {', '.join(IMPLEMENTATIONS)}")
    return (implementation,)


@cache
def _module(name: str) -> Any:
    """The file of an implementation, imported when it is first asked."""
    return import_module(f"lfs_cli.kernels.{name}_attention")


def _refusal(step: str, name: str, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> str | None:
    """Why this implementation is not to be used, as far as shapes and earlier checks tell; None if it is."""
    reason = _module(name).unavailable_reason(q, k, v, **how)
    return reason or known_fault(_key(step, name, q, k, how))


def _key(step: str, name: str, q: Tensor, k: Tensor, how: dict[str, Any]) -> Case:
    """What tells one kernel from another: options are compiled in by whether they are there, not by their numbers."""
    (H, D), G = q.shape[2:], k.shape[2]
    options = [x is not None and x is not False for x in how.values()]
    return step, name, q.device, q.dtype, D, H // G, *options, *_asked_of(step, name, q, how).values()


def _asked_of(step: str, name: str, q: Tensor, how: dict[str, Any]) -> dict[str, Any]:
    """What a self-check asks of an implementation besides, so that few rows run the kernel that those of q run."""
    return _module(name).check_options(step, q, causal=how["causal"]) if name == "hopper" else {}


def _pick(
    step: str,
    implementation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    deterministic: bool,
    how: dict[str, Any],
    *,
    begins_backward: bool = False,
) -> Any:
    """The module of the first implementation that can take this step and does it right.

    With ``begins_backward`` the check of the gradients begins beside that of this step.
    """
    mask = {"causal": how["causal"], "window": how["window"], "softcap": how["softcap"], "documents": how["spans"]}
    refusal = None
    for name in _candidates(implementation):
        refusal = _module(name).unavailable_reason(q, k, v, **mask)
        if step != "forward" and deterministic and name not in DETERMINISTIC:
            refusal = refusal or UNORDERED
        if refusal is None and name != "reference":
            case = _key(step, name, q, k, mask)
            if begins_backward and _may_begin(q) and not is_known(case):
                with listed_checks() as checks, suppress(Listed, ValueError):  # backward may refuse: it will say so
                    _pick("backward", implementation, q, k, v, deterministic, how)
                begin_checks(checks)
            check = Check(f"{name} attention", q.device, partial(_self_check, step, name, q, k, how))
            refusal = find_fault(case, check)
        if refusal is None:
            return _module(name)
    raise ValueError(f"flash_attention cannot run here: {refusal}")


def _may_begin(q: Tensor) -> bool:
    """Whether threads may launch kernels meanwhile: not while a CUDA graph is recorded, nor in the interpreter."""
    return q.is_cuda and not torch.cuda.is_current_stream_capturing()


def _self_check(step: str, name: str, q_BTHD: Tensor, k_BSGD: Tensor, how: dict[str, Any]) -> str | None:
    """Compare one step on a small case with the definition in float64. Return what is wrong, or None.

    The case has the heads and options of the call at hand, so that it needs no kernel that the call does not; only
    options that leave no gradient worth comparing, such as a window of 1, are widened.
    """
    (H, D), G, device, dtype = q_BTHD.shape[2:], k_BSGD.shape[2], q_BTHD.device, q_BTHD.dtype
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (
        torch.randn((1, CHECKED_LENGTH, heads, D), generator=generator, device=device, dtype=dtype)
        for heads in (H, G, G, H)
    )
    options = _given(how | {"spans": None, "scale": D**-0.5})
    options |= {name: max(how[name], least) for name, least in (("window", 32), ("softcap", 1.0)) if name in options}
    kernel, reference = _module(name), _module("reference")
    asked = _asked_of(step, name, q_BTHD, how)
    wide = [x.double() for x in (q, k, v)]
    exact = forward = reference.forward(*wide, **options)
    if step != "forward":
        exact = reference.backward(*wide, *forward, do.double(), **options)
    if step == TURNED and name in TURNING:
        angles = 6.3 * torch.rand(CHECKED_LENGTH, D // 2, generator=generator, device=device)
        options["turn"] = angles.cos(), angles.sin()
        dq, dk, dv = exact
        exact = *reference_qk_norm_rope(dq, dk, angles.cos(), -angles.sin()), dv

    def errors() -> list[float]:
        if step == "forward":
            ours = kernel.forward(q, k, v, **options, **asked)
        else:
            o, L = forward[0].to(dtype), forward[1].float()
            ours = kernel.backward(q, k, v, o, L, do, **options, **asked)
        return relative_errors(ours, exact)

    fault = fault_of(errors, LARGEST_ERROR[dtype])
    return fault and f"{step}: {fault}"


def _given(how: dict[str, Any]) -> dict[str, Any]:
    """The options that say something: an implementation without windows is not told of none."""
    return {name: value for name, value in how.items() if value is not None}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
    *,
    begins_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    how = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "spans": spans}
    chosen = _pick("forward", implementation, q, k, v, deterministic, how, begins_backward=begins_backward)
    return chosen.forward(q, k, v, **_given(how))


def run_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    L: Tensor,
    spans: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
    turn: tuple[Tensor, Tensor] | None = None,
    **into: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by the first implementation that can, inside of an operation.

    Takes what `lfs::flash_attention_backward` takes, and writes into ``dq``, ``dk`` and ``dv`` where they are given.
    With ``turn``, cos and sin of `rope.py`, dq and dk are those of queries and keys before they were turned.
    """
    how = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "spans": spans}
    chosen = _pick("backward" if turn is None else TURNED, implementation, q, k, v, deterministic, how)
    do = do.contiguous()  # a gradient may be expanded, as that of a sum is
    own = {"turn": turn} if turn is not None and chosen in map(_module, TURNING) else {}
    dq, dk, dv = chosen.backward(q, k, v, o.contiguous(), L, do, **_given(how), **own, **into)
    if turn is not None and not own:
        turn_back(dq, dk, dq, dk, None, None, *turn, None, None, 0.0)
    return dq, dk, dv


def _log_sum_exp_like(o_BTHD: Tensor) -> Tensor:
    B, T, H, _ = o_BTHD.shape
    return o_BTHD.new_empty((B, H, T), dtype=torch.promote_types(o_BTHD.dtype, torch.float32))


@operation("flash_attention")
def _attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    spans_2BT: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D), contiguous, and L (B, H, T)."""
    return _forward(q_BTHD, k_BSGD, v_BSGD, spans_2BT, causal, scale, window, softcap, deterministic, implementation)


@torch.library.register_fake("lfs::flash_attention")
def _(q_BTHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    o_BTHD = q_BTHD.new_empty(q_BTHD.shape)
    return o_BTHD, _log_sum_exp_like(o_BTHD)


@operation("flash_attention_backward")
def _attention_backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    spans_2BT: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, in the shapes of q, k and v."""
    options = (spans_2BT, causal, scale, window, softcap, deterministic, implementation)
    return run_backward(do_BTHD, q_BTHD, k_BSGD, v_BSGD, o_BTHD, L_BHT, *options)


@torch.library.register_fake("lfs::flash_attention_backward")
def _(_do: Tensor, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTHD.new_empty(q_BTHD.shape), k_BSGD.new_empty(k_BSGD.shape), v_BSGD.new_empty(v_BSGD.shape)


@operation("flash_attention_packed")
def _packed(
    qkv_BTMD: Tensor,
    heads: int,
    spans_2BT: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """`lfs::flash_attention` of M = H + 2 G heads in one tensor."""
    options = (spans_2BT, causal, scale, window, softcap, deterministic, implementation)
    return _forward(*unpacked(qkv_BTMD, heads), *options)


@torch.library.register_fake("lfs::flash_attention_packed")
def _(qkv_BTMD: Tensor, heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    o_BTHD = qkv_BTMD.new_empty((*qkv_BTMD.shape[:2], heads, qkv_BTMD.shape[3]))
    return o_BTHD, _log_sum_exp_like(o_BTHD)


@operation("flash_attention_packed_backward")
def _packed_backward(
    do_BTHD: Tensor,
    qkv_BTMD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    heads: int,
    spans_2BT: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    implementation: str,
) -> Tensor:
    """Return the gradient of all M heads in one contiguous tensor, each part written where it belongs."""
    options = (spans_2BT, causal, scale, window, softcap, deterministic, implementation)
    dqkv_BTMD = torch.empty(qkv_BTMD.shape, dtype=qkv_BTMD.dtype, device=qkv_BTMD.device)
    dq, dk, dv = unpacked(dqkv_BTMD, heads)
    run_backward(do_BTHD, *unpacked(qkv_BTMD, heads), o_BTHD, L_BHT, *options, dq=dq, dk=dk, dv=dv)
    return dqkv_BTMD


@torch.library.register_fake("lfs::flash_attention_packed_backward")
def _(_do: Tensor, qkv_BTMD: Tensor, *_: Any) -> Tensor:
    return qkv_BTMD.new_empty(qkv_BTMD.shape)


def unpacked(qkv_BTMD: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the H query heads, the G key heads and the G value heads."""
    kv_heads = (qkv_BTMD.shape[2] - heads) // 2
    q_BTHD, k_BTGD, v_BTGD = qkv_BTMD.split((heads, kv_heads, kv_heads), dim=2)
    return q_BTHD, k_BTGD, v_BTGD


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHD, k_BSGD, v_BSGD, spans_2BT, *ctx.options = inputs
    _keep(ctx, (q_BTHD, k_BSGD, v_BSGD), output, spans_2BT)


def _differentiate(ctx: Any, do_BTHD: Tensor, _dL: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(do_BTHD, *ctx.saved_tensors, *ctx.options), None, *(None for _ in ctx.options)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_BTMD, ctx.heads, spans_2BT, *ctx.options = inputs
    _keep(ctx, (qkv_BTMD,), output, spans_2BT)


def _differentiate_packed(ctx: Any, do_BTHD: Tensor, _dL: None) -> tuple[Tensor | None, ...]:
    qkv_BTMD, o_BTHD, L_BHT, spans_2BT = ctx.saved_tensors
    dqkv_BTMD = _packed_backward(do_BTHD, qkv_BTMD, o_BTHD, L_BHT, ctx.heads, spans_2BT, *ctx.options)
    return dqkv_BTMD, None, None, *(None for _ in ctx.options)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor], spans_2BT: Tensor | None) -> None:
    ctx.save_for_backward(*inputs, *output, spans_2BT)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in the shape of L for the gradient that it never has


class _Eager(torch.autograd.Function):
    """`lfs::flash_attention` without the way through torch's dispatcher, which takes as long as some of the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs, begins_backward=any(ctx.needs_input_grad))
        _save(ctx, inputs, output)
        return output

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, do_BTHD: Tensor, _dL: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # for gradients of gradients: the operation says that it has none
            return _differentiate(ctx, do_BTHD, _dL)
        return *run_backward(do_BTHD, *ctx.saved_tensors, *ctx.options), None, *(None for _ in ctx.options)


def _refuse(_ctx: Any, *_gradients: Tensor) -> None:
    raise RuntimeError("flash_attention can be differentiated once: its gradients have no gradients of their own")


torch.library.register_autograd("lfs::flash_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("lfs::flash_attention_packed", _differentiate_packed, setup_context=_save_packed)
torch.library.register_autograd("lfs::flash_attention_backward", _refuse)
torch.library.register_autograd("lfs::flash_attention_packed_backward", _refuse)


def flash_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    deterministic: bool | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Mix values by the similarity of queries to keys: softmax(scale q k^T) v, head by head. Differentiable, once.

    Query head h reads key/value head h G / H. The last query stands at the last key, so T < S means that the first
    S - T keys come from a cache. A query that sees no key gives 0. Works under torch.compile as one opaque operation,
    in CUDA graphs, under activation checkpointing, and under autocast, where it casts to the type of autocast as
    torch's own attention does. `reference_attention.py` is the definition of every argument.

    Args:
        q_BTHD: (B, T, H, D), float32, bfloat16 or float16, D up to 256.
        k_BSGD: (B, S, G, D) in the type of `q_BTHD`. G divides H.
        v_BSGD: (B, S, G, D) in the type of `q_BTHD`. All three are read in place if their last dimension is contiguous:
            heads that lie first, (B, H, T, D), are passed as `q.transpose(1, 2)`.
        causal: Query t sees keys up to t + S - T, the last query all. Else every query sees every key.
        scale: Factor of the scores, above 0; `None` is 1 / sqrt(D).
        window: Queries see only keys fewer than this many positions away: when causal, that many, up to their own.
            Blocks of keys outside are skipped, not masked.
        softcap: Scores are softcap tanh(score / softcap), so never larger.
        documents: (N + 1,), integers on the same device: cumulative lengths of N documents packed into the B x T
            positions, row after row. No query sees another document; blocks of those are skipped. `document_spans` has
            the details. Needs T = S.
        deterministic: Sum gradients in a fixed order, so that equal runs are equal to the bit; `None` does as
            `torch.use_deterministic_algorithms` says. The output always is.
        implementation: One of `IMPLEMENTATIONS`; "auto" takes the fastest that can run, see `choose`.

    Returns:
        (B, T, H, D), contiguous, in the type of the inputs.

    Raises:
        ValueError: For shapes, types, devices or options that do not fit together, and for an implementation that is
            named and cannot run.
    """
    q_BTHD, k_BSGD, v_BSGD = _cast(q_BTHD, k_BSGD, v_BSGD)
    _check(q_BTHD, k_BSGD, v_BSGD)
    options = checked_options(q_BTHD, k_BSGD, causal, scale, window, softcap, documents, deterministic, implementation)
    is_traced = torch.compiler.is_compiling() or type(q_BTHD) not in (Tensor, nn.Parameter)
    return (_attention if is_traced else _Eager.apply)(q_BTHD, k_BSGD, v_BSGD, *options)[0]


def flash_attention_packed(
    qkv: Tensor,
    *,
    kv_heads: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    deterministic: bool | None = None,
    implementation: str = "auto",
) -> Tensor:
    """`flash_attention` of queries, keys and values in one tensor, as one matrix product makes them, without copies.

    They are read where they lie, and backward writes their gradients into one tensor of the same shape.

    Args:
        qkv: (B, T, 3, H, D); or (B, T, H + 2 G, D), query heads, then key heads, then value heads.
        kv_heads: G, for the second shape.
        causal: As in `flash_attention`, like all that follow.
        scale: Factor of the scores.
        window: How far a query sees.
        softcap: Bound of the scores.
        documents: Cumulative lengths.
        deterministic: Sum in a fixed order.
        implementation: What computes it.

    Returns:
        (B, T, H, D), contiguous, in the type of `qkv`.

    Raises:
        ValueError: As `flash_attention` does, and when `kv_heads` does not fit the shape.
    """
    (qkv,) = _cast(qkv)
    qkv_BTMD, heads = _flat_heads(qkv, kv_heads)
    q_BTHD, k_BTGD, v_BTGD = unpacked(qkv_BTMD, heads)
    _check(q_BTHD, k_BTGD, v_BTGD)
    options = checked_options(q_BTHD, k_BTGD, causal, scale, window, softcap, documents, deterministic, implementation)
    return _packed(qkv_BTMD, heads, *options)[0]


class FlashAttention(torch.autograd.Function):
    """`flash_attention` of heads that lie first, or of a single one: the interface of Stanford CS336, assignment 2.

    >>> o = FlashAttention.apply(q, k, v, is_causal)      # q: (B, T, D) or (B, H, T, D); k and v: with S for T

    Saves q, k, v, o and L, which is (B, T) or (B, H, T). Under autocast, in its type, as `flash_attention` does.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        q, k, v = _cast(q, k, v)
        q_BTHD, k_BSGD, v_BSGD = (_heads_last(x) for x in (q, k, v))
        _check(q_BTHD, k_BSGD, v_BSGD)
        ctx.options = checked_options(q_BTHD, k_BSGD, is_causal, None, None, None, None, None, "auto")
        o_BTHD, L_BHT = _attention(q_BTHD, k_BSGD, v_BSGD, *ctx.options)
        o = o_BTHD.transpose(1, 2).view(q.shape)
        ctx.save_for_backward(q, k, v, o, L_BHT.view(q.shape[:-1]))
        return o

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, L = ctx.saved_tensors
        B, H, T = (L if L.ndim == 3 else L.unsqueeze(1)).shape
        heads = (_heads_last(x) for x in (*gradients, *inputs))
        found = _attention_backward(*heads, L.view(B, H, T), *ctx.options)
        return *(x.transpose(1, 2).reshape(like.shape) for x, like in zip(found, inputs, strict=False)), None


def _heads_last(x: Tensor) -> Tensor:
    """(B, T, D) or (B, H, T, D), seen as (B, T, H, D)."""
    return (x.unsqueeze(1) if x.ndim == 3 else x).transpose(1, 2)


def _cast(x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, all in its type; float64 stays, as it does in torch's own operations."""
    tensors = (x, *more)
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(tensor.to(compute_dtype(x)) for tensor in tensors)


def _flat_heads(qkv: Tensor, kv_heads: int | None) -> tuple[Tensor, int]:
    """Return (B, T, M, D) and H."""
    if qkv.ndim == 5 and qkv.shape[2] == 3 and kv_heads in (None, qkv.shape[3]):
        return qkv.flatten(2, 3), qkv.shape[3]
    if qkv.ndim == 4 and kv_heads is not None and 0 < 2 * kv_heads < qkv.shape[2]:
        return qkv, qkv.shape[2] - 2 * kv_heads
    raise ValueError(
        f"expected qkv (B, T, 3, H, D), or (B, T, H + 2 G, D) with kv_heads = G, got {tuple(qkv.shape)} with "
        f"kv_heads {kv_heads}"
    )


def checked_options(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    documents: Tensor | None,
    deterministic: bool | None,
    implementation: str,
) -> tuple[Any, ...]:
    """Check what is optional, and return it as the operations take it: spans first, then numbers."""
    B, T, _, D = q_BTHD.shape
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    spans = None
    if documents is not None:
        if documents.ndim != 1 or not len(documents) or documents.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"documents must be (N + 1,) integers, got {tuple(documents.shape)}, {documents.dtype}")
        if documents.device != q_BTHD.device:
            raise ValueError(f"documents are on {documents.device}, queries on {q_BTHD.device}")
        if k_BSGD.shape[1] != T:
            raise ValueError(f"documents need as many queries as keys, got {T} and {k_BSGD.shape[1]}")
        spans = document_spans(documents, B, T)
    _candidates(implementation)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    scale = D**-0.5 if scale is None else scale
    return spans, causal, scale, window, softcap, deterministic, implementation


def _check(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> None:
    """Raise ValueError, in the caller's terms, unless the three tensors fit together."""
    shapes = f"q {tuple(q_BTHD.shape)}, k {tuple(k_BSGD.shape)}, v {tuple(v_BSGD.shape)}"
    if q_BTHD.ndim != 4 or k_BSGD.ndim != 4 or k_BSGD.shape != v_BSGD.shape:
        raise ValueError(f"expected q (B, T, H, D) and k, v (B, S, G, D), got {shapes}")
    (B, _, H, D), G = q_BTHD.shape, k_BSGD.shape[2]
    if k_BSGD.shape[0] != B or k_BSGD.shape[3] != D:
        raise ValueError(f"q, k and v differ in batch or head dimension: {shapes}")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads cannot share {G} key/value heads: {shapes}")
    if not q_BTHD.dtype == k_BSGD.dtype == v_BSGD.dtype:
        raise ValueError(f"q, k and v differ in type: {q_BTHD.dtype}, {k_BSGD.dtype}, {v_BSGD.dtype}")
    if not q_BTHD.is_floating_point() or D == 0:
        raise ValueError(f"expected floating-point heads of at least one channel, got {q_BTHD.dtype}, {shapes}")
    if not q_BTHD.device == k_BSGD.device == v_BSGD.device:
        raise ValueError(f"q, k and v are on different devices: {q_BTHD.device}, {k_BSGD.device}, {v_BSGD.device}")

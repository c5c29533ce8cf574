"""Attention: each position mixes the values of those before it, by the similarity of its query to their keys.

    o_t = sum_s p_ts v_s          p_t = softmax_s(q_t . k_s / sqrt(D)), over s <= t

A backend is a function of queries (B, T, H, D), keys and values (B, S, G, D); query head h reads key/value head
h G / H. The last query sits at the last key, so T < S means that the first S - T keys come from a cache:

    T = 2, S = 5:   1 1 1 1 0
                    1 1 1 1 1

`reference` is the definition, `standard` the same in the input's own type with all B x H x T x S scores in memory,
`flash` a kernel that never stores them: both are differentiable once. `auto` is a choice between these two, made by
`resolve_attention`. `hopper` and `triton` are `flash` held to one of its kernels. In training `rotary_attention` takes
the place of `flash`, and has a kernel of its own for short sequences.

A `window` lets a query see the latest keys only, its own included. `documents` keep it within its own: the cumulative
lengths of the documents that lie one after another in the batch, row after row (`document_lengths`):

    window = 2:     0 0 1 1 0          documents 0 3 5, T = S = 5:     1 0 0 0 0
                    0 0 0 1 1                                          1 1 0 0 0
                                                                       1 1 1 0 0
                                                                       0 0 0 1 0
                                                                       0 0 0 1 1

Sources: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762), eq. 1.
         Ainslie et al., "GQA", 2023 (arXiv:2305.13245), for key/value heads that query heads share.
         Henry et al., "Query-Key Normalization for Transformers", 2020 (arXiv:2010.04245); here RMSNorm before RoPE.
         Beltagy et al., "Longformer", 2020 (arXiv:2004.05150), section 3.1, for windows; Brown et al., 2020
         (arXiv:2005.14165), section 2.1, for layers with and without one in turn.
         Zhou et al., "Value Residual Learning", 2024 (arXiv:2410.17897), for values with a way around the layers; as
         tables of their own, mixed in by learned weights, they come from the records of Jordan's modded-nanoGPT.
"""

from functools import cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import once_differentiable

from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.kernels import flash_attention as flash
from lfs_cli.kernels import product
from lfs_cli.kernels.hopper_attention import HEAD_DIMS as HOPPER_HEAD_DIMS
from lfs_cli.kernels.operation import compute_dtype, on_gpu
from lfs_cli.kernels.reference_attention import document_spans, visible
from lfs_cli.kernels.rope import qk_norm_rope
from lfs_cli.kernels.rotary_attention import not_short, project_and_attend, rotary_attention
from lfs_cli.kernels.short_attention import HEAD_DIM as SHORT_HEAD_DIM
from lfs_cli.model.cache import KVCache
from lfs_cli.model.layers import (
    Linear,
    kept_cast,
    multiply_together,
    pays_to_stack,
    softmax,
    stacked,
    stacked_matrix,
    sums_wide,
)
from lfs_cli.model.norm import RMSNorm
from lfs_cli.model.rope import RotaryEmbedding
from lfs_cli.registry import Registry


class Attend(Protocol):
    """Mix values by the similarity of queries to keys: softmax(q k^T / sqrt(D)) v, head by head.

    A backend that has windows or borders of documents takes them by name, as `window` and `documents`.
    """

    def __call__(
        self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True, **mask: Any
    ) -> Tensor: ...


ATTENTION: Registry[Attend] = Registry("attention backend", room="lfs_cli.model")


@ATTENTION.register("reference")
def attend_reference(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The definition, at float32 or better. Every other backend is tested against it."""
    H, D, G = *q_BTHD.shape[2:], k_BSGD.shape[2]
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    q_BHTD = q_BTHD.transpose(1, 2).to(wide)
    k_BHSD, v_BHSD = (x.repeat_interleave(H // G, dim=2).transpose(1, 2).to(wide) for x in (k_BSGD, v_BSGD))

    with torch.autocast(q_BTHD.device.type, enabled=False):
        score_BHTS = q_BHTD @ k_BHSD.mT / D**0.5
        seen_NTS = _visible(q_BTHD, k_BSGD, causal, window, documents)
        score_BHTS = score_BHTS.masked_fill(~seen_NTS[:, None], float("-inf"))
        o_BHTD = softmax(score_BHTS) @ v_BHSD
    return o_BHTD.transpose(1, 2).to(q_BTHD.dtype)


@ATTENTION.register("standard")
def attend_standard(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The textbook way, in the type of the input: fast for short sequences, and O(T S) in memory.

    Query heads that share a key/value head are stacked as more queries of it, so that nothing is repeated.
    """
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    q_NTD = q_BTHD.transpose(1, 2).reshape(B * G, H // G * T, D)
    k_NSD, v_NSD = (x.transpose(1, 2).reshape(B * G, S, D) for x in (k_BSGD, v_BSGD))
    seen_NTS = _visible(q_BTHD, k_BSGD, causal, window, documents)
    mask_NTS = torch.zeros(seen_NTS.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    mask_NTS = mask_NTS.masked_fill_(~seen_NTS, float("-inf")).repeat(1, H // G, 1)
    mask_NTS = mask_NTS[0] if documents is None else mask_NTS.repeat_interleave(G, 0)
    o_NTD = _StandardAttention.apply(q_NTD, k_NSD, v_NSD, mask_NTS)
    return o_NTD.view(B, H, T, D).transpose(1, 2)


def _visible(q_BTHD: Tensor, k_BSGD: Tensor, causal: bool, window: int | None, documents: Tensor | None) -> Tensor:
    """Return (1 or B, T, S), boolean: True where a query sees a key."""
    (B, T), S = q_BTHD.shape[:2], k_BSGD.shape[1]
    spans = None if documents is None else document_spans(documents, B, T)
    return visible(T, S, q_BTHD.device, causal=causal, window=window, spans=spans)


class _StandardAttention(torch.autograd.Function):
    """Scores, softmax and mix, keeping only the probabilities: half the time and memory of separate steps on a CPU.

    p = softmax(q k^T / sqrt(D) + mask)               o = p v
    dv = p^T do        ds = p (do v^T - do.o) / sqrt(D)        dq = ds k        dk = ds^T q

    Source: Dao et al., "FlashAttention", 2022 (arXiv:2205.14135), appendix B.2, for do.o in place of a sum over p dp.
    """

    @staticmethod
    def forward(ctx: Any, q_NTD: Tensor, k_NSD: Tensor, v_NSD: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(q_NTD.device.type, enabled=False):
            p_NTS = torch.baddbmm(mask, q_NTD, k_NSD.mT, alpha=q_NTD.shape[-1] ** -0.5)
            p_NTS.sub_(p_NTS.amax(-1, keepdim=True)).exp_()
            p_NTS.div_(p_NTS.sum(-1, keepdim=True))
            o_NTD = p_NTS @ v_NSD
        ctx.save_for_backward(q_NTD, k_NSD, v_NSD, p_NTS, o_NTD)
        return o_NTD

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  torch types this decorator more loosely than the method
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (do_NTD,), (q_NTD, k_NSD, v_NSD, p_NTS, o_NTD) = gradients, ctx.saved_tensors
        with torch.autocast(q_NTD.device.type, enabled=False):
            ds_NTS = do_NTD @ v_NSD.mT
            ds_NTS.sub_((do_NTD * o_NTD).sum(-1, keepdim=True)).mul_(p_NTS).mul_(q_NTD.shape[-1] ** -0.5)
            return ds_NTS @ k_NSD, ds_NTS.mT @ q_NTD, p_NTS.mT @ do_NTD, None


@ATTENTION.register("flash")
def attend_flash(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Our kernels, forward and backward, with O(T) memory: the fastest that can run."""
    how = {"causal": causal, "window": window, "documents": documents, "implementation": implementation}
    return flash.flash_attention(q_BTHD, k_BSGD, v_BSGD, **how)


@ATTENTION.register("hopper")
def attend_hopper(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True) -> Tensor:
    """The kernel for Hopper GPUs, or an error."""
    return attend_flash(q_BTHD, k_BSGD, v_BSGD, causal=causal, implementation="hopper")


@ATTENTION.register("triton")
def attend_triton(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The portable kernel, or an error."""
    how = {"causal": causal, "window": window, "documents": documents, "implementation": "triton"}
    return attend_flash(q_BTHD, k_BSGD, v_BSGD, **how)


_KERNELS = {"flash": "auto", "hopper": "hopper", "triton": "triton"}
"""Backends that are `flash_attention`, and the implementation they ask it for."""


def resolve_attention(
    name: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    length: int = 1_024,
    window: int | None = None,
    has_documents: bool = False,
    rotates: bool = False,
    qk_norm: bool = False,
) -> tuple[str, str]:
    """Say which backend ``name`` stands for here, and why.

    Args:
        name: Registered backend, or `auto`: `flash` on a GPU that can run it, else `standard`.
        device_type: Such as "cuda" or "cpu".
        dtype: Type of queries, keys and values; under autocast, the one it casts to.
        head_dim: Channels per head (D).
        heads: Query heads (H). Like the next two, it may decide which kernel `flash` takes.
        kv_heads: Key/value heads (G); None for as many.
        length: Positions in a sequence (T).
        window: Positions that a layer sees, when one has fewer than all.
        has_documents: Whether attention is to keep to a document.
        rotates: Whether queries and keys are turned by their positions first, which one kernel may do with the rest.
        qk_norm: Whether they are normalized before that.

    Returns:
        The registered name and the reason in a few words. That of `flash` starts with the kernel it takes.

    Raises:
        ConfigError: When no backend has that name, or the one that has it has no such mask.
        DeviceError: When a kernel is asked for by name and cannot run here.
    """
    backend, reason = _resolve_once(name, device_type, dtype, head_dim)
    _check_mask(backend, window is not None, has_documents)
    if backend not in _KERNELS:
        return backend, reason
    with FakeTensorMode():  # tensors without memory: the choice looks at their shapes
        q_BTHD, k_BSGD, v_BSGD = (
            torch.empty((1, length, count, head_dim), dtype=dtype, device=device_type)
            for count in (heads, kv_heads or heads, kv_heads or heads)
        )
        documents = torch.empty(2, dtype=torch.int64, device=device_type) if has_documents else None
    how = {"window": window, "documents": documents, "implementation": _KERNELS[backend]}
    try:
        kernel, why = flash.choose(q_BTHD, k_BSGD, v_BSGD, **how)
    except ValueError as error:
        raise DeviceError(
            f"attention `{name}` cannot run here: {str(error).split(': ', 1)[1]}",
            hint="use `--set model.attention=auto`, which takes the fastest backend that can",
        ) from None
    reason = f"{kernel} kernel; {why}"
    if not rotates or head_dim != SHORT_HEAD_DIM or _KERNELS[backend] != "auto":
        return backend, reason
    refusal = not_short(q_BTHD, k_BSGD, v_BSGD, window=window, documents=documents, has_norm=qk_norm)
    if refusal is None:
        return backend, f"short kernel, rotation included; without gradients {reason}"
    return backend, reason if refusal in why else f"{reason}; not short: {refusal}"


def _check_mask(backend: str, has_window: bool, has_documents: bool = False) -> None:
    """Raise ConfigError when a backend is asked for a mask that it does not take."""
    asked = [("window", "model.window", has_window), ("documents", "data.documents", has_documents)]
    for mask, setting, is_asked in asked:
        able = [name for name in ATTENTION.names() if mask in signature(ATTENTION.get(name)).parameters]
        if is_asked and backend not in able:
            raise ConfigError(
                f"attention `{backend}` has no `{mask}`, which `{setting}` asks for",
                hint=f"set `model.attention` to one of {', '.join(f'`{name}`' for name in ['auto', *able])}",
            )


@cache
def _resolve_once(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The backend and why, as far as every call of a model has it in common."""
    reason = flash.unavailable_reason(device_type, dtype, head_dim)
    if name == "auto":
        if device_type != "cuda":
            return "standard", f"`flash` is for CUDA GPUs, and this is {device_type}"
        return ("standard", reason) if reason else ("flash", "its memory grows with T, not T x T")
    ATTENTION.get(name)
    if name in _KERNELS and reason:
        raise DeviceError(
            f"attention `{name}` cannot run here: {reason}",
            hint="use `--set model.attention=auto`, which takes the fastest backend that can",
        )
    return name, "chosen by name"


@torch.compiler.assume_constant_result
def _resolved_name(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The name alone: looked up once, and a constant to torch.compile."""
    return _resolve_once(name, device_type, dtype, head_dim)[0]


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for any leading dimensions and any mask.

    Args:
        q: (..., T, D). Queries.
        k: (..., S, D). Keys.
        v: (..., S, any). Values.
        mask: (..., T, S), boolean: True where a query may attend to a key. Each query needs at least one.

    Returns:
        (..., T, any), in the type of the inputs.
    """
    score = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf"))
    return softmax(score) @ v


class Attention(nn.Module):
    """Causal self-attention with H query heads that share G key/value heads.

    Args:
        width: Channels in and out (C), a multiple of ``heads``.
        heads: Query heads (H).
        kv_heads: Key/value heads (G); by default as many as query heads.
        rope: Rotation of queries and keys by their positions; None leaves them.
        qk_norm: Normalize each query and key head first.
        epsilon: Of that norm.
        backend: Name in `ATTENTION`, or `auto`.
        layer: Index of the block, which is its place in a KVCache.
        window: Positions that a query sees, up to its own; None for all before it.
        mixes_values: Be ready for a vector besides the hidden state from which values are taken.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        rope: RotaryEmbedding | None = None,
        qk_norm: bool = False,
        epsilon: float = 1e-5,
        backend: str = "auto",
        layer: int = 0,
        window: int | None = None,
        mixes_values: bool = False,
    ) -> None:
        super().__init__()
        # A wrong name is answered here, and the table is filled before torch.compile traces a look into it
        ATTENTION.get("standard" if backend == "auto" else backend)
        if window is not None:
            _check_mask("standard" if backend == "auto" else backend, has_window=True)
        self.mask = {} if window is None else {"window": window}
        self.head_dim = width // heads
        self.backend, self.layer, self.rope, self.epsilon = backend, layer, rope, epsilon
        kv_width = self.head_dim * (kv_heads or heads)
        self.query = Linear(width, width)
        self.key = Linear(width, kv_width)
        self.value = Linear(width, kv_width)
        self.output = Linear(width, width)
        self.query_norm = RMSNorm(self.head_dim, epsilon) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, epsilon) if qk_norm else None
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes_values else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        documents: Tensor | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        """Let each position read from itself and those before it.

        Args:
            x: (..., T, C).
            positions: (..., T), integers for the rotation; by default they count on from the cache, or from 0.
            cache: Keys and values of earlier positions; the new ones are appended.
            documents: (N + 1,), cumulative lengths of the documents in the batch, for attention within each.
            value_BTC: (B, T, G D). Mixed into the values, where the layer is ready for it.

        Returns:
            (..., T, C).
        """
        x_BTC = x.reshape(-1, *x.shape[-2:])
        mask = self.mask if documents is None else {**self.mask, "documents": documents}
        if positions is None and cache is None:
            kernel = self._kernel_of_all(x_BTC)
            if kernel is not None:
                return self.output(self._attend_packed(x_BTC, value_BTC, mask, kernel).flatten(-2)).view(x.shape)
        q_BTHD, k_BTGD, v_BTGD = (
            channels.unflatten(-1, (-1, self.head_dim))
            for channels in multiply_together(x_BTC, (self.query, self.key, self.value))
        )
        if self.value_mix is not None and value_BTC is not None:
            own, other = self.value_mix.to(v_BTGD.dtype)
            v_BTGD = own * v_BTGD + other * value_BTC.to(v_BTGD.dtype).view(v_BTGD.shape)
        if positions is not None:
            positions = positions.expand(x.shape[:-1]).reshape(-1, 1, x.shape[-2])
        q_BTHD, k_BTGD = self._turned(q_BTHD, k_BTGD, positions, 0 if cache is None else cache.length)
        k_BSGD, v_BSGD = (k_BTGD, v_BTGD) if cache is None else cache.append(self.layer, k_BTGD, v_BTGD)

        attend = ATTENTION.get(self._backend_for(q_BTHD, q_BTHD.dtype))
        mixed_BTHD = attend(q_BTHD, k_BSGD, v_BSGD, causal=True, **mask)
        return self.output(mixed_BTHD.flatten(-2)).view(x.shape)

    def _backend_for(self, x: Tensor, dtype: torch.dtype) -> str:
        """Return the name of the backend for tensors of this type, where ``x`` is."""
        if isinstance(x, FakeTensor) and self.backend in _KERNELS:  # no numbers, no kernel: any machine can run it
            return self.backend
        return _resolved_name(self.backend, x.device.type, dtype, self.head_dim)

    def _kernel_of_all(self, x_BTC: Tensor) -> str | None:
        """Return what turns and attends as one operation on all heads, which is for training by kernels, or None."""
        if self.rope is None or not pays_to_stack(x_BTC):
            return None
        return _KERNELS.get(self._backend_for(x_BTC, compute_dtype(x_BTC)))

    def _attend_packed(self, x_BTC: Tensor, value_BTC: Tensor | None, mask: dict[str, Any], kernel: str) -> Tensor:
        """Return (B, T, H, D): all before the last product. The gradients of q, k and v come back in one tensor."""
        assert self.rope is not None  # `_kernel_of_all`
        layers = self.query, self.key, self.value
        heads, kv_heads = (len(layer.weight) // self.head_dim for layer in (self.query, self.key))
        tables = self.rope.tables(0, x_BTC.shape[1])
        if self._turns_in_product(x_BTC):
            x_BTC = x_BTC.to(compute_dtype(x_BTC))
            weights = [layer.weight for layer in layers]
            given = x_BTC, weights, kept_cast(x_BTC, layers), *tables
            return project_and_attend(*given, heads=heads, implementation=kernel, **mask)
        added_BTGD = None
        if self.value_mix is None or value_BTC is None:
            qkv_BTC = stacked(x_BTC, layers)
        else:
            matrix = stacked_matrix(x_BTC, layers)
            own, other = self.value_mix.to(matrix.dtype)
            qk, v = matrix.tensor_split([-len(self.value.weight)])
            matrix = torch.cat([qk, own * v])  # a factor of values is one of their matrix, of which a copy is small
            added_BTGD = (other * value_BTC.to(matrix.dtype)).view(*x_BTC.shape[:2], -1, self.head_dim)
            qkv_BTC = x_BTC @ matrix.T
        weights = (None if norm is None else norm.weight for norm in (self.query_norm, self.key_norm))
        how = {"heads": heads, "kv_heads": kv_heads, "added_BTGD": added_BTGD, "epsilon": self.epsilon}
        return rotary_attention(qkv_BTC, *tables, *weights, **how, implementation=kernel, **mask)

    def _turns_in_product(self, x_BTC: Tensor) -> bool:
        """Return whether the product that makes queries and keys turns them: not where something comes in between.

        Nor for heads of 32 channels, which attention turns itself where sequences are short.
        """
        if self.query_norm is not None or self.value_mix is not None or self.head_dim not in HOPPER_HEAD_DIMS:
            return False
        columns = sum(len(layer.weight) for layer in (self.query, self.key, self.value))
        return sums_wide(x_BTC) and product.pays(x_BTC, compute_dtype(x_BTC), columns, product.TURNED_ROWS)

    def _turned(self, q_BTHD: Tensor, k_BTGD: Tensor, positions: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        """Normalize queries and keys, and turn them by their positions, as far as this layer does either."""
        norms = self.query_norm, self.key_norm
        if self.rope is not None and positions is None and _turns_by_kernel(q_BTHD):
            cos, sin = self.rope.tables(start, start + q_BTHD.shape[1])
            weights = (None if norm is None else norm.weight for norm in norms)
            return qk_norm_rope(q_BTHD, k_BTGD, cos, sin, *weights, epsilon=self.epsilon)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHD, k_BTGD = self.query_norm(q_BTHD), self.key_norm(k_BTGD)
        if self.rope is None:
            return q_BTHD, k_BTGD
        q_BHTD, k_BGTD = (self.rope(heads.transpose(1, 2), positions, start) for heads in (q_BTHD, k_BTGD))
        return q_BHTD.transpose(1, 2), k_BGTD.transpose(1, 2)


def _turns_by_kernel(q_BTHD: Tensor) -> bool:
    """On a GPU, where the compiler's backward takes five times as long: it reads each gradient once for each use."""
    return on_gpu(q_BTHD)

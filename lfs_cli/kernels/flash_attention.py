"""Attention that never stores the T x S scores.

Sources: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), Algorithms 1 and 2.
         Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), Algorithm 3.
         `tiled_attention.py` is the same algorithm in plain PyTorch; read it first.

Math, for one query q, keys k_j and values v_j, with the scale 1 / sqrt(D) and c = scale * log2(e):

    forward, over blocks of keys, from m, l, a = -inf, 0, 0:
        n   = max(m, max_j c q.k_j)       base 2: exp2 is one instruction
        w   = 2^(m - n)                   p_j = 2^(c q.k_j - n)
        l   = w l + sum_j p_j             a = w a + sum_j p_j v_j          m = n
    o = a / l                             L = ln(2) m + ln(l)      natural log of sum_j exp(scale q.k_j)

    backward, recomputing the scores:
        p_j  = exp(scale q.k_j - L)       delta = do.o             one number a query, computed first
        ds_j = p_j (do.v_j - delta)
        dq   = scale sum_j ds_j k_j
        dk_j = scale sum over queries of ds_j q                    dv_j = sum over queries of p_j do

Mask:     causal: query t sees key s when s <= t + S - T, the last query at the last key. For T = 2, S = 5:
              1 1 1 1 0
              1 1 1 1 1
Numerics: products of q, k, v in their own type (float32 is not rounded to TF32), accumulated in float32; p and ds are
          rounded to that type before the second product; m, l, a, L and delta are float32.
Memory:   saves q, k, v, o and L. Extra over the inputs: (D + 1) numbers a query, one more in backward, whatever S is.
Layout:   q, k and v are read where they lie, any strides, last dimension contiguous. Forward and dq: one program for
          BLOCK_T queries of one head. dk and dv: one for BLOCK_S keys of one key/value head, over all H / G query heads
          that share it. No two programs write the same number, so there are no atomics and equal runs are bit-equal.
          One loop with a branch around the mask, not two loops: half the code, and ptxas serialized the wgmma of two
          pipelined loops in one kernel (C7515).
Limits:   D <= 256, padded to a power of two; T <= S when causal; NVIDIA GPUs of compute capability 8.0 and newer.
Unknown:  nothing here was timed on a GPU yet: tile sizes are the ones that compile without spills.

Order of this file: tile sizes, kernels, launches, autograd, public functions, reference.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import AVAILABLE, INTERPRETED, tl, triton

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # numbers: 256 rows of a tile stay below 2^31
DELTA_BLOCK_T = 64
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How one program of a kernel is cut: queries and keys at a time, warps that share the work, loads in flight."""

    block_t: int
    block_s: int
    warps: int
    stages: int


# (kernel, bytes of a number, BLOCK_D): tiles for 8.x and everything newer than 9.0, and for 9.0. Not timed on any GPU
# yet. These are the tiles for which ptxas (of Triton 3.9.0) reports no spills (float32 on 8.0: up to 16 bytes) and, on
# 9.0, no serialized wgmma, with 4 warps rather than 8 where that leaves room for two programs on a processor; shared
# memory of the first fits the 99 KiB of the smaller GPUs. float32 runs on the ordinary cores, where large tiles spill.
TILES: dict[tuple[str, int, int], tuple[Tile, Tile]] = {
    ("forward", 2, 32): (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3)),
    ("forward", 2, 64): (Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)),
    ("forward", 2, 128): (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("forward", 2, 256): (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
    ("forward", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("forward", 4, 64): (Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("forward", 4, 128): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("forward", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("dq", 2, 32): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("dq", 2, 64): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    ("dq", 2, 128): (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("dq", 2, 256): (Tile(32, 32, 8, 2), Tile(64, 32, 4, 2)),
    ("dq", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dq", 4, 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dq", 4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("dq", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("dkdv", 2, 32): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("dkdv", 2, 64): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    ("dkdv", 2, 128): (Tile(64, 64, 8, 2), Tile(32, 64, 4, 2)),
    ("dkdv", 2, 256): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("dkdv", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dkdv", 4, 64): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("dkdv", 4, 128): (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ("dkdv", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
INTERPRETER_TILE = Tile(64, 32, 1, 1)  # small and uneven, so that short sequences cross many edges


@triton.jit
def _load_rows(
    matrix_ptr,
    start,
    rows,
    stride,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows from `start` on of a (rows, D) matrix, as a (BLOCK_R, BLOCK_D) tile that is zero outside of the matrix.

    RAGGED says that the tile may reach past the last row. int64: start * stride can pass 2^31; within a tile it cannot.
    """
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    tile_ptr = matrix_ptr + tl.cast(start, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    if RAGGED or BLOCK_D != D:
        tile = tl.load(tile_ptr, mask=(r < rows - start)[:, None] & (d < D)[None, :], other=0.0)
    else:
        tile = tl.load(tile_ptr)
    return tile


@triton.jit
def _store_rows(tile, matrix_ptr, start, rows, stride, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a (BLOCK_R, BLOCK_D) tile to rows `start` on of a (rows, D) matrix, leaving out what lies outside of it."""
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    tile_ptr = matrix_ptr + tl.cast(start, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    tl.store(tile_ptr, tile.to(matrix_ptr.dtype.element_ty), mask=(r < rows - start)[:, None] & (d < D)[None, :])


@triton.jit
def _visible(t, s, T, S, CAUSAL: tl.constexpr):
    """Whether query `t` sees key `s`. What queries past the last one see is never used."""
    return s <= t + (S - T) if CAUSAL else (s < S) & (t >= 0)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    L_ptr,
    q_strides,
    k_strides,
    v_strides,
    T,
    S,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Write o and L of BLOCK_T queries of one head.

    Strides are those of (batch, position, head). RAGGED: S is no multiple of BLOCK_S.
    """
    blocks = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, g = bh // H, bh % H, bh % H // GROUP
    t_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T  # causal: the longest rows first
    t = t_start + tl.arange(0, BLOCK_T)
    k_ptr += b * k_strides[0] + g * k_strides[2]
    v_ptr += b * v_strides[0] + g * v_strides[2]
    c = scale * LOG2_E
    seen_by_all = S
    seen_by_any = S
    if CAUSAL:
        seen_by_all = tl.minimum(t_start + 1 + S - T, S)
        seen_by_any = tl.minimum(t_start + BLOCK_T + S - T, S)

    q = _load_rows(
        q_ptr + b * q_strides[0] + h * q_strides[2], t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED=True
    )
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)  # noqa: E741  the paper's name
    a = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s_start in tl.range(0, seen_by_any, BLOCK_S):
        k = _load_rows(k_ptr, s_start, S, k_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if s_start + BLOCK_S > seen_by_all:
            s = s_start + tl.arange(0, BLOCK_S)
            score = tl.where(_visible(t[:, None], s[None, :], T, S, CAUSAL), score, float("-inf"))

        n = tl.maximum(m, tl.max(score, 1) * c)  # finite: key 0 is in the first block, and every query sees it
        w = tl.exp2(m - n)
        p = tl.exp2(score * c - n[:, None])
        v = _load_rows(v_ptr, s_start, S, v_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        l = l * w + tl.sum(p, 1)  # noqa: E741
        a = tl.dot(p.to(v.dtype), v, a * w[:, None], input_precision="ieee")
        m = n

    _store_rows(a / l[:, None], o_ptr + (b * T * H + h) * D, t_start, T, H * D, D, BLOCK_T, BLOCK_D)
    tl.store(L_ptr + bh * T + t, (m + tl.log2(l)) * LN_2, mask=t < T)


@triton.jit
def _backward_delta(
    o_ptr,
    do_ptr,
    delta_ptr,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write delta = do.o of BLOCK_T queries of one head."""
    blocks = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    t_start = tl.program_id(0) % blocks * BLOCK_T
    head = (bh // H * T * H + bh % H) * D
    o = _load_rows(o_ptr + head, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED=True).to(tl.float32)
    do = _load_rows(do_ptr + head, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED=True).to(tl.float32)
    t = t_start + tl.arange(0, BLOCK_T)
    tl.store(delta_ptr + bh * T + t, tl.sum(o * do, 1), mask=t < T)


@triton.jit
def _backward_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    L_ptr,
    delta_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    T,
    S,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Write dq of BLOCK_T queries of one head: the walk over the keys is that of `_forward`."""
    blocks = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h, g = bh // H, bh % H, bh % H // GROUP
    t_start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    t = t_start + tl.arange(0, BLOCK_T)
    k_ptr += b * k_strides[0] + g * k_strides[2]
    v_ptr += b * v_strides[0] + g * v_strides[2]
    head = (b * T * H + h) * D
    c = scale * LOG2_E
    seen_by_all = S
    seen_by_any = S
    if CAUSAL:
        seen_by_all = tl.minimum(t_start + 1 + S - T, S)
        seen_by_any = tl.minimum(t_start + BLOCK_T + S - T, S)

    q = _load_rows(
        q_ptr + b * q_strides[0] + h * q_strides[2], t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED=True
    )
    do = _load_rows(do_ptr + head, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED=True)
    L = tl.load(L_ptr + bh * T + t, mask=t < T, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + bh * T + t, mask=t < T, other=0.0)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s_start in tl.range(0, seen_by_any, BLOCK_S):
        k = _load_rows(k_ptr, s_start, S, k_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        v = _load_rows(v_ptr, s_start, S, v_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if s_start + BLOCK_S > seen_by_all:
            s = s_start + tl.arange(0, BLOCK_S)
            score = tl.where(_visible(t[:, None], s[None, :], T, S, CAUSAL), score, float("-inf"))
        p = tl.exp2(score * c - L[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    _store_rows(dq * scale, dq_ptr + head, t_start, T, H * D, D, BLOCK_T, BLOCK_D)


@triton.jit
def _backward_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    L_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    T,
    S,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Write dk and dv of BLOCK_S keys of one key/value head, over the GROUP query heads that read it.

    Scores are held transposed, (BLOCK_S, BLOCK_T), so that p and ds stay in registers as first factors of the products
    that give dv and dk. Queries past T are zero, and so is their do: they add nothing. RAGGED: T is no multiple of
    BLOCK_T.
    """
    G: tl.constexpr = H // GROUP
    blocks = tl.cdiv(S, BLOCK_S)
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = bg // G, bg % G
    s_start = tl.program_id(0) % blocks * BLOCK_S  # causal: the keys that most queries see first
    s = s_start + tl.arange(0, BLOCK_S)
    c = scale * LOG2_E
    first = 0  # the first block of queries, of which some see some of these keys
    sees_all = 0  # the first query that sees all of these keys
    if CAUSAL:
        first = tl.maximum(s_start - (S - T), 0) // BLOCK_T * BLOCK_T
        sees_all = s_start + BLOCK_S - 1 - (S - T)

    k = _load_rows(
        k_ptr + b * k_strides[0] + g * k_strides[2], s_start, S, k_strides[1], D, BLOCK_S, BLOCK_D, RAGGED=True
    )
    v = _load_rows(
        v_ptr + b * v_strides[0] + g * v_strides[2], s_start, S, v_strides[1], D, BLOCK_S, BLOCK_D, RAGGED=True
    )
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for i in range(GROUP):
        h = g * GROUP + i
        bh = b * H + h
        head_ptr = q_ptr + b * q_strides[0] + h * q_strides[2]
        for t_start in tl.range(first, T, BLOCK_T):
            t = t_start + tl.arange(0, BLOCK_T)
            q = _load_rows(head_ptr, t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED)
            do = _load_rows(do_ptr + (b * T * H + h) * D, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED)
            L = tl.load(L_ptr + bh * T + t, mask=t < T, other=0.0) * LOG2_E
            delta = tl.load(delta_ptr + bh * T + t, mask=t < T, other=0.0)

            score = tl.dot(k, tl.trans(q), input_precision="ieee")
            if t_start < sees_all:
                score = tl.where(_visible(t[None, :], s[:, None], T, S, CAUSAL), score, float("-inf"))
            p = tl.exp2(score * c - L[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    head = (b * S * G + g) * D
    _store_rows(dk * scale, dk_ptr + head, s_start, S, G * D, D, BLOCK_S, BLOCK_D)
    _store_rows(dv, dv_ptr + head, s_start, S, G * D, D, BLOCK_S, BLOCK_D)


def _tile(kernel: str, q_BTHD: Tensor) -> Tile:
    if INTERPRETED:
        return INTERPRETER_TILE
    hopper = torch.cuda.get_device_capability(q_BTHD.device)[0] == 9
    return TILES[kernel, q_BTHD.element_size(), max(32, _padded(q_BTHD.shape[-1]))][hopper]


def _options(tile: Tile) -> dict[str, Any]:
    """Launch options: enable_fp_fusion, as Triton warns that its default will change in 3.10."""
    return {
        "BLOCK_T": tile.block_t,
        "BLOCK_S": tile.block_s,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _padded(head_dim: int) -> int:
    """BLOCK_D: the power of two that holds a head; a product on tensor cores sums over 16 channels at least."""
    return max(16, triton.next_power_of_2(head_dim))


def _readable(x_BTHD: Tensor) -> Tensor:
    """Return a tensor that kernels can read in place, or a contiguous copy: offsets within a tile are int32."""
    in_place = x_BTHD.stride(-1) == 1 and x_BTHD.stride(1) <= MAX_ROW_STRIDE
    return x_BTHD if in_place else x_BTHD.contiguous()


@torch.library.custom_op("lfs::flash_attention", mutates_args=())
def _flash_forward(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D), contiguous, and L (B, H, T)."""
    reason = unavailable_reason(q_BTHD.device.type, q_BTHD.dtype, q_BTHD.shape[-1])
    if reason:
        raise ValueError(f"flash_attention cannot run here: {reason}")
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    o_BTHD = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    L_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q_BTHD.device)
    if o_BTHD.numel() == 0:
        return o_BTHD, L_BHT

    q_BTHD, k_BSGD, v_BSGD = _readable(q_BTHD), _readable(k_BSGD), _readable(v_BSGD)
    tile = _tile("forward", q_BTHD)
    with torch.cuda.device_of(q_BTHD):
        _forward[(triton.cdiv(T, tile.block_t) * B * H,)](
            q_BTHD,
            k_BSGD,
            v_BSGD,
            o_BTHD,
            L_BHT,
            q_BTHD.stride()[:3],
            k_BSGD.stride()[:3],
            v_BSGD.stride()[:3],
            T,
            S,
            scale,
            H=H,
            GROUP=H // G,
            D=D,
            BLOCK_D=_padded(D),
            CAUSAL=causal,
            RAGGED=S % tile.block_s > 0,
            **_options(tile),
        )
    return o_BTHD, L_BHT


@torch.library.custom_op("lfs::flash_attention_backward", mutates_args=())
def _flash_backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, in the shapes of q, k and v."""
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    dq_BTHD, dk_BSGD, dv_BSGD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHD, k_BSGD, v_BSGD))
    delta_BHT = torch.empty_like(L_BHT)
    q_BTHD, k_BSGD, v_BSGD = _readable(q_BTHD), _readable(k_BSGD), _readable(v_BSGD)
    o_BTHD, do_BTHD = o_BTHD.contiguous(), do_BTHD.contiguous()  # a gradient may be expanded, as that of a sum is
    inputs = (q_BTHD, k_BSGD, v_BSGD, do_BTHD, L_BHT, delta_BHT)
    layout = (q_BTHD.stride()[:3], k_BSGD.stride()[:3], v_BSGD.stride()[:3], T, S, scale)
    shape = {"H": H, "GROUP": H // G, "D": D, "BLOCK_D": _padded(D), "CAUSAL": causal}
    with torch.cuda.device_of(q_BTHD):
        if dq_BTHD.numel():
            grid = (triton.cdiv(T, DELTA_BLOCK_T) * B * H,)
            head = {"H": H, "D": D, "BLOCK_T": DELTA_BLOCK_T, "BLOCK_D": _padded(D)}
            _backward_delta[grid](o_BTHD, do_BTHD, delta_BHT, T, **head, enable_fp_fusion=True)
            tile = _tile("dq", q_BTHD)
            ragged = S % tile.block_s > 0
            grid = (triton.cdiv(T, tile.block_t) * B * H,)
            _backward_dq[grid](*inputs, dq_BTHD, *layout, **shape, RAGGED=ragged, **_options(tile))
        if dk_BSGD.numel():
            tile = _tile("dkdv", q_BTHD)
            ragged = T % tile.block_t > 0
            grid = (triton.cdiv(S, tile.block_s) * B * G,)
            _backward_dkdv[grid](*inputs, dk_BSGD, dv_BSGD, *layout, **shape, RAGGED=ragged, **_options(tile))
    return dq_BTHD, dk_BSGD, dv_BSGD


@_flash_forward.register_fake
def _(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((B, H, T), dtype=torch.float32)


@_flash_backward.register_fake
def _(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BTHD.new_empty(q_BTHD.shape), k_BSGD.new_empty(k_BSGD.shape), v_BSGD.new_empty(v_BSGD.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BTHD, k_BSGD, v_BSGD, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGD, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros in the shape of L for the gradient that it never has


def _differentiate(ctx: Any, do_BTHD: Tensor, _dL: None) -> tuple[Tensor | None, ...]:
    return *_flash_backward(do_BTHD, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_flash_forward.register_autograd(_differentiate, setup_context=_save)


def flash_attention(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Mix values by the similarity of queries to keys: softmax(scale q k^T) v, head by head. Differentiable, once.

    Query head h reads key/value head h G / H. Works under torch.compile as one opaque operation, under activation
    checkpointing, and under autocast, where it casts to the type of autocast as torch's own attention does.

    Args:
        q_BTHD: (B, T, H, D), float32, bfloat16 or float16, D up to 256.
        k_BSGD: (B, S, G, D) in the type of `q_BTHD`. G divides H.
        v_BSGD: (B, S, G, D) in the type of `q_BTHD`. All three are read in place if their last dimension is contiguous.
        causal: Query t sees keys up to t + S - T, the last query all. Else every query sees every key.
        scale: Factor of the scores, above 0; `None` is 1 / sqrt(D).

    Returns:
        (B, T, H, D), contiguous, in the type of the inputs.

    Raises:
        ValueError: For shapes, types or devices that do not fit together, for more queries than keys when causal (the
            first would see nothing), and where the kernel cannot run (see `unavailable_reason`).
    """
    device_type = q_BTHD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q_BTHD, k_BSGD, v_BSGD = q_BTHD.to(dtype), k_BSGD.to(dtype), v_BSGD.to(dtype)
    _check(q_BTHD, k_BSGD, v_BSGD, causal, scale)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    return _flash_forward(q_BTHD, k_BSGD, v_BSGD, causal, scale)[0]


class FlashAttention(torch.autograd.Function):
    """`flash_attention` for one head without a head dimension: the interface of Stanford CS336, assignment 2.

    >>> o = FlashAttention.apply(q, k, v, is_causal)      # q: (B, T, D); k and v: (B, S, D)

    Saves q, k, v, o and L, which is (B, T).
    """

    @staticmethod
    def forward(ctx: Any, q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor, is_causal: bool = False) -> Tensor:
        ctx.causal, ctx.scale = is_causal, q_BTD.shape[-1] ** -0.5
        q_BTHD, k_BSGD, v_BSGD = q_BTD.unsqueeze(2), k_BSD.unsqueeze(2), v_BSD.unsqueeze(2)
        _check(q_BTHD, k_BSGD, v_BSGD, ctx.causal, ctx.scale)
        o_BTHD, L_BHT = _flash_forward(q_BTHD, k_BSGD, v_BSGD, ctx.causal, ctx.scale)
        o_BTD = o_BTHD.squeeze(2)
        ctx.save_for_backward(q_BTD, k_BSD, v_BSD, o_BTD, L_BHT.squeeze(1))
        return o_BTD

    @staticmethod
    def backward(ctx: Any, do_BTD: Tensor) -> tuple[Tensor | None, ...]:
        *rows, L_BT = ctx.saved_tensors
        heads = (x.unsqueeze(2) for x in (do_BTD, *rows))
        gradients = _flash_backward(*heads, L_BT.unsqueeze(1), ctx.causal, ctx.scale)
        return *(x.squeeze(2) for x in gradients), None


def unavailable_reason(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why `flash_attention` cannot run on such tensors here, or `None` when it can.

    Args:
        device_type: Such as "cuda" or "cpu". A CPU will do where kernels are interpreted (`TRITON_INTERPRET=1`).
        dtype: Type of queries, keys and values.
        head_dim: Channels per head (D).

    Returns:
        A phrase for a message, such as "head dimension 512 is above 256".
    """
    if not AVAILABLE:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the type is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    if not 0 < head_dim <= MAX_HEAD_DIM:
        return f"head dimension {head_dim} is {'above ' + str(MAX_HEAD_DIM) if head_dim > 0 else 'not positive'}"
    if INTERPRETED:
        # its bfloat16 products multiply raw bits: triton-lang/triton#11584, also in 3.9.0
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if device_type != "cuda":
        return f"it needs a CUDA GPU, and this is {device_type}"
    if torch.version.hip or not torch.cuda.is_available():
        return "no NVIDIA GPU was found"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, below 8.0"


def _check(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, causal: bool, scale: float | None) -> None:
    """Raise ValueError, in the caller's terms, unless the three tensors fit together."""
    shapes = f"q {tuple(q_BTHD.shape)}, k {tuple(k_BSGD.shape)}, v {tuple(v_BSGD.shape)}"
    if q_BTHD.ndim != 4 or k_BSGD.ndim != 4 or k_BSGD.shape != v_BSGD.shape:
        raise ValueError(f"expected q (B, T, H, D) and k, v (B, S, G, D), got {shapes}")
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    if k_BSGD.shape[0] != B or k_BSGD.shape[3] != D:
        raise ValueError(f"q, k and v differ in batch or head dimension: {shapes}")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads cannot share {G} key/value heads: {shapes}")
    if T > 0 and (S == 0 or (causal and T > S)):
        raise ValueError(f"{T} queries need {T if causal else 1} or more keys, got {S}: some query would see nothing")
    if not q_BTHD.dtype == k_BSGD.dtype == v_BSGD.dtype:
        raise ValueError(f"q, k and v differ in type: {q_BTHD.dtype}, {k_BSGD.dtype}, {v_BSGD.dtype}")
    if not q_BTHD.device == k_BSGD.device == v_BSGD.device:
        raise ValueError(f"q, k and v are on different devices: {q_BTHD.device}, {k_BSGD.device}, {v_BSGD.device}")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")


def flash_attention_reference(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The same function in plain PyTorch, at float32 or better: the kernel's judge."""
    (T, H, D), (S, G) = q_BTHD.shape[1:], k_BSGD.shape[1:3]
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    k_BSHD, v_BSHD = (x.repeat_interleave(H // G, dim=2).to(wide) for x in (k_BSGD, v_BSGD))

    with torch.autocast(q_BTHD.device.type, enabled=False):
        score_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD.to(wide), k_BSHD) * (D**-0.5 if scale is None else scale)
        if causal:
            later_TS = torch.ones(T, S, dtype=torch.bool, device=q_BTHD.device).triu(S - T + 1)
            score_BHTS = score_BHTS.masked_fill(later_TS, float("-inf"))
        return torch.einsum("bhts,bshd->bthd", score_BHTS.softmax(-1), v_BSHD).to(q_BTHD.dtype)

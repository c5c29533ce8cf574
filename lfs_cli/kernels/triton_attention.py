"""Flash Attention in Triton, for every NVIDIA GPU since compute capability 8.0: four kernels without atomics.

Sources: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691), Algorithms 1 and 2.
         Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867), Algorithm 3.
         Gemma Team, "Gemma 2", 2024 (arXiv:2408.00118), section 2, for the soft cap of scores.
         `tiled_attention.py` is the same algorithm in plain PyTorch; read it first.

Math, for one query q, keys k_j and values v_j, with the scale, usually 1 / sqrt(D):

    score_j = scale q.k_j             or, with a soft cap:      score_j = cap tanh(scale q.k_j / cap)

    forward, over blocks of keys, from m, l, a = -inf, 0, 0, with c = log2(e):
        n   = max(m, max_j c score_j)     base 2: exp2 is one instruction
        w   = 2^(m - n)                   p_j = 2^(c score_j - n)
        l   = w l + sum_j p_j             a = w a + sum_j p_j v_j          m = n
    o = a / l                             L = ln(2) m + ln(l)      natural log of sum_j exp(score_j)

    backward, recomputing the scores:
        p_j  = exp(score_j - L)           delta = do.o             one number a query, computed first
        ds_j = p_j (do.v_j - delta)       with a soft cap, times the slope of tanh, 1 - (score_j / cap)^2
        dq   = scale sum_j ds_j k_j
        dk_j = scale sum over queries of ds_j q                    dv_j = sum over queries of p_j do

Mask:     that of `reference_attention.py`. Whatever is asked for, causal, window, documents or all three, the keys that
          a query sees are an interval, `_keys_seen`, both ends of which grow with the query. So a block of queries
          needs the keys from the first of its first query to the last of its last query: blocks outside are never
          read, and only those that some of its queries do not see whole are masked. The same holds for the queries
          that see a key, `_queries_seeing`.
Empty:    a query that sees no key ends with m = -inf and l = 0. Its o is 0, its L is -inf, its gradients are 0.
Numerics: products of q, k, v in their own type (float32 is not rounded to TF32), accumulated in float32; p and ds are
          rounded to that type before the second product; m, l, a, L and delta are float32.
Memory:   o and L for backward, which makes delta: (D + 2) numbers a query over the inputs, whatever S is.
Layout:   q, k and v are read, and gradients written, where they lie: any strides, last dimension contiguous. Forward
          and dq: one program for BLOCK_T queries of one head. dk and dv: one for BLOCK_S keys of one key/value head,
          over all GROUP query heads that share it. No two programs write the same number, so there are no atomics and
          equal runs are bit-equal. One loop with a branch around the mask, not two loops: half the code, and ptxas
          serialized the wgmma of two pipelined loops in one kernel (C7515).
Limits:   D <= 256, padded to a power of two.
Unknown:  a backward in one kernel, with atomic sums for dq, would read the scores once instead of twice. It was not
          tried here: it gives up equal runs, and on Hopper `hopper_attention.py` has that place.

Order of this file: tile sizes, pieces of kernels, forward, backward, launches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import AVAILABLE, INTERPRETED, tl, triton

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # numbers: 256 rows of a tile stay below 2^31
DELTA_BLOCK_T = 64
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MINUS_INFINITY = tl.constexpr(float("-inf"))


class Tile(NamedTuple):
    """How one program of a kernel is cut: queries and keys at a time, warps that share the work, loads in flight."""

    block_t: int
    block_s: int
    warps: int
    stages: int


# (kernel, bytes of a number, BLOCK_D): tiles for 8.x and everything newer than 9.0, and for 9.0.
#
# Those for 9.0 are the fastest of 20 to 36 candidates each on one H200, 2026-11-29, Triton 3.6, but where two of them
# are within 1 %. Milliseconds of the pass with this tile, and with the one that it had before: CUDA events, medians of
# 15 in turn, the L2 cache emptied before each.
#
#     shape B, H, T, D, causal                forward, was        dq, was             dk and dv, was
#     128, 16, 256, 32     bfloat16           0.072   0.080       0.228   0.236       0.221   0.235
#     4, 16, 4096, 32      bfloat16           0.273   0.290       0.763   0.811       0.787   0.810
#     32, 12, 1024, 64     window of 256      0.111   0.144       0.355   0.357       0.335   0.357
#     32, 12, 1024, 64     documents          0.102   0.102       0.321   0.329       0.300   0.329
#     8, 12, 2048, 64      soft cap           0.316   0.315       0.834   0.890       0.864   0.890
#     32, 6, 1024, 128     window of 256      0.104   0.107       0.343   0.343       0.330   0.343
#     32, 6, 1024, 128     documents          0.089   0.104       0.503   0.503       0.297   0.503
#     4, 8, 2048, 256      bfloat16           0.229   0.413       1.51    1.59        1.59    1.59
#     16, 8, 512, 64       float32            0.451   0.461       2.31    2.31        2.31    2.31
#     16, 4, 512, 128      float32            0.474   0.838       2.63    3.30        3.07    3.30
#
# dq and dk and dv each within the whole backward pass, the other one as it was. Some of these keep up to 72 bytes of a
# thread outside of registers (Triton 3.9; with 3.6, by which they were timed, up to 640 of dk and dv at 128 channels),
# and are the fastest all the same.
#
# Those for 8.x and others have not been timed on any GPU: they are tiles for which ptxas (of Triton 3.9.0) reports no
# spills (float32 on 8.0: up to 24 bytes), and whose shared memory fits the 99 KiB of the smaller GPUs. float32 runs on
# the ordinary cores, where large tiles spill.
TILES: dict[tuple[str, int, int], tuple[Tile, Tile]] = {
    ("forward", 2, 32): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ("forward", 2, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
    ("forward", 2, 128): (Tile(64, 64, 8, 2), Tile(64, 32, 4, 3)),
    ("forward", 2, 256): (Tile(64, 32, 8, 2), Tile(64, 32, 4, 2)),
    ("forward", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("forward", 4, 64): (Tile(32, 32, 8, 2), Tile(32, 64, 4, 2)),
    ("forward", 4, 128): (Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("forward", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("dq", 2, 32): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 3)),
    ("dq", 2, 64): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)),
    ("dq", 2, 128): (Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
    ("dq", 2, 256): (Tile(32, 32, 8, 2), Tile(128, 32, 8, 2)),
    ("dq", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dq", 4, 64): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dq", 4, 128): (Tile(32, 32, 8, 1), Tile(32, 32, 4, 2)),
    ("dq", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    ("dkdv", 2, 32): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 3)),
    ("dkdv", 2, 64): (Tile(64, 32, 4, 2), Tile(32, 64, 4, 3)),
    ("dkdv", 2, 128): (Tile(64, 64, 8, 2), Tile(32, 64, 4, 3)),
    ("dkdv", 2, 256): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("dkdv", 4, 32): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("dkdv", 4, 64): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("dkdv", 4, 128): (Tile(16, 32, 8, 1), Tile(32, 16, 4, 2)),
    ("dkdv", 4, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
# Those that must be other ones where documents or a soft cap take registers.
TILES_WITH_MORE: dict[tuple[str, int, int], tuple[Tile, Tile]] = {
    ("dq", 2, 256): (Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
    ("dkdv", 2, 32): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 3)),
    ("dkdv", 2, 128): (Tile(32, 64, 8, 2), Tile(32, 64, 4, 3)),
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
def _keys_seen(t, T, S, window, starts_ptr, ends_ptr, CAUSAL: tl.constexpr):
    """The first key that query `t` sees, and the one after the last. `t` is a number or a tensor of them.

    `window` is None without one; `starts_ptr` and `ends_ptr`, the spans of this row's documents, likewise.
    """
    place = t + (S - T)
    first = place * 0
    end = first + S
    if CAUSAL:
        end = tl.minimum(place + 1, S)
    elif window is not None:
        end = tl.minimum(place + window, S)
    if window is not None:
        first = tl.maximum(place - window + 1, 0)
    if starts_ptr is not None:
        first = tl.maximum(first, tl.load(starts_ptr + t, mask=t < T, other=T))
        end = tl.minimum(end, tl.load(ends_ptr + t, mask=t < T, other=T))
    return first, end


@triton.jit
def _queries_seeing(s, T, S, window, starts_ptr, ends_ptr, CAUSAL: tl.constexpr):
    """The first query that sees key `s`, and the one after the last: `_keys_seen` from the other side."""
    place = s - (S - T)
    first = place * 0
    end = first + T
    if CAUSAL:
        first = tl.maximum(place, 0)
    elif window is not None:
        first = tl.maximum(place - window + 1, 0)
    if window is not None:
        end = tl.minimum(place + window, T)
    if starts_ptr is not None:  # T = S: who is in the same document sees and is seen
        first = tl.maximum(first, tl.load(starts_ptr + s, mask=s < S, other=T))
        end = tl.minimum(end, tl.load(ends_ptr + s, mask=s < S, other=T))
    return first, end


@triton.jit
def _tanh(x):
    """Return tanh to the last digits of float32: by a series where 1 - 2^y would cancel, else by one exp2."""
    y = x * x
    near = x * (1.0 - y * (1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * (62.0 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _load_log_sum(L_ptr, t, T):
    """L of queries `t` in base 2, +inf for one that sees nothing, so that every p = 2^(c score - L) of it is 0."""
    L = tl.load(L_ptr + t, mask=t < T, other=0.0)
    return tl.where(L > MINUS_INFINITY, L * LOG2_E, -MINUS_INFINITY)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    L_ptr,
    starts_ptr,
    ends_ptr,
    q_strides,
    k_strides,
    v_strides,
    T,
    S,
    scale,
    window,
    softcap,
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
    t_last = tl.minimum(t_start + BLOCK_T, T) - 1
    t = t_start + tl.arange(0, BLOCK_T)
    k_ptr += b * k_strides[0] + g * k_strides[2]
    v_ptr += b * v_strides[0] + g * v_strides[2]
    if starts_ptr is not None:
        starts_ptr += b * T
        ends_ptr += b * T
    first, end = _keys_seen(t, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_for_any, end_for_all = _keys_seen(t_start, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_for_all, end_for_any = _keys_seen(t_last, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    c = LOG2_E * (scale if softcap is None else softcap)

    q = _load_rows(
        q_ptr + b * q_strides[0] + h * q_strides[2], t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED=True
    )
    m = tl.full([BLOCK_T], MINUS_INFINITY, tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)  # noqa: E741  the paper's name
    a = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s_start in tl.range(first_for_any // BLOCK_S * BLOCK_S, end_for_any, BLOCK_S):
        k = _load_rows(k_ptr, s_start, S, k_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if softcap is not None:
            score = _tanh(score * (scale / softcap))
        if (s_start < first_for_all) | (s_start + BLOCK_S > end_for_all):
            s = s_start + tl.arange(0, BLOCK_S)
            seen = s[None, :] < end[:, None]
            if window is not None or starts_ptr is not None:  # else all begin at key 0
                seen = seen & (first[:, None] <= s[None, :])
            score = tl.where(seen, score, MINUS_INFINITY)

        n = tl.maximum(m, tl.max(score, 1) * c)
        shift = tl.where(n == MINUS_INFINITY, 0.0, n)  # a query that has seen nothing yet: its p are 2^-inf, not NaN
        w = tl.exp2(m - shift)
        p = tl.exp2(score * c - shift[:, None])
        v = _load_rows(v_ptr, s_start, S, v_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        l = l * w + tl.sum(p, 1)  # noqa: E741
        a = tl.dot(p.to(v.dtype), v, a * w[:, None], input_precision="ieee")
        m = n

    l = tl.where(l == 0.0, 1.0, l)  # noqa: E741  saw nothing: o = 0 and L = -inf
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
    starts_ptr,
    ends_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    dq_strides,
    T,
    S,
    scale,
    window,
    softcap,
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
    t_last = tl.minimum(t_start + BLOCK_T, T) - 1
    t = t_start + tl.arange(0, BLOCK_T)
    k_ptr += b * k_strides[0] + g * k_strides[2]
    v_ptr += b * v_strides[0] + g * v_strides[2]
    if starts_ptr is not None:
        starts_ptr += b * T
        ends_ptr += b * T
    first, end = _keys_seen(t, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_for_any, end_for_all = _keys_seen(t_start, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_for_all, end_for_any = _keys_seen(t_last, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    c = LOG2_E * (scale if softcap is None else softcap)

    q = _load_rows(
        q_ptr + b * q_strides[0] + h * q_strides[2], t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED=True
    )
    do = _load_rows(do_ptr + (b * T * H + h) * D, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED=True)
    L = _load_log_sum(L_ptr + bh * T, t, T)
    delta = tl.load(delta_ptr + bh * T + t, mask=t < T, other=0.0)
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for s_start in tl.range(first_for_any // BLOCK_S * BLOCK_S, end_for_any, BLOCK_S):
        k = _load_rows(k_ptr, s_start, S, k_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        v = _load_rows(v_ptr, s_start, S, v_strides[1], D, BLOCK_S, BLOCK_D, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        slope = 1.0  # of the score in scale q.k
        if softcap is not None:
            score = _tanh(score * (scale / softcap))
            slope = 1.0 - score * score
        if (s_start < first_for_all) | (s_start + BLOCK_S > end_for_all):
            s = s_start + tl.arange(0, BLOCK_S)
            seen = s[None, :] < end[:, None]
            if window is not None or starts_ptr is not None:  # else all begin at key 0
                seen = seen & (first[:, None] <= s[None, :])
            score = tl.where(seen, score, MINUS_INFINITY)
        p = tl.exp2(score * c - L[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += b * dq_strides[0] + h * dq_strides[2]
    _store_rows(dq * scale, dq_ptr, t_start, T, dq_strides[1], D, BLOCK_T, BLOCK_D)


@triton.jit
def _backward_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    L_ptr,
    delta_ptr,
    starts_ptr,
    ends_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    T,
    S,
    scale,
    window,
    softcap,
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
    s_last = tl.minimum(s_start + BLOCK_S, S) - 1
    s = s_start + tl.arange(0, BLOCK_S)
    if starts_ptr is not None:
        starts_ptr += b * T
        ends_ptr += b * T
    first, end = _queries_seeing(s, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_of_any, end_of_all = _queries_seeing(s_start, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    first_of_all, end_of_any = _queries_seeing(s_last, T, S, window, starts_ptr, ends_ptr, CAUSAL)
    c = LOG2_E * (scale if softcap is None else softcap)

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
        for t_start in tl.range(first_of_any // BLOCK_T * BLOCK_T, end_of_any, BLOCK_T):
            t = t_start + tl.arange(0, BLOCK_T)
            q = _load_rows(head_ptr, t_start, T, q_strides[1], D, BLOCK_T, BLOCK_D, RAGGED)
            do = _load_rows(do_ptr + (b * T * H + h) * D, t_start, T, H * D, D, BLOCK_T, BLOCK_D, RAGGED)
            L = _load_log_sum(L_ptr + bh * T, t, T)
            delta = tl.load(delta_ptr + bh * T + t, mask=t < T, other=0.0)

            score = tl.dot(k, tl.trans(q), input_precision="ieee")
            slope = 1.0
            if softcap is not None:
                score = _tanh(score * (scale / softcap))
                slope = 1.0 - score * score
            if window is None and starts_ptr is None:  # the last query sees all: nothing ends before T
                if t_start < first_of_all:
                    score = tl.where(first[:, None] <= t[None, :], score, MINUS_INFINITY)
            elif (t_start < first_of_all) | (t_start + BLOCK_T > end_of_all):
                score = tl.where((first[:, None] <= t[None, :]) & (t[None, :] < end[:, None]), score, MINUS_INFINITY)
            p = tl.exp2(score * c - L[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]) * slope
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_ptr += b * dk_strides[0] + g * dk_strides[2]
    dv_ptr += b * dv_strides[0] + g * dv_strides[2]
    _store_rows(dk * scale, dk_ptr, s_start, S, dk_strides[1], D, BLOCK_S, BLOCK_D)
    _store_rows(dv, dv_ptr, s_start, S, dv_strides[1], D, BLOCK_S, BLOCK_D)


def unavailable_reason(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, **_mask: Any) -> str | None:
    """Say why these kernels cannot run on such tensors, or `None` when they can. Every mask suits them.

    Reads types, shapes and devices alone, so the tensors may be fake.
    """
    return unavailable_for(q_BTHD.device, q_BTHD.dtype, q_BTHD.shape[-1])


def unavailable_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """`unavailable_reason` for tensors that are yet to come."""
    if not AVAILABLE:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the type is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    if not 0 < head_dim <= MAX_HEAD_DIM:
        return f"head dimension {head_dim} is {'above ' + str(MAX_HEAD_DIM) if head_dim > 0 else 'not positive'}"
    if INTERPRETED:
        # its bfloat16 products multiply raw bits: triton-lang/triton#11584, also in 3.9.0
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this is {device.type}"
    if torch.version.hip or not torch.cuda.is_available():
        return "no NVIDIA GPU was found"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}, below 8.0"


def forward(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans: Tensor | None = None,
    tiles: Mapping[str, Tile] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute o and L.

    Args:
        q_BTHD: (B, T, H, D), float32, bfloat16 or float16.
        k_BSGD: (B, S, G, D).
        v_BSGD: (B, S, G, D).
        causal: As in `flash_attention`, like the next three.
        scale: Factor of the scores.
        window: Or None.
        softcap: Or None.
        spans: (2, B, T), int32, of `document_spans`.
        tiles: Tile for "forward" in place of the one in `TILES`: how a tuner tries others.

    Returns:
        o (B, T, H, D), contiguous, in the type of q, and L (B, H, T), float32.
    """
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    o_BTHD = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    L_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q_BTHD.device)
    if o_BTHD.numel() == 0:
        return o_BTHD, L_BHT

    q_BTHD, k_BSGD, v_BSGD = _readable(q_BTHD), _readable(k_BSGD), _readable(v_BSGD)
    tile = _tile("forward", q_BTHD, tiles, has_more=spans is not None or softcap is not None)
    with torch.cuda.device_of(q_BTHD):
        _forward[(triton.cdiv(T, tile.block_t) * B * H,)](
            q_BTHD,
            k_BSGD,
            v_BSGD,
            o_BTHD,
            L_BHT,
            *_ends(spans),
            *_strides(q_BTHD, k_BSGD, v_BSGD),
            T,
            S,
            scale,
            window,
            softcap,
            H=H,
            GROUP=H // G,
            D=D,
            BLOCK_D=_padded(D),
            CAUSAL=causal,
            RAGGED=S % tile.block_s > 0,
            **_options(tile),
        )
    return o_BTHD, L_BHT


def backward(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    o_BTHD: Tensor,
    L_BHT: Tensor,
    do_BTHD: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    tiles: Mapping[str, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients, the same bits in every run.

    Args:
        q_BTHD: As in `forward`, like all that is not named here.
        k_BSGD: (B, S, G, D).
        v_BSGD: (B, S, G, D).
        o_BTHD: (B, T, H, D), contiguous: what `forward` returned.
        L_BHT: (B, H, T): what `forward` returned.
        do_BTHD: (B, T, H, D), contiguous: gradient of the output.
        causal: As in `flash_attention`, like the next three.
        scale: Factor of the scores.
        window: Or None.
        softcap: Or None.
        spans: (2, B, T), int32, of `document_spans`.
        dq: Written into if given, any strides, last dimension contiguous; so are the next two.
        dk: Gradient of the keys.
        dv: Gradient of the values.
        tiles: Tiles for "dq" and "dkdv" in place of those in `TILES`.

    Returns:
        dq, dk and dv, in the shapes and the type of q, k and v.
    """
    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if given is None else given
        for x, given in ((q_BTHD, dq), (k_BSGD, dk), (v_BSGD, dv))
    )
    delta_BHT = torch.empty_like(L_BHT)
    q_BTHD, k_BSGD, v_BSGD = _readable(q_BTHD), _readable(k_BSGD), _readable(v_BSGD)
    inputs = (q_BTHD, k_BSGD, v_BSGD, do_BTHD, L_BHT, delta_BHT, *_ends(spans))
    strides = _strides(q_BTHD, k_BSGD, v_BSGD)
    numbers = (T, S, scale, window, softcap)
    has_more = spans is not None or softcap is not None
    shape = {"H": H, "GROUP": H // G, "D": D, "BLOCK_D": _padded(D), "CAUSAL": causal}
    with torch.cuda.device_of(q_BTHD):
        if dq.numel():
            grid = (triton.cdiv(T, DELTA_BLOCK_T) * B * H,)
            head = {"H": H, "D": D, "BLOCK_T": DELTA_BLOCK_T, "BLOCK_D": _padded(D)}
            _backward_delta[grid](o_BTHD, do_BTHD, delta_BHT, T, **head, enable_fp_fusion=True)
            tile = _tile("dq", q_BTHD, tiles, has_more=has_more)
            ragged = S % tile.block_s > 0
            grid = (triton.cdiv(T, tile.block_t) * B * H,)
            _backward_dq[grid](*inputs, dq, *strides, *_strides(dq), *numbers, **shape, RAGGED=ragged, **_options(tile))
        if dk.numel():
            tile = _tile("dkdv", q_BTHD, tiles, has_more=has_more)
            ragged = T % tile.block_t > 0
            grid = (triton.cdiv(S, tile.block_s) * B * G,)
            outputs = (dk, dv, *strides, *_strides(dk, dv))
            _backward_dkdv[grid](*inputs, *outputs, *numbers, **shape, RAGGED=ragged, **_options(tile))
    return dq, dk, dv


def tile_for(kernel: str, element_size: int, head_dim: int, *, is_hopper: bool, has_more: bool = False) -> Tile:
    """Return the tile of the table.

    Args:
        kernel: "forward", "dq" or "dkdv".
        element_size: Bytes of a number of q, k and v.
        head_dim: Channels per head (D).
        is_hopper: Compute capability 9.0.
        has_more: With documents or a soft cap.
    """
    key = (kernel, element_size, max(32, _padded(head_dim)))
    general, hopper = TILES_WITH_MORE.get(key, TILES[key]) if has_more else TILES[key]
    return hopper if is_hopper else general


def _tile(kernel: str, q_BTHD: Tensor, tiles: Mapping[str, Tile] | None, *, has_more: bool) -> Tile:
    """The tile of a launch: the caller's, if there is one."""
    if tiles and kernel in tiles:
        return tiles[kernel]
    if INTERPRETED:
        return INTERPRETER_TILE
    is_hopper = torch.cuda.get_device_capability(q_BTHD.device)[0] == 9
    return tile_for(kernel, q_BTHD.element_size(), q_BTHD.shape[-1], is_hopper=is_hopper, has_more=has_more)


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


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [x.stride()[:3] for x in tensors]


def _ends(spans_2BT: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Starts and ends of documents, (B, T) each."""
    return (None, None) if spans_2BT is None else (spans_2BT[0], spans_2BT[1])

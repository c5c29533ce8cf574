"""Rotation and attention of short sequences for Hopper GPUs, in Gluon: a whole head in one program.

The math is that of `flash_attention.py` after that of `rope.py`; read these first. `short_attention.py` is what
surrounds these kernels, and says what they are for.

All queries, keys and values of a head fit into shared memory. So they are read once, are turned where they lie there,
and never come back: neither the turned q and k, nor delta, nor dq before it is turned back, exist anywhere else.

A head is BLOCKS blocks of 64 positions, and a program, of 4 warps, has one head. All warps do everything: that some
load while others compute is left to the programs that share a processor, three of them.

Forward: the scores of 64 queries and of all the keys that they see are in registers at once. So there is one maximum
and no online softmax.

Backward walks over the pairs of blocks twice, and computes p and ds each time: first for each block of queries, with
scores as they are, (64 queries, 64 keys), then for each block of keys, with scores transposed, so that p and ds are
always first factors of products, which may stay in registers:

    dq += ds k                      dv += p^T do          dk += ds^T q

One walk would do 5 products for a pair, not 7, and half of the exponentials. But then ds goes through shared memory for
dq, behind a fence and a barrier, and dq of all queries is in registers: there are not enough of them, and only two
programs fit a processor. `short_attention.py` has the numbers.

Buffers:  results go out by those of what is no longer needed: o by those of q, dk by k's, dv by v's. dq has its own.
Rotation: both channels of a pair are one thread's, in the layout of a product's sum. q and k are rounded after it, as
          `rope.py` rounds them; dq and dk are turned back before they are rounded, once.
Mask:     causal. Rows past T are zeros in shared memory; no query before T sees such a key, and backward their L is
          +inf, which makes p = 0. Nothing is written past T.
Numerics: as in `flash_attention.py`. No atomics: equal runs are bit-equal.
Limits:   D = 32, 64 < T = S <= 256, as many key/value heads as query heads, bfloat16 and float16.
"""

from lfs_cli.kernels.gluon_compatibility import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from lfs_cli.kernels.hopper_buffers import make_barriers
from lfs_cli.kernels.hopper_rope import angles_of, turned

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _turn_where_they_lie(
    q, k, angles, BLOCKS: gl.constexpr, D: gl.constexpr, PAIRS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Turn all queries and keys of a head, (BLOCKS, 1, 64, 1, D) each, in shared memory."""
    qs = ()
    ks = ()
    for i in gl.static_range(BLOCKS):
        qs = qs + (q.index(i).reshape([64, D]).load(LAYOUT),)
        ks = ks + (k.index(i).reshape([64, D]).load(LAYOUT),)
    for i in gl.static_range(BLOCKS):
        cos, sin = angles[i]
        q.index(i).reshape([64, D]).store(turned(qs[i].to(gl.float32), cos, sin, D, PAIRS, LAYOUT).to(q.dtype))
        k.index(i).reshape([64, D]).store(turned(ks[i].to(gl.float32), cos, sin, D, PAIRS, LAYOUT).to(k.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def _blocks(descriptor, COUNT: gl.constexpr):
    """Allocate buffers for so many blocks that a descriptor is of."""
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_shape, descriptor.layout)


@gluon.jit
def _put(tile, x, D: gl.constexpr):
    """Round (64, D) numbers into a buffer."""
    tile.reshape([64, D]).store(x.to(tile.dtype))


@gluon.jit(do_not_specialize=["T"])
def forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    L_ptr,
    cos_ptr,
    sin_ptr,
    T,
    H,
    scale_log2,
    D: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
):
    """Write o (B, T, H, D) and L (B, H, T) of one head of q, k and v (B, T, H, D); q and k are not turned yet.

    Descriptors are of blocks of 64 rows of one head, and cos and sin are (T, D / 2).
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = q_desc.dtype
    b = gl.program_id(0) // H
    h = gl.program_id(0) % H
    q = _blocks(q_desc, BLOCKS)
    k = _blocks(k_desc, BLOCKS)
    v = _blocks(v_desc, BLOCKS)
    full = make_barriers(2, 1)
    fence_async_shared()
    barrier()
    mbarrier.expect(full.index(0), 2 * BLOCKS * q_desc.block_type.nbytes)
    mbarrier.expect(full.index(1), BLOCKS * v_desc.block_type.nbytes)
    for i in gl.static_range(BLOCKS):
        load_tile(q_desc, [b, 64 * i, h, 0], full.index(0), q.index(i))
        load_tile(k_desc, [b, 64 * i, h, 0], full.index(0), k.index(i))
    for i in gl.static_range(BLOCKS):
        load_tile(v_desc, [b, 64 * i, h, 0], full.index(1), v.index(i))
    row = gl.arange(0, 64, ROWS)
    column = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([64, 64], gl.float32, SCORES)
    angles = ()
    for i in gl.static_range(BLOCKS):  # beside the copies
        angles = angles + (angles_of(cos_ptr, sin_ptr, 64 * i, T, D, PAIRS),)
    mbarrier.wait(full.index(0), 0)
    _turn_where_they_lie(q, k, angles, BLOCKS, D, PAIRS, SUMS)
    mbarrier.wait(full.index(1), 0)
    for i in gl.static_range(BLOCKS):
        scores = ()
        for j in gl.static_range(i + 1):
            score = warpgroup_mma(
                q.index(i).reshape([64, D]),
                k.index(j).reshape([64, D]).permute((1, 0)),
                nothing,
                use_acc=False,
                is_async=True,
            )
            scores = scores + (score,)
        m = gl.full([64], -float("inf"), gl.float32, ROWS)
        done = ()
        for j in gl.static_range(i + 1):
            score = warpgroup_mma_wait(i - j, deps=[scores[j]])
            if i == j:
                score = gl.where(column[None, :] <= row[:, None], score, -float("inf"))
            m = gl.maximum(m, gl.max(score, 1))
            done = done + (score,)
        m = m * scale_log2
        l = gl.full([64], 0.0, gl.float32, ROWS)
        a = gl.zeros([64, D], gl.float32, SUMS)
        for j in gl.static_range(i + 1):
            p = gl.exp2(done[j] * scale_log2 - m[:, None])
            l = l + gl.sum(p, 1)
            a = warpgroup_mma(gl.convert_layout(p.to(dtype), FACTOR), v.index(j).reshape([64, D]), a, is_async=True)
        share = gl.convert_layout(1 / l, gl.SliceLayout(1, SUMS))
        gl.store(
            L_ptr + (gl.program_id(0).to(gl.int64) * T + 64 * i) + row, (m + gl.log2(l)) * LN_2, mask=64 * i + row < T
        )
        a = warpgroup_mma_wait(0, deps=[a])
        barrier()  # each warp waited for its own part of the products that read q
        _put(q.index(i), a * share[:, None], D)
        fence_async_shared()
        barrier()
        store_tile(o_desc, [b, 64 * i, h, 0], q.index(i))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "H"])
def backward(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    o_ptr,
    do_ptr,
    L_ptr,
    cos_ptr,
    sin_ptr,
    T,
    H,
    scale_log2,
    scale,
    D: gl.constexpr,
    BLOCKS: gl.constexpr,
    PAIRS: gl.constexpr,
    READ: gl.constexpr,
):
    """Write dq, dk and dv (B, T, H, D) of one head, of q and k before they are turned.

    The tensors are as in `forward`, and o and do contiguous; a block that is read row by row lies in registers as
    `READ` says.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = q_desc.dtype
    bh = gl.program_id(0)
    b = bh // H
    h = bh % H
    q = _blocks(q_desc, BLOCKS)
    k = _blocks(k_desc, BLOCKS)
    v = _blocks(v_desc, BLOCKS)
    do = _blocks(do_desc, BLOCKS)
    out = _blocks(dq_desc, 2)
    deltas = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    Ls = gl.allocate_shared_memory(gl.float32, [BLOCKS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = make_barriers(2, 1)
    fence_async_shared()
    barrier()
    mbarrier.expect(full.index(0), 2 * BLOCKS * q_desc.block_type.nbytes)
    mbarrier.expect(full.index(1), 2 * BLOCKS * q_desc.block_type.nbytes)
    for i in gl.static_range(BLOCKS):
        load_tile(q_desc, [b, 64 * i, h, 0], full.index(0), q.index(i))
        load_tile(k_desc, [b, 64 * i, h, 0], full.index(0), k.index(i))
    for i in gl.static_range(BLOCKS):
        load_tile(v_desc, [b, 64 * i, h, 0], full.index(1), v.index(i))
        load_tile(do_desc, [b, 64 * i, h, 0], full.index(1), do.index(i))

    r = gl.arange(0, 64, gl.SliceLayout(1, READ))
    d = gl.arange(0, D, gl.SliceLayout(0, READ))
    read = ()
    for i in gl.static_range(BLOCKS):  # beside the copies
        t = 64 * i + r
        at = ((b.to(gl.int64) * T + t) * H + h)[:, None] * D + d[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        o_rows = gl.load(o_ptr + at, mask=inside, other=0.0)
        do_rows = gl.load(do_ptr + at, mask=inside, other=0.0)
        L_rows = gl.load(L_ptr + bh.to(gl.int64) * T + t, mask=t < T, other=float("inf"))
        read = read + ((o_rows, do_rows, L_rows),)
    for i in gl.static_range(BLOCKS):
        o_rows, do_rows, L_rows = read[i]
        deltas.index(i).store(gl.sum(o_rows.to(gl.float32) * do_rows.to(gl.float32), 1))
        Ls.index(i).store(L_rows * LOG2_E)
    angles = ()
    for i in gl.static_range(BLOCKS):
        angles = angles + (angles_of(cos_ptr, sin_ptr, 64 * i, T, D, PAIRS),)
    mbarrier.wait(full.index(0), 0)
    _turn_where_they_lie(q, k, angles, BLOCKS, D, PAIRS, SUMS)
    mbarrier.wait(full.index(1), 0)

    nothing = gl.zeros([64, 64], gl.float32, SCORES)
    row = gl.arange(0, 64, ROWS)
    column = gl.arange(0, 64, COLUMNS)
    for i in range(BLOCKS):
        q_tile = q.index(i).reshape([64, D])
        do_tile = do.index(i).reshape([64, D])
        L = Ls.index(i).load(ROWS)
        delta = deltas.index(i).load(ROWS)
        dq = warpgroup_mma_init(gl.zeros([64, D], gl.float32, SUMS))
        for j in range(i + 1):
            k_tile = k.index(j).reshape([64, D])
            score = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            v_tile = v.index(j).reshape([64, D])
            dp = warpgroup_mma(do_tile, v_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            score, dq = warpgroup_mma_wait(1, deps=[score, dq])
            p = gl.exp2(score * scale_log2 - L[:, None])
            if i == j:
                p = gl.where(column[None, :] <= row[:, None], p, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), FACTOR)
            dq = warpgroup_mma(ds, k_tile, dq, is_async=True)
        cos, sin = angles_of(cos_ptr, sin_ptr, 64 * i, T, D, PAIRS)
        dq = warpgroup_mma_wait(0, deps=[dq])
        tma.store_wait(1)  # the tile before the last one has left its buffer
        barrier()
        _put(out.index(i % 2), turned(dq, cos, -sin, D, PAIRS, SUMS) * scale, D)
        fence_async_shared()
        barrier()
        store_tile(dq_desc, [b, 64 * i, h, 0], out.index(i % 2))

    for j in range(BLOCKS):
        k_tile = k.index(j).reshape([64, D])
        v_tile = v.index(j).reshape([64, D])
        dk = warpgroup_mma_init(gl.zeros([64, D], gl.float32, SUMS))
        dv = warpgroup_mma_init(gl.zeros([64, D], gl.float32, SUMS))
        for i in range(j, BLOCKS):
            q_tile = q.index(i).reshape([64, D])
            score = warpgroup_mma(k_tile, q_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            do_tile = do.index(i).reshape([64, D])
            dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
            L = Ls.index(i).load(COLUMNS)
            score, dk, dv = warpgroup_mma_wait(1, deps=[score, dk, dv])
            p = gl.exp2(score * scale_log2 - L[None, :])
            if i == j:
                p = gl.where(row[:, None] <= column[None, :], p, 0.0)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), FACTOR), do_tile, dv, is_async=True)
            delta = deltas.index(i).load(COLUMNS)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), FACTOR)
            dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
        cos, sin = angles_of(cos_ptr, sin_ptr, 64 * j, T, D, PAIRS)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        barrier()  # each warp waited for its own part of the products that read k and v
        _put(v.index(j), dv, D)
        _put(k.index(j), turned(dk, cos, -sin, D, PAIRS, SUMS) * scale, D)
        fence_async_shared()
        barrier()
        store_tile(dv_desc, [b, 64 * j, h, 0], v.index(j))
        store_tile(dk_desc, [b, 64 * j, h, 0], k.index(j))
    tma.store_wait(0)

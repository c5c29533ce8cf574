"""Flash attention backward for Hopper GPUs, in Gluon: warps that load and add beside warps that compute.

The math is that of `flash_attention.py`, the way of working that of `hopper_forward.py`; read these first.

Sources: Shah et al., "FlashAttention-3", 2024 (arXiv:2407.08608), section 3 and algorithm 3 of its appendix.
         The tile, 64 queries by 128 keys, is the one of Dao-AILab/flash-attention for D = 128.

A program (one a processor) takes one tile after another: 128 keys of one key/value head, 64 for each of two warpgroups.
It walks over all queries that see them, 64 at a time, head by head of the group:

    loader, 1 warp            copies k and v of each tile, and q, L, do and delta of each block of queries
    warpgroup c, 4 warps      dk and dv of keys 64 c to 64 c + 63, and half of dq
    adder, 1 warp             adds what the warpgroups found of dq to a float32 sum in global memory

Blocks are counted through all tiles, so that buffers and barriers know of none. While dk and dv of a tile go out, by
way of the buffers of dq, the loader is at the next. With PAIRS, keys were turned by `rope.py`: then dk is turned back
in registers, as `hopper_rope.py` does it, by angles that are read beside the wait for the last dq.

Each warpgroup holds scores transposed, (64 keys, 64 queries), so that p and ds stay in registers as first factors of

    dv += p do          dk += ds q

dq needs the ds of all 128 keys, so each warpgroup writes its part of ds to shared memory, and waits for the other's.
Then each computes half the channels of dq, or, with `AT_ONCE` = 2, in turn all of them for every other block:

    dq[:, half] = ds^T k[:, half]           (64 queries, 128 keys) times (128 keys, D / 2)
    dq          = ds^T k                    (64 queries, 128 keys) times (128 keys, D)

In turn, ds is read from shared memory once, not twice, and at D = 64, where that memory is the limit, a product of 64
columns keeps the tensor cores busy, as one of 32 does not. At D = 128 there are not enough registers for it.

Waiting for it would keep both warpgroups in step, and then neither multiplies while both take exponentials. So dq is
that of the block of queries before, whose ds has long been there, and they may drift apart. Where each computes half of
dq, dv is begun before dp is awaited too, so that a product is under way beside all that is computed.

With `IN_REGISTERS`, k and v are read from shared memory once, not for each block: at D = 64 shared memory is the limit,
at D = 128 registers are.

Mask:     as in `hopper_forward.py`. Keys past S get p = 0; for queries past T, L is +inf, which makes p = 0 too.
Numerics: as in `flash_attention.py`, but that dq is summed by the copy engine in float32, in no fixed order: dq may
          differ between runs in its last bits. dk and dv are the same in every run.
          Where dk is turned back, that is done in float32, before it is rounded, once.
Limits:   those of `hopper_forward.py`.
"""

from lfs_cli.kernels.gluon_compatibility import (
    add_tile,
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    reinterpret,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from lfs_cli.kernels.hopper_buffers import buffer_of, make_barriers, phase_of
from lfs_cli.kernels.hopper_rope import angles_of, turned


@aggregate
class Ring:
    """STAGES buffers of blocks of queries: a tile of q or do, and a number for each query, its L or delta."""

    tiles: gl.shared_memory_descriptor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def load(self, i, descriptor, place, number_descriptor, number_place):
        """Start to copy the i-th block as soon as its buffer is empty."""
        stage = buffer_of(i, self.STAGES)
        full = self.full.index(stage)
        mbarrier.wait(self.empty.index(stage), phase_of(i, self.STAGES) ^ 1)
        mbarrier.expect(full, descriptor.block_type.nbytes + number_descriptor.block_type.nbytes)
        load_tile(descriptor, place, full, self.tiles.index(stage))
        load_tile(number_descriptor, number_place, full, self.numbers.index(stage))

    @gluon.jit
    def await_full(self, i):
        """Wait until the i-th block is there."""
        mbarrier.wait(self.full.index(buffer_of(i, self.STAGES)), phase_of(i, self.STAGES))

    @gluon.jit
    def tile(self, i, ROWS: gl.constexpr, D: gl.constexpr):
        """The tile of the i-th block, as a matrix."""
        return self.tiles.index(buffer_of(i, self.STAGES)).reshape([ROWS, D])

    @gluon.jit
    def release(self, i):
        """Say that this warpgroup has read the i-th block."""
        mbarrier.arrive(self.empty.index(buffer_of(i, self.STAGES)), count=1)


@gluon.jit
def make_ring(descriptor, number_descriptor, STAGES: gl.constexpr):
    """Allocate a ring that two warpgroups read."""
    tiles = gl.allocate_shared_memory(descriptor.dtype, [STAGES] + descriptor.block_shape, descriptor.layout)
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES] + number_descriptor.block_shape, number_descriptor.layout)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, 2)
    return Ring(tiles, numbers, full, empty, STAGES)


@aggregate
class Work:
    """What the partitions of a program share.

    `order_ptr` says which tiles are whose, as in `hopper_forward.py`. A tile is a number: head * (blocks of keys of a
    head) + block, with key/value heads counted through the batch.

    `ds` has DS_BUFFERS buffers, each full when both warpgroups have written their half; `dq` has one for each of them.
    No barrier says that a buffer of ds is empty. A warpgroup that writes the ds of block i has seen that of block
    i - 2 complete, so the other one is done with dq of block i - 4: four buffers are enough.

    In turn, each looks at every other block, but at i - 2 where the buffer held a block of the other one, which is then
    done with its blocks up to i - 5: five are enough.

    No barrier says that a buffer of k is empty either. A warpgroup says that it has read v, with `IN_REGISTERS` at the
    beginning of a tile, when it is done with the dq of the tile before: two buffers of k are enough, else one.
    """

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    do_desc: tma.tensor_descriptor
    dq_desc: tma.tensor_descriptor
    dk_desc: tma.tensor_descriptor
    dv_desc: tma.tensor_descriptor
    L_desc: tma.tensor_descriptor
    delta_desc: tma.tensor_descriptor
    q: Ring
    do: Ring
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    ds_full: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    dq_full: gl.shared_memory_descriptor
    dq_empty: gl.shared_memory_descriptor
    order_ptr: gl.tensor
    T: gl.tensor
    S: gl.tensor
    T_padded: gl.tensor
    H: gl.tensor
    scale_log2: gl.tensor
    scale: gl.tensor
    GROUP: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr
    DS_BUFFERS: gl.constexpr
    K_BUFFERS: gl.constexpr
    SCORES: gl.constexpr
    PAIRS: gl.constexpr
    IN_REGISTERS: gl.constexpr
    AT_ONCE: gl.constexpr

    @gluon.jit
    def place(self, tile):
        """Batch, key/value head, first key and first query of a tile, and how many blocks of queries see it."""
        key_blocks = gl.cdiv(self.S, 128)
        bg = tile // key_blocks
        s_start = tile % key_blocks * 128
        t_first = 0
        if self.CAUSAL:
            t_first = gl.maximum(s_start - (self.S - self.T), 0) // 64 * 64
        G = self.H // self.GROUP
        blocks = gl.cdiv(self.T - t_first, 64 * self.AT_ONCE) * self.AT_ONCE
        return bg // G, bg % G, s_start, t_first, blocks


@gluon.jit
def _load(work):
    """The loader."""
    first = gl.load(work.order_ptr + gl.program_id(0))
    stop = gl.load(work.order_ptr + gl.program_id(0) + 1)
    i = 0
    for turn in range(first, stop):
        b, g, s_start, t_first, blocks = work.place(gl.load(work.order_ptr + turn))
        n = turn - first
        full = work.kv_full.index(buffer_of(n, work.K_BUFFERS))
        mbarrier.wait(work.v_empty.index(0), (n & 1) ^ 1)
        mbarrier.expect(full, work.k_desc.block_type.nbytes + 2 * work.v_desc.block_type.nbytes)
        load_tile(work.k_desc, [b, s_start, g, 0], full, work.k.index(buffer_of(n, work.K_BUFFERS)))
        for c in gl.static_range(2):
            load_tile(work.v_desc, [b, s_start + 64 * c, g, 0], full, work.v.index(c))
        for member in range(work.GROUP):
            h = g * work.GROUP + member
            row = (b * work.H + h) * work.T_padded
            for j in range(blocks):
                t = t_first + 64 * j
                work.q.load(i, work.q_desc, [b, t, h, 0], work.L_desc, [row + t])
                work.do.load(i, work.do_desc, [b, t, h, 0], work.delta_desc, [row + t])
                i += 1


@gluon.jit
def _add(work):
    """The adder: both warpgroups' dq, of one block of queries or of two."""
    first = gl.load(work.order_ptr + gl.program_id(0))
    stop = gl.load(work.order_ptr + gl.program_id(0) + 1)
    i = 0
    for turn in range(first, stop):
        b, g, _s_start, t_first, blocks = work.place(gl.load(work.order_ptr + turn))
        for member in range(work.GROUP):
            bh = b * work.H + g * work.GROUP + member
            for j in range(blocks // work.AT_ONCE):
                t = t_first + 64 * work.AT_ONCE * j
                for c in gl.static_range(2):
                    place = [bh, t, work.D // 2 * c]
                    if work.AT_ONCE == 2:
                        place = [bh, t + 64 * c, 0]
                    mbarrier.wait(work.dq_full.index(c), i & 1)
                    add_tile(work.dq_desc, place, work.dq.index(c))
                for c in gl.static_range(2):
                    tma.store_wait(1 - c)  # the copy of c has left its buffer
                    mbarrier.arrive(work.dq_empty.index(c), count=1)
                i += 1


@gluon.jit
def _masked(work, s_start, t_first, blocks):
    """How many of a tile's first blocks of queries do not see all of the 64 keys from `s_start` on."""
    masked = 0
    if work.CAUSAL:
        masked = gl.cdiv(gl.maximum(s_start + 63 - (work.S - work.T) - t_first, 0), 64)
    if s_start + 64 > work.S:
        masked = blocks
    return masked


@gluon.jit
def _probabilities(score, L, t_start, s_start, clear, work):
    """The p of a transposed tile: exp(scale q.k - L), and 0 where query t does not see key s, before query `clear`."""
    p = gl.exp2(score * work.scale_log2 - L[None, :])
    if t_start < clear:
        s = s_start + gl.arange(0, 64, gl.SliceLayout(1, work.SCORES))
        t = t_start + gl.arange(0, 64, gl.SliceLayout(0, work.SCORES))
        visible = s[:, None] < work.S
        if work.CAUSAL:
            visible = visible & (s[:, None] <= (t + (work.S - work.T))[None, :])
        p = gl.where(visible, p, 0.0)
    return p


@gluon.jit
def _give_dq(work, dq, is_any, C: gl.constexpr):
    """Hand this warpgroup's dq of a block to the adder, if there is such a block."""
    if is_any:
        work.dq.index(C).reshape([64, dq.shape[1]]).store(dq)
        fence_async_shared()
        mbarrier.arrive(work.dq_full.index(C), count=1)


@gluon.jit
def _give_last_dq(work, k_of_dq, no_dq, j, C: gl.constexpr):
    """The dq of a tile's last block, when all else of the tile is done."""
    if work.AT_ONCE == 1 or C == 1:
        buffer = buffer_of(j, work.DS_BUFFERS)
        mbarrier.wait(work.ds_full.index(buffer), phase_of(j, work.DS_BUFFERS))
        dq = warpgroup_mma(work.ds.index(buffer).permute((1, 0)), k_of_dq, no_dq, use_acc=False, is_async=True)
        mbarrier.wait(work.dq_empty.index(C), ((j // work.AT_ONCE) & 1) ^ 1)
        dq = warpgroup_mma_wait(0, deps=[dq])
        _give_dq(work, dq, True, C)


@gluon.jit
def _give_dk_and_dv(work, dk, dv, angle_ptrs, place, base, SUMS: gl.constexpr, C: gl.constexpr):
    """Start to copy a tile's dk and dv out, by the buffer of dq, which `base` blocks have used. Turn dk back first."""
    if not work.IN_REGISTERS:
        mbarrier.arrive(work.v_empty.index(0), count=1)
    angles = ()
    if work.PAIRS is not None:  # beside the wait for the last dq
        cos_ptr, sin_ptr = angle_ptrs
        angles = angles_of(cos_ptr, sin_ptr, place[1], work.S, work.D, work.PAIRS)
    AT_ONCE: gl.constexpr = work.AT_ONCE
    dtype: gl.constexpr = work.dk_desc.dtype
    out = reinterpret(work.dq.index(C), dtype, [AT_ONCE] + work.dk_desc.block_shape, work.dk_desc.layout)
    mbarrier.wait(work.dq_empty.index(C), ((base // AT_ONCE) & 1) ^ 1)  # the last dq has left the buffer
    out.index(0).reshape([64, work.D]).store(dv.to(dtype))
    fence_async_shared()
    store_tile(work.dv_desc, place, out.index(0))
    if work.PAIRS is not None:
        dk = turned(dk, angles[0], -angles[1], work.D, work.PAIRS, SUMS)
    if AT_ONCE == 1:  # there is room for one of them
        tma.store_wait(0)
    out.index(AT_ONCE - 1).reshape([64, work.D]).store((dk * work.scale).to(dtype))
    fence_async_shared()
    store_tile(work.dk_desc, place, out.index(AT_ONCE - 1))


@gluon.jit
def _differentiate(work, angle_ptrs, C: gl.constexpr):
    """Warpgroup C: dk and dv of its 64 keys, and its part of dq. `angle_ptrs` are of cos and sin, if there are any."""
    D: gl.constexpr = work.D
    BUFFERS: gl.constexpr = work.DS_BUFFERS
    SCORES: gl.constexpr = work.SCORES
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    AT_ONCE: gl.constexpr = work.AT_ONCE
    WIDTH: gl.constexpr = D // 2 * AT_ONCE
    OF_DQ: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = work.q_desc.dtype
    no_score = gl.zeros([64, 64], gl.float32, SCORES)
    no_dq = gl.zeros([64, WIDTH], gl.float32, OF_DQ)

    first = gl.load(work.order_ptr + gl.program_id(0))
    stop = gl.load(work.order_ptr + gl.program_id(0) + 1)
    base = 0  # blocks of queries of the tiles before this one
    for turn in range(first, stop):
        b, g, s_start, t_first, blocks = work.place(gl.load(work.order_ptr + turn))
        dk = gl.zeros([64, D], gl.float32, SUMS)
        dv = gl.zeros([64, D], gl.float32, SUMS)
        n = turn - first
        keys = work.k.index(buffer_of(n, work.K_BUFFERS)).reshape([128, D])
        k_of_dq = keys.slice(D // 2 * C * (2 - AT_ONCE), WIDTH, 1)
        k = keys.slice(64 * C, 64, 0)
        v = work.v.index(C).reshape([64, D])
        mbarrier.wait(work.kv_full.index(buffer_of(n, work.K_BUFFERS)), phase_of(n, work.K_BUFFERS))
        if work.IN_REGISTERS:
            k = k.load(gl.DotOperandLayout(0, SCORES, 2))
            v = v.load(gl.DotOperandLayout(0, SCORES, 2))
            mbarrier.arrive(work.v_empty.index(0), count=1)
        tma.store_wait(0)  # dk of the tile before has left the buffer
        for member in range(work.GROUP):
            start = base + member * blocks
            t_start = t_first
            clear = t_first + 64 * _masked(work, s_start + 64 * C, t_first, blocks)
            for pair in range(start, start + blocks, AT_ONCE):
                for part in gl.static_range(AT_ONCE):
                    i = pair + part
                    q = work.q.tile(i, 64, D)
                    do = work.do.tile(i, 64, D)
                    work.q.await_full(i)
                    score = warpgroup_mma(k, q.permute((1, 0)), no_score, use_acc=False, is_async=True)
                    work.do.await_full(i)
                    dp = warpgroup_mma(v, do.permute((1, 0)), no_score, use_acc=False, is_async=True)
                    L = work.q.numbers.index(buffer_of(i, work.q.STAGES)).load(COLUMNS)
                    score = warpgroup_mma_wait(1, deps=[score])
                    p = _probabilities(score, L, t_start, s_start + 64 * C, clear, work)
                    t_start += 64
                    p_half = gl.convert_layout(p.to(dtype), FACTOR)
                    if AT_ONCE == 1:  # dv beside what is done with dp
                        dv = warpgroup_mma(p_half, do, dv, is_async=True)
                        dp = warpgroup_mma_wait(1, deps=[dp])
                    else:
                        dp = warpgroup_mma_wait(0, deps=[dp])
                    delta = work.do.numbers.index(buffer_of(i, work.do.STAGES)).load(COLUMNS)
                    ds = (p * (dp - delta[None, :])).to(dtype)
                    if AT_ONCE == 2:
                        dv = warpgroup_mma(p_half, do, dv, is_async=True)
                    ds_half = gl.convert_layout(ds, FACTOR)
                    work.ds.index(buffer_of(i, BUFFERS)).slice(64 * C, 64, 0).store(ds)
                    fence_async_shared()
                    mbarrier.arrive(work.ds_full.index(buffer_of(i, BUFFERS)), count=1)

                    j = i - 1  # the block of queries whose dq this is
                    is_ours = j >= base  # else of the tile before: the product is of no use, and not used
                    buffer = buffer_of(j + BUFFERS, BUFFERS)  # no number is negative
                    phase = phase_of(j, BUFFERS)
                    if AT_ONCE == 1:  # dk first: its factors are there
                        dk = warpgroup_mma(ds_half, q, dk, is_async=True)
                        mbarrier.wait(work.ds_full.index(buffer), phase, pred=is_ours)
                        dq = warpgroup_mma(
                            work.ds.index(buffer).permute((1, 0)), k_of_dq, no_dq, use_acc=False, is_async=True
                        )
                        dv = warpgroup_mma_wait(2, deps=[dv])
                        work.do.release(i)
                        dk = warpgroup_mma_wait(1, deps=[dk])
                        work.q.release(i)
                        mbarrier.wait(work.dq_empty.index(C), (j & 1) ^ 1, pred=is_ours)
                        dq = warpgroup_mma_wait(0, deps=[dq])
                        _give_dq(work, dq, is_ours, C)
                    elif part == 1 - C:  # dq first: it is given away while dk is computed
                        mbarrier.wait(work.ds_full.index(buffer), phase, pred=is_ours)
                        dq = warpgroup_mma(
                            work.ds.index(buffer).permute((1, 0)), k_of_dq, no_dq, use_acc=False, is_async=True
                        )
                        dv = warpgroup_mma_wait(1, deps=[dv])
                        work.do.release(i)
                        dk = warpgroup_mma(ds_half, q, dk, is_async=True)
                        mbarrier.wait(work.dq_empty.index(C), ((j // 2) & 1) ^ 1, pred=is_ours)
                        dq = warpgroup_mma_wait(1, deps=[dq])
                        _give_dq(work, dq, is_ours, C)
                        dk = warpgroup_mma_wait(0, deps=[dk])
                        work.q.release(i)
                    else:  # the other warpgroup's turn
                        dk = warpgroup_mma(ds_half, q, dk, is_async=True)
                        dv = warpgroup_mma_wait(1, deps=[dv])
                        work.do.release(i)
                        dk = warpgroup_mma_wait(0, deps=[dk])
                        work.q.release(i)
        base += work.GROUP * blocks
        _give_last_dq(work, k_of_dq, no_dq, base - 1, C)
        _give_dk_and_dv(work, dk, dv, angle_ptrs, [b, s_start + 64 * C, g, 0], base, SUMS, C)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "S", "T_padded", "H"])
def backward(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    L_desc,
    delta_desc,
    order_ptr,
    cos_ptr,
    sin_ptr,
    T,
    S,
    T_padded,
    H,
    scale_log2,
    scale,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    DS_LAYOUT: gl.constexpr,
    PAIRS: gl.constexpr,
    CAUSAL: gl.constexpr,
    IN_REGISTERS: gl.constexpr,
    AT_ONCE: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Write dk and dv of this program's tiles, and add to dq / scale of the queries that see them.

    Descriptors are of (B, T, H, D) and (B, S, G, D) tensors in blocks of 64 rows of one head, 128 for k; of (B H, T, D)
    for dq; of flat (B H T_padded) for L (times log2(e), +inf past T) and delta. Cos and sin are (S, D / 2), or None as
    PAIRS is, where nothing is turned.
    """
    q = make_ring(q_desc, L_desc, STAGES)
    do = make_ring(do_desc, delta_desc, STAGES)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    K_BUFFERS: gl.constexpr = 2 if IN_REGISTERS else 1  # as many as there is room for
    k = gl.allocate_shared_memory(k_desc.dtype, [K_BUFFERS] + k_desc.block_shape, k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_shape, v_desc.layout)
    DS_BUFFERS: gl.constexpr = 3 + AT_ONCE
    ds = gl.allocate_shared_memory(q_desc.dtype, [DS_BUFFERS, 128, 64], DS_LAYOUT)
    dq = gl.allocate_shared_memory(gl.float32, [2] + dq_desc.block_shape, dq_desc.layout)
    work = Work(
        q_desc,
        k_desc,
        v_desc,
        do_desc,
        dq_desc,
        dk_desc,
        dv_desc,
        L_desc,
        delta_desc,
        q,
        do,
        k,
        v,
        make_barriers(K_BUFFERS, 1),
        make_barriers(1, 2),
        ds,
        make_barriers(DS_BUFFERS, 2),
        dq,
        make_barriers(2, 1),
        make_barriers(2, 1),
        order_ptr,
        T,
        S,
        T_padded,
        H,
        scale_log2,
        scale,
        GROUP,
        D,
        CAUSAL,
        DS_BUFFERS,
        K_BUFFERS,
        SCORES,
        PAIRS,
        IN_REGISTERS,
        AT_ONCE,
    )
    angle_ptrs = (cos_ptr, sin_ptr)
    gl.warp_specialize(
        [
            (_differentiate, (work, angle_ptrs, 0)),
            (_differentiate, (work, angle_ptrs, 1)),
            (_load, (work,)),
            (_add, (work,)),
        ],
        [4, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )

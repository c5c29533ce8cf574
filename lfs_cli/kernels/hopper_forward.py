"""Flash attention forward for Hopper GPUs, in Gluon: warps that load beside warps that compute.

The math is that of `flash_attention.py`; read that first. New here is who does what, and when.

Sources: Shah et al., "FlashAttention-3", 2024 (arXiv:2407.08608), section 3: producer and consumer warps, and the
         product of one block beside the softmax of the next.
         Dao-AILab/flash-attention and Meta's TLX for tile sizes and for heads in groups that fit the L2 cache.

A program (one a processor) takes one tile after another: 64 queries for each of its 2 or 3 warpgroups, of one head.

    loader, 1 warp            waits for an empty buffer, starts a copy of q, k or v into it, goes on
    warpgroup c, 4 warps      o and L of queries 64 c to 64 c + 63 of the tile

A ring of buffers lies between them (`Ring`): the copy engine announces a full buffer, readers release it. A warpgroup
walks from the last block of keys to the first, so that the masked ones, which are few, come first:

    scores of the last block of the first tile; mask; softmax
    for each tile:
        for each block before its last, j = 1, 2, ...:
            start  score = q k_j^T          the tensor cores work off both,
            start  a    += p v_(j - 1)      in this order
            wait for score; mask; softmax   while p v is still under way
            wait for a; a *= w              what `flash_attention.py` calls w
        start  score = q k_0^T              of the next tile, if there is one: m and l begin anew
        start  a    += p v_j                of this one, its first block
        L of this tile; wait for score; mask; softmax
        wait for a; o = a / l

So the tensor cores have work beside every softmax but the first, which counts where a tile has few blocks. For that, q
of two tiles is in flight.

ptxas moves the wait for `a` above the softmax when both are in one basic block, and nothing overlaps any more. The wait
for the next keys stands between them for that reason: it ends the block. A test reads the order off the machine code.

Mask:     query t sees key s when s <= t + S - T, the last query at the last key; without `CAUSAL`, every s < S.
Numerics: as in `flash_attention.py`. A row that has seen nothing yet has m = LEAST, not -inf: no inf - inf.
Layout:   any strides; rows past T and S are read as zeros and never written, by the bounds of the descriptors.
Limits:   D of 64 or 128; bfloat16, float16; T <= S when causal.
"""

from lfs_cli.kernels.gluon_compatibility import (
    aggregate,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from lfs_cli.kernels.hopper_buffers import buffer_of, phase_of

LN_2 = gl.constexpr(0.6931471805599453)
LEAST = gl.constexpr(-1e30)


@aggregate
class Ring:
    """STAGES buffers in shared memory that are filled and emptied in turn."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def load(self, i, descriptor, place):
        """Start to copy the i-th tile as soon as its buffer is empty."""
        stage = buffer_of(i, self.STAGES)
        mbarrier.wait(self.empty.index(stage), phase_of(i, self.STAGES) ^ 1)
        mbarrier.expect(self.full.index(stage), descriptor.block_type.nbytes)
        load_tile(descriptor, place, self.full.index(stage), self.tiles.index(stage))

    @gluon.jit
    def await_full(self, i, pred=True):
        """Wait until the i-th tile is there."""
        mbarrier.wait(self.full.index(buffer_of(i, self.STAGES)), phase_of(i, self.STAGES), pred=pred)

    @gluon.jit
    def tile(self, i, ROWS: gl.constexpr, D: gl.constexpr):
        """The buffer of the i-th tile, as a matrix."""
        return self.tiles.index(buffer_of(i, self.STAGES)).reshape([ROWS, D])

    @gluon.jit
    def release(self, i):
        """Say that this warpgroup has read the i-th tile."""
        mbarrier.arrive(self.empty.index(buffer_of(i, self.STAGES)), count=1)


@gluon.jit
def make_ring(descriptor, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Allocate a ring for tiles of `descriptor` that READERS warpgroups read."""
    tiles = gl.allocate_shared_memory(descriptor.dtype, [STAGES] + descriptor.block_shape, descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(tiles, full, empty, STAGES)


@aggregate
class Work:
    """What the partitions of a program share.

    `order_ptr` says which tiles are whose: program i takes those at places order[i] to order[i + 1] - 1 of the same
    array. A tile is a number: head * (blocks of queries of a head) + block, with heads counted through the batch.
    """

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    o_desc: tma.tensor_descriptor
    L_ptr: gl.tensor
    order_ptr: gl.tensor
    q: Ring
    k: Ring
    v: Ring
    o: gl.shared_memory_descriptor
    T: gl.tensor
    S: gl.tensor
    H: gl.tensor
    scale: gl.tensor
    GROUP: gl.constexpr
    WARPGROUPS: gl.constexpr
    BLOCK_S: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr

    @gluon.jit
    def place(self, tile):
        """Batch, head and first query of a tile, and how many blocks of keys its queries see."""
        BLOCK_T: gl.constexpr = 64 * self.WARPGROUPS
        blocks = gl.cdiv(self.T, BLOCK_T)
        bh = tile // blocks
        t_start = tile % blocks * BLOCK_T
        seen = self.S
        if self.CAUSAL:
            seen = gl.minimum(self.S, t_start + BLOCK_T + self.S - self.T)
        return bh // self.H, bh % self.H, t_start, gl.cdiv(seen, self.BLOCK_S)

    @gluon.jit
    def masked(self, t, blocks):
        """How many blocks, of those that a tile sees, hold keys that query t does not see."""
        seen = self.S
        if self.CAUSAL:
            seen = t + 1 + self.S - self.T
        return blocks - seen // self.BLOCK_S


@gluon.jit
def _load_queries(turn, b, h, t_start, work):
    """Copy q of the tile that is the program's `turn`-th."""
    for c in gl.static_range(work.WARPGROUPS):
        work.q.load(turn * work.WARPGROUPS + c, work.q_desc, [b, t_start + 64 * c, h, 0])


@gluon.jit
def _load_keys(step, b, h, block, work):
    """Copy a block of k and v."""
    place = [b, block * work.BLOCK_S, h // work.GROUP, 0]
    work.k.load(step, work.k_desc, place)
    work.v.load(step, work.v_desc, place)


@gluon.jit
def _load(work):
    """The loader: copy k and v of each tile block by block, and q of the next tile after the first block.

    By then the buffers of that q are about to be empty. Later, and the warpgroups would wait for it between tiles.
    """
    first = gl.load(work.order_ptr + gl.program_id(0))
    stop = gl.load(work.order_ptr + gl.program_id(0) + 1)
    b, h, t_start, blocks = work.place(gl.load(work.order_ptr + first))
    _load_queries(0, b, h, t_start, work)
    step = 0
    for turn in range(first, stop):
        _load_keys(step, b, h, blocks - 1, work)
        next_b, next_h, t_start, next_blocks = work.place(gl.load(work.order_ptr + turn + 1))
        if turn + 1 < stop:
            _load_queries(turn + 1 - first, next_b, next_h, t_start, work)
        for j in range(1, blocks):
            _load_keys(step + j, b, h, blocks - 1 - j, work)
        step += blocks
        b, h, blocks = next_b, next_h, next_blocks


@gluon.jit
def _mask(score, t, s, work):
    """The scores of queries t and keys s, with -inf where the query does not see the key."""
    if work.CAUSAL:
        visible = s[None, :] <= (t + (work.S - work.T))[:, None]
    else:
        visible = s[None, :] < work.S
    return gl.where(visible, score, -float("inf"))


@gluon.jit
def _softmax(score, m, l, scale):
    """One block of the online softmax: p, the weight w of all before it, and the new m and l."""
    n = gl.maximum(m, gl.max(score, 1))
    n_scaled = n * scale
    w = gl.exp2((m - n) * scale)  # not m * scale - n_scaled: rounded apart, these differ by far when both are LEAST
    p = gl.exp2(score * scale - n_scaled[:, None])
    return p, w, n, l * w + gl.sum(p, 1)


@gluon.jit
def _store_logsumexp(m, l, b, h, t, work):
    """Write L of queries t."""
    L_row = work.L_ptr + (b * work.H + h).to(gl.int64) * work.T
    gl.store(L_row + t, (m * work.scale + gl.log2(l)) * LN_2, mask=t < work.T)


@gluon.jit
def _attend(work, C: gl.constexpr):
    """Warpgroup C: o and L of its 64 queries of each tile."""
    D: gl.constexpr = work.D
    BLOCK_S: gl.constexpr = work.BLOCK_S
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_S, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    dtype: gl.constexpr = work.q_desc.dtype
    nothing = gl.zeros([64, BLOCK_S], gl.float32, SCORES)
    row = 64 * C + gl.arange(0, 64, ROWS)
    column = gl.arange(0, BLOCK_S, gl.SliceLayout(0, SCORES))
    no_m = gl.full([64], LEAST, gl.float32, ROWS)
    no_l = gl.full([64], 0.0, gl.float32, ROWS)
    scale = work.scale
    o = work.o.index(C)

    first = gl.load(work.order_ptr + gl.program_id(0))
    stop = gl.load(work.order_ptr + gl.program_id(0) + 1)
    b, h, t_start, blocks = work.place(gl.load(work.order_ptr + first))
    masked = work.masked(t_start + 64 * C, blocks)
    tile = gl.load(work.order_ptr + first + 1)  # one ahead: its latency passes meanwhile. The array has one more
    q_turn = C
    step = 0
    work.q.await_full(q_turn)
    work.k.await_full(step)
    k = work.k.tile(step, BLOCK_S, D)
    q = work.q.tile(q_turn, 64, D)
    score = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    work.k.release(step)
    if masked > 0:
        score = _mask(score, t_start + row, (blocks - 1) * BLOCK_S + column, work)
    p, w, m, l = _softmax(score, no_m, no_l, scale)
    p_half = gl.convert_layout(p.to(dtype), FACTOR)
    work.k.await_full(step + 1, pred=blocks > 1)
    for turn in range(first, stop):
        a = gl.zeros([64, D], gl.float32, OUTPUT)
        for j in range(1, blocks):
            k = work.k.tile(step + 1, BLOCK_S, D)
            score = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            work.v.await_full(step)
            a = warpgroup_mma(p_half, work.v.tile(step, BLOCK_S, D), a, is_async=True)
            score = warpgroup_mma_wait(1, deps=[score])
            work.k.release(step + 1)
            if j < masked:
                score = _mask(score, t_start + row, (blocks - 1 - j) * BLOCK_S + column, work)
            p, w, m, l = _softmax(score, m, l, scale)
            work.k.await_full(step + 2, pred=j + 1 < blocks)  # between softmax and wait: see the head of this file
            a = warpgroup_mma_wait(0, deps=[a])
            work.v.release(step)
            p_half = gl.convert_layout(p.to(dtype), FACTOR)
            a = a * gl.convert_layout(w, OUTPUT_ROWS)[:, None]
            step += 1
        work.q.release(q_turn)

        q_turn += work.WARPGROUPS
        place = [b, t_start + 64 * C, h, 0]
        if turn + 1 < stop:  # the end of this tile beside the beginning of the next
            work.q.await_full(q_turn)
            work.k.await_full(step + 1)
            k = work.k.tile(step + 1, BLOCK_S, D)
            q = work.q.tile(q_turn, 64, D)
            score = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
            work.v.await_full(step)
            a = warpgroup_mma(p_half, work.v.tile(step, BLOCK_S, D), a, is_async=True)
            _store_logsumexp(m, l, b, h, t_start + row, work)
            share = gl.convert_layout(1 / l, OUTPUT_ROWS)
            b, h, t_start, blocks = work.place(tile)
            masked = work.masked(t_start + 64 * C, blocks)
            tile = gl.load(work.order_ptr + turn + 2)
            score = warpgroup_mma_wait(1, deps=[score])
            work.k.release(step + 1)
            if masked > 0:
                score = _mask(score, t_start + row, (blocks - 1) * BLOCK_S + column, work)
            p, w, m, l = _softmax(score, no_m, no_l, scale)
            work.k.await_full(step + 2, pred=blocks > 1)
            a = warpgroup_mma_wait(0, deps=[a])
            p_half = gl.convert_layout(p.to(dtype), FACTOR)
        else:
            work.v.await_full(step)
            a = warpgroup_mma(p_half, work.v.tile(step, BLOCK_S, D), a, is_async=True)
            _store_logsumexp(m, l, b, h, t_start + row, work)
            share = gl.convert_layout(1 / l, OUTPUT_ROWS)
            a = warpgroup_mma_wait(0, deps=[a])
        work.v.release(step)
        step += 1
        tma.store_wait(0)  # the copy of the tile before has left the buffer
        o.reshape([64, D]).store((a * share[:, None]).to(dtype))
        fence_async_shared()
        store_tile(work.o_desc, place, o)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "S", "H"])
def forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    L_ptr,
    order_ptr,
    T,
    S,
    H,
    scale,
    GROUP: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    BLOCK_S: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Write o and L of this program's tiles. `scale` is 1 / sqrt(D), times log2(e).

    Descriptors are of (B, T, H, D) and (B, S, G, D) tensors, in blocks of 64 queries or BLOCK_S keys of one head.
    """
    q = make_ring(q_desc, 2 * WARPGROUPS, 1)  # of a tile and of the next
    k = make_ring(k_desc, STAGES, WARPGROUPS)
    v = make_ring(v_desc, STAGES, WARPGROUPS)
    o = gl.allocate_shared_memory(o_desc.dtype, [WARPGROUPS] + o_desc.block_shape, o_desc.layout)
    work = Work(
        q_desc,
        k_desc,
        v_desc,
        o_desc,
        L_ptr,
        order_ptr,
        q,
        k,
        v,
        o,
        T,
        S,
        H,
        scale,
        GROUP,
        WARPGROUPS,
        BLOCK_S,
        D,
        CAUSAL,
    )
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(_attend, (work, 0)), (_attend, (work, 1)), (_load, (work,))], [4, 1], [REGISTERS, LOADER_REGISTERS]
        )
    else:
        gl.warp_specialize(
            [(_attend, (work, 0)), (_attend, (work, 1)), (_attend, (work, 2)), (_load, (work,))],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )

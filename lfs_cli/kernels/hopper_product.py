"""Matrix products for Hopper GPUs, in Gluon, whose results another warpgroup finishes before they reach memory.

`product.py` says what they are for; here is what they have in common. A program (one a processor) takes one tile after
another: 128 rows of x and 128 columns of each of two matrices, whose products are two sums.

    loader, 1 warp            copies of the next 64 channels of x and of both matrices, as buffers become empty
    warpgroup c, 4 warps      both sums of rows 64 c to 64 c + 63; rounds them and leaves them in shared memory
    finisher, 4 warps         takes them from there: see `hopper_swiglu.py` and `hopper_turned.py`

So the tensor cores are at the next tile while the last one is finished. Where those who multiply also finish, they
wait for exponentials, for what they read beside the sums, and for shared memory to be free.

Sources: NVIDIA's CUTLASS for warps that load beside warps that multiply. Dao-AILab's quack and modded-nanogpt for
         activations in the product before them.
Numerics: sums are float32 and rounded once, to the type of x. No atomics: equal runs are bit-equal.
Layout:   rows and channels past the end of a tensor are read as zeros; nothing is written there.
Limits:   those of `product.py`.
Measured: one H200, 2026-11-30, bfloat16, 32,768 rows of C channels, microseconds of 30 calls in a row by a script:
          ours, and what it takes the place of in the same run, cuBLAS and then `swiglu.py` or `rope.py`. In brackets
          cuBLAS alone. Forward and turned had 168 and 128 registers for those who multiply and finish, and turned read
          its angles after it had waited.

    C, F              gated                 its backward    3 C channels, heads of 64 turned
    512, 1,344        156, 202 (139)        164, 181        (not used: `short_attention.py`)
    768, 2,048        306, 394 (293)        251, 317        197, 240 (173)
    1,024, 2,688      531, 657 (532)        356, 497        342, 399 (313)
    2,048, 5,504      1,112, 1,204 (1,067)  636, 839        636, 735 (630)       16,384 rows
    4,096, 11,008     2,571, 2,278 (2,286)  1,230, 1,429    1,278, 1,355 (1,266) 8,192 rows
    768, 2,048        156, 196 (146)        128, 160        97, 129 (86)         16,384 rows
    768, 2,048        81, 100 (75)          67, 85                               8,192 rows
    768, 2,048        49, 53 (40)           39, 45                               4,096 rows

          Tried at C, F = 768, 2,048, in other runs; what they take the place of took 402 to 426, and 317 to 330:

    forward: those who multiply finish, 4 stages      403; awaiting products at once 372
    the same with three warpgroups, 3 stages          383; 366
    the same, results put away during the next tile   446
    a finisher                                        335; leaving a step's products under way 339
    a finisher, 6 stages of 32 channels               366; 352
    backward: those who multiply finish               364
    a finisher that reads one part of 32 rows ahead   350; 336
    a finisher that reads three parts of 16 rows      264; four 251
"""

from lfs_cli.kernels.gluon_compatibility import (
    aggregate,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from lfs_cli.kernels.hopper_buffers import buffer_of, make_barriers, phase_of


@aggregate
class Work:
    """What the partitions of a program share.

    Tile i is the rows from 128 (i // ACROSS) on, and the columns from WIDTH (i % ACROSS) on. With BY_COLUMN, matrices
    are (columns, channels), else (channels, columns). `sums` holds both sums of warpgroup 0, then those of 1.
    """

    x_desc: tma.tensor_descriptor
    first_desc: tma.tensor_descriptor
    second_desc: tma.tensor_descriptor
    xs: gl.shared_memory_descriptor
    ws: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    sums: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    TILES: gl.tensor
    ACROSS: gl.tensor
    STEPS: gl.tensor
    STAGES: gl.constexpr
    WIDTH: gl.constexpr
    BY_COLUMN: gl.constexpr

    @gluon.jit
    def place(self, tile):
        """Return the first row and the first column of a tile."""
        return tile // self.ACROSS * 128, tile % self.ACROSS * self.WIDTH


@gluon.jit
def make_work(
    x_desc,
    first_desc,
    second_desc,
    TILES,
    ACROSS,
    STEPS,
    STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
    BY_COLUMN: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Allocate what the partitions share. SUMS is how a sum lies in shared memory."""
    xs = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, 64], x_desc.layout)
    ws = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES] + first_desc.block_shape, first_desc.layout)
    sums = gl.allocate_shared_memory(x_desc.dtype, [4, 64, 128], SUMS)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, 2)
    ready = make_barriers(2, 1)
    free = make_barriers(2, 1)
    return Work(
        x_desc,
        first_desc,
        second_desc,
        xs,
        ws,
        full,
        empty,
        sums,
        ready,
        free,
        TILES,
        ACROSS,
        STEPS,
        STAGES,
        WIDTH,
        BY_COLUMN,
    )


@gluon.jit
def load(work):
    """The loader: the factors of each step, as soon as both warpgroups have read those that lay there."""
    step = 0
    size: gl.constexpr = 2 * work.x_desc.block_type.nbytes + 2 * work.first_desc.block_type.nbytes
    for tile in range(gl.program_id(0), work.TILES, gl.num_programs(0)):
        r, column = work.place(tile)
        for i in range(work.STEPS):
            stage = buffer_of(step, work.STAGES)
            full = work.full.index(stage)
            mbarrier.wait(work.empty.index(stage), phase_of(step, work.STAGES) ^ 1)
            mbarrier.expect(full, size)
            load_tile(work.x_desc, [r, 64 * i], full, work.xs.index(2 * stage))
            load_tile(work.x_desc, [r + 64, 64 * i], full, work.xs.index(2 * stage + 1))
            if work.BY_COLUMN:
                load_tile(work.first_desc, [column, 64 * i], full, work.ws.index(2 * stage))
                load_tile(work.second_desc, [column, 64 * i], full, work.ws.index(2 * stage + 1))
            else:
                load_tile(work.first_desc, [64 * i, column], full, work.ws.index(2 * stage))
                load_tile(work.second_desc, [64 * i, column], full, work.ws.index(2 * stage + 1))
            step += 1


@gluon.jit
def _factor(work, i):
    """The i-th buffer of a matrix as the second factor of a product, (64, 128)."""
    w = work.ws.index(i)
    if work.BY_COLUMN:
        w = w.permute((1, 0))
    return w


@gluon.jit
def multiply(work, C: gl.constexpr):
    """Warpgroup C: both sums of its rows of each tile."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    dtype: gl.constexpr = work.x_desc.dtype
    step = 0
    turn = 0
    for _tile in range(gl.program_id(0), work.TILES, gl.num_programs(0)):
        first = gl.zeros([64, 128], gl.float32, SUM)
        second = gl.zeros([64, 128], gl.float32, SUM)
        for _i in range(work.STEPS):
            stage = buffer_of(step, work.STAGES)
            mbarrier.wait(work.full.index(stage), phase_of(step, work.STAGES))
            x = work.xs.index(2 * stage + C)
            first = warpgroup_mma(x, _factor(work, 2 * stage), first, is_async=True)
            second = warpgroup_mma(x, _factor(work, 2 * stage + 1), second, is_async=True)
            # The other warpgroup's products are under way meanwhile, so the tensor cores do not wait as well
            first, second = warpgroup_mma_wait(0, deps=[first, second])
            mbarrier.arrive(work.empty.index(stage), count=1)
            step += 1
        mbarrier.wait(work.free.index(C), (turn & 1) ^ 1)
        work.sums.index(2 * C).store(first.to(dtype))
        work.sums.index(2 * C + 1).store(second.to(dtype))
        fence_async_shared()
        barrier()
        mbarrier.arrive(work.ready.index(C), count=1)
        turn += 1


@gluon.jit
def await_sums(work, c, turn):
    """For the finisher: wait for what warpgroup c has summed for the program's `turn`-th tile."""
    mbarrier.wait(work.ready.index(c), turn & 1)


@gluon.jit
def release_sums(work, c):
    """For the finisher: say that it has read them."""
    barrier()
    mbarrier.arrive(work.free.index(c), count=1)

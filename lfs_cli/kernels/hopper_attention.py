"""Attention for Hopper GPUs (H100, H200): what surrounds the kernels of `hopper_forward.py` and `hopper_backward.py`.

Here is when they can run, how large their tiles are, in which order tiles are worked on, what is computed before and
after them, and the launches. Importing this file imports neither Gluon nor a GPU's libraries.

Order of tiles: with a causal mask the tiles of a head differ in work. The tiles are dealt out to the processors before
the launch, heaviest first, each to the one that is free first: as a GPU would deal out programs, but one program keeps
its processor, and copies the next tile while it finishes this one. Heads are taken in sections whose keys and values,
and backward whose queries and gradients, stay in the L2 cache together. The order depends on shapes alone and is kept.

Measured on one H100 80GB, Triton 3.6, bfloat16, causal, 2026-11-25, in TFLOP/s. Forward with tiles in this order, with
the same tiles dealt out back and forth (program i takes i, 2 n - 1 - i, 2 n + i, ...), and as programs of their own;
each column is a run of its own, on cards that differ by up to 6 %:

    B, H, T, D           in order      back and forth    own programs
    1, 16, 16384, 64     500 to 529    481               467
    8, 16, 2048, 64      345 to 358    323               303
    2, 16, 8192, 128     586 to 664    588               582
    1, 16, 16384, 128    602 to 652    578               618

Backward at 1, 16, 16384, D, what was tried beside what was kept, in one run each:

    D = 64     dq of this block, not of the one before                                   453 beside 515, which is kept
    D = 128    dq of the block before                                                    488 beside 552
    D = 64     k and v read from shared memory for each block of queries                 460 beside 475, which is kept
    D = 64     dq added from registers (red.global.add.v2.f32), not by the copy engine   407 beside 475
    D = 128    the same                                                                  433 beside 543
    D = 64     scores of the next block before dq of this one, in step                   417 beside 445

The same on one H200, 2026-11-29, in one run each, back to back, milliseconds:

    D = 64     half the channels of dq for each warpgroup, not all of them in turn       2.79 beside 2.69, which is kept
    D = 64     in turn, dk before dq                                                     2.83 beside 2.69
    D = 64     in turn, 2 or 4 blocks of queries in flight, not 3                        3.10, 2.88 beside 2.83
    D = 64     blocks of 128 queries                                                     507 spilled accesses
    D = 128    dq before dk                                                              5.42 beside 5.27
    D = 128    in turn                                                                   ptxas puts products in a row

Then programs of backward stayed for tile after tile, forward began a tile beside the end of the one before, and
registers were freed, so that at D = 128 too there is room for the dq of the block before, and for a dv that is begun
before dp is awaited. One H200, 2026-11-29, milliseconds, each line beside what is kept, in the same run:

    A 1, 16, 16384, 64    B 8, 16, 2048, 64     C 32, 12, 1024, 64
    D 2, 16, 8192, 128    E 1, 16, 16384, 128   F 8, 16, 2048, 128

    backward                                               A       B       C         kept
    the phase of ds told from a number that is never < 0   2.64    0.438   0.412     2.54    0.428   0.406
    a program for each tile, dealt out by the GPU          2.52    0.479   0.481     2.49    0.433   0.407
    dv begun before dp is awaited                          2.55    0.432   0.408     2.49    0.428   0.407
    dq of the block before begun beside the scores         2.63    0.446   0.422     2.54    0.428   0.406
    the mask asked for in each block, not counted          2.58    0.436   0.411     2.54    0.428   0.406
    heads in sections of 1, 2, 4, 8 (as B has) and 16      B: 0.454, 0.448, 0.448, 0.435, 0.436
    a buffer of dq given back without the other one                0.439                     0.433

                                                           D       E       F         kept
    dq of this block, not of the one before                2.46    4.92    0.762     2.34    4.61    0.752
    dv begun after dp is awaited                           2.33    4.58    0.749     2.31    4.58    0.746
    dq before dk                                           2.36    4.66    0.754     2.31    4.58    0.746
    k or v in registers                                    41 and 54 spilled accesses, and products in a row

    forward                                                A       B       C         kept
    each tile begun after the end of the one before        1.07    0.199   0.183     1.10    0.194   0.171
    every 8th exponential by a polynomial                  1.19    0.193   0.170     1.10    0.193   0.170
    three warpgroups                                               0.197   0.199             0.193   0.170
    three blocks in flight                                 1.10    0.192   0.170     1.10    0.193   0.170
    tiles that cost one block more, not two, when dealt    1.10    0.194   0.170     1.10    0.193   0.170

The order of a few instructions moves forward by 2 %: 1 / l or a division, t_start + row or t, i & 1 or i % 2.
"""

import heapq
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import no_hopper_reason

HEAD_DIMS = (64, 128)
L2_BYTES = 32 * 2**20  # of 50 MB: the rest is for queries and outputs
LARGEST_SECTION = 16  # heads
ROWS = 64  # of one program of the kernels before and after backward
LOG2_E = 1.4426950408889634


class ForwardTile(NamedTuple):
    """How forward is cut: warpgroups of 64 queries each, 2 or 3, keys of a block, blocks in flight, 2 or more.

    With one it waits for ever: the next scores are begun before the values of the last ones are read.
    """

    warpgroups: int
    block_s: int
    stages: int


class BackwardTile(NamedTuple):
    """How backward works: blocks of queries in flight, and the switches of `hopper_backward.py`."""

    stages: int
    in_registers: bool
    at_once: int


class Registers(NamedTuple):
    """Registers of each thread: of those that compute, of those that load, and of all until they part."""

    computing: int
    loading: int
    all: int


REGISTERS = {2: Registers(240, 24, 168), 3: Registers(160, 32, 128)}
"""The whole 65,536 of a processor, by warpgroups that compute."""

# Three warpgroups are faster where there are many keys, and leave more of a tile unused where there are few. Without a
# causal mask three spill, and with the ptxas of Triton 3.8 and 3.9 they always do: 192 and 135 accesses in the loop.
SHORT = ForwardTile(2, 128, 2)
LONG = ForwardTile(3, 128, 2)
LONG_FROM = 4096  # queries
LONG_WITH = ("3.6.", "3.7.")  # releases of Triton
BACKWARD = {64: BackwardTile(3, True, 2), 128: BackwardTile(2, False, 1)}


def unavailable_reason(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> str | None:
    """Say why these kernels cannot run on such tensors, or `None` when they can.

    Reads types, shapes, strides and devices alone, so the tensors may be fake.
    """
    (B, T, H, D), S = q_BTHD.shape, k_BSGD.shape[1]
    reason = no_hopper_reason(q_BTHD.device)
    if reason is not None:
        return reason
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        return f"the type is {str(q_BTHD.dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if D not in HEAD_DIMS:
        return f"head dimension {D} is not {' or '.join(map(str, HEAD_DIMS))}"
    asked = {"windows": window, "soft cap": softcap, "documents": documents}
    if missing := [name for name, value in asked.items() if value is not None]:
        return f"it has no {' and no '.join(missing)}"
    if causal and T > S:
        return "there are more queries than keys"
    if min(B * T * H, S) == 0:
        return "there is nothing to compute"
    if B * H * (T + 2 * ROWS) >= 2**31:  # backward pads each head to pairs of blocks
        return "there are more than 2^31 queries"
    if not all(is_aligned(x) for x in (q_BTHD, k_BSGD, v_BSGD)):
        return "rows do not begin at multiples of 16 bytes"
    return None


@triton.jit
def _prepare(
    o_ptr,
    do_ptr,
    L_ptr,
    L2_ptr,
    delta_ptr,
    dq_ptr,
    o_strides,
    do_strides,
    T,
    T_padded,
    H,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Before backward: delta = do.o, L in base 2 and +inf past T, and zeros where dq will be summed."""
    blocks = tl.cdiv(T_padded, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D)
    inside = (t < T)[:, None]
    row = t.to(tl.int64)[:, None]
    o_tile_ptr = o_ptr + b * o_strides[0] + h * o_strides[2] + row * o_strides[1] + d[None, :]
    do_tile_ptr = do_ptr + b * do_strides[0] + h * do_strides[2] + row * do_strides[1] + d[None, :]
    o = tl.load(o_tile_ptr, mask=inside, other=0.0).to(tl.float32)
    do = tl.load(do_tile_ptr, mask=inside, other=0.0).to(tl.float32)
    L = tl.load(L_ptr + bh * T + t, mask=t < T, other=float("inf"))
    tl.store(delta_ptr + bh * T_padded + t, tl.sum(o * do, 1))
    tl.store(L2_ptr + bh * T_padded + t, L * 1.4426950408889634)
    tl.store(dq_ptr + (bh * T + row) * D + d[None, :], tl.zeros([BLOCK_T, D], tl.float32), mask=inside)


@triton.jit
def _round(sum_ptr, dq_ptr, cos_ptr, sin_ptr, dq_strides, T, H, scale, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """After backward: dq in its own type and place, from its float32 sum; turned back, if there are angles."""
    blocks = tl.cdiv(T, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, D)
    inside = (t < T)[:, None]
    row = t.to(tl.int64)[:, None]
    dq = tl.load(sum_ptr + (bh * T + row) * D + d[None, :], mask=inside, other=0.0) * scale
    if cos_ptr is not None:
        at = row * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
        sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
        even, odd = tl.split(tl.reshape(dq, [BLOCK_T, D // 2, 2]))
        dq = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [BLOCK_T, D])
    tile_ptr = dq_ptr + b * dq_strides[0] + h * dq_strides[2] + row * dq_strides[1] + d[None, :]
    tl.store(tile_ptr, dq.to(dq_ptr.dtype.element_ty), mask=inside)


def forward(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    *,
    causal: bool,
    scale: float,
    tile: ForwardTile | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return o (B, T, H, D) and L (B, H, T), for tensors that `unavailable_reason` has nothing against.

    With fewer ``programs`` than the GPU has processors, each works on more tiles.
    """
    from lfs_cli.kernels.hopper_forward import forward as kernel

    (B, T, H, D), (S, G) = q_BTHD.shape, k_BSGD.shape[1:3]
    tile = tile or forward_tile(T, D, causal=causal)
    registers = REGISTERS[tile.warpgroups]
    o_BTHD = torch.empty((B, T, H, D), dtype=q_BTHD.dtype, device=q_BTHD.device)
    L_BHT = torch.empty((B, H, T), dtype=torch.float32, device=q_BTHD.device)
    block_t = 64 * tile.warpgroups
    programs = min(programs or processors(q_BTHD.device), B * H * -(-T // block_t))
    section = _section(H // G, S, D)
    order = _forward_order(T, S, B * H, section, block_t, tile.block_s, causal, programs, q_BTHD.device)
    if torch.cuda.is_current_stream_capturing():
        _recorded.add(order)
    with torch.cuda.device_of(q_BTHD):
        kernel[(programs,)](
            describe(q_BTHD, 1, 64, 1, D),
            describe(k_BSGD, 1, tile.block_s, 1, D),
            describe(v_BSGD, 1, tile.block_s, 1, D),
            describe(o_BTHD, 1, 64, 1, D),
            L_BHT,
            order,
            T,
            S,
            H,
            scale * LOG2_E,
            GROUP=H // G,
            WARPGROUPS=tile.warpgroups,
            BLOCK_S=tile.block_s,
            D=D,
            STAGES=tile.stages,
            CAUSAL=causal,
            REGISTERS=registers.computing,
            LOADER_REGISTERS=registers.loading,
            num_warps=4,
            maxnreg=registers.all,
            enable_fp_fusion=True,
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
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    turn: tuple[Tensor, Tensor] | None = None,
    tile: BackwardTile | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, in new tensors or in those given, whose rows begin at multiples of 16 bytes.

    With ``turn``, cos and sin (T, D / 2) of `rope.py`, dq and dk are those of queries and keys before they were turned;
    there are as many of both then.
    With fewer ``programs`` than the GPU has processors, each works on more tiles.
    """
    from lfs_cli.kernels.hopper_backward import backward as kernel

    (B, T, H, D), (S, G), device = q_BTHD.shape, k_BSGD.shape[1:3], q_BTHD.device
    assert turn is None or T == S  # queries and keys are at the same positions
    cos, sin = (None, None) if turn is None else (x.contiguous() for x in turn)
    tile, registers = tile or BACKWARD[D], REGISTERS[2]
    dq = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=device) if dq is None else dq
    dk = torch.empty(k_BSGD.shape, dtype=k_BSGD.dtype, device=device) if dk is None else dk
    dv = torch.empty(v_BSGD.shape, dtype=v_BSGD.dtype, device=device) if dv is None else dv
    do_BTHD = do_BTHD if is_aligned(do_BTHD) else do_BTHD.contiguous()
    blocks = -(-T // ROWS) + tile.at_once - 1  # pairs may begin at any block, and end past T
    L2, delta = torch.empty((2, B * H * blocks * ROWS), dtype=torch.float32, device=device)
    dq_sum = torch.empty((B * H, T, D), dtype=torch.float32, device=device)
    programs = min(programs or processors(device), B * G * -(-S // 128))
    section = _section(1, 4 * T * (H // G), D)  # q, do, a sum of dq as large as both, and room for what is read once
    order = _backward_order(T, S, B * G, section, H // G, causal, programs, device)
    if torch.cuda.is_current_stream_capturing():
        _recorded.add(order)
    with torch.cuda.device_of(q_BTHD):
        _prepare[(blocks * B * H,)](
            o_BTHD,
            do_BTHD,
            L_BHT,
            L2,
            delta,
            dq_sum,
            o_BTHD.stride()[:3],
            do_BTHD.stride()[:3],
            T,
            blocks * ROWS,
            H,
            D=D,
            BLOCK_T=ROWS,
        )
        kernel[(programs,)](
            describe(q_BTHD, 1, 64, 1, D),
            describe(k_BSGD, 1, 128, 1, D),
            describe(v_BSGD, 1, 64, 1, D),
            describe(do_BTHD, 1, 64, 1, D),
            describe(dq_sum, 1, 64, D // 2 * tile.at_once),
            describe(dk, 1, 64, 1, D),
            describe(dv, 1, 64, 1, D),
            describe(L2, 64),
            describe(delta, 64),
            order,
            cos,
            sin,
            T,
            S,
            blocks * ROWS,
            H,
            scale * LOG2_E,
            scale,
            GROUP=H // G,
            D=D,
            STAGES=tile.stages,
            DS_LAYOUT=layout_of((128, 64), q_BTHD.dtype),
            PAIRS=None if turn is None else pairs_layout(D),
            CAUSAL=causal,
            IN_REGISTERS=tile.in_registers,
            AT_ONCE=tile.at_once,
            REGISTERS=registers.computing,
            LOADER_REGISTERS=registers.loading,
            num_warps=4,
            maxnreg=registers.all,
            enable_fp_fusion=True,
        )
        _round[(-(-T // ROWS) * B * H,)](dq_sum, dq, cos, sin, dq.stride()[:3], T, H, scale, D=D, BLOCK_T=ROWS)
    return dq, dk, dv


def forward_tile(T: int, D: int, *, causal: bool) -> ForwardTile:
    """Return the tile that forward takes for T queries of D channels."""
    is_long = D == 64 and causal and T >= LONG_FROM
    return LONG if is_long and triton.__version__.startswith(LONG_WITH) else SHORT


def check_options(step: str, q_BTHD: Tensor, *, causal: bool) -> dict[str, Any]:
    """Return what makes a step on few rows run the kernel that those of q run, and go from tile to tile as it does."""
    forward = {"tile": forward_tile(q_BTHD.shape[1], q_BTHD.shape[3], causal=causal)} if step == "forward" else {}
    return {"programs": 1} | forward


@torch.compiler.assume_constant_result
def no_hopper_reason_in_trace(device: torch.device) -> str | None:
    """Do what `no_hopper_reason` does, once where torch.compile traces, which cannot look at a GPU.

    Here, as this decorator imports much of torch that optimizers do without.
    """
    return no_hopper_reason(device)


def is_aligned(x: Tensor) -> bool:
    """Return whether rows are contiguous and begin at multiples of 16 bytes, as the copy engine asks.

    Memory blocks do.
    """
    return x.stride(3) == 1 and not any(n % 8 for n in (*x.stride()[:3], x.storage_offset()))


@cache
def layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile of this shape lies in shared memory."""
    from lfs_cli.kernels.gluon_compatibility import gl

    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    if len(shape) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(shape), types[dtype])


@cache
def pairs_layout(D: int) -> Any:
    """Return how cos, sin and the even or the odd channels of a block of 64 positions lie in registers.

    The layout of a product's sum, (64, D), without the bit that tells the two channels of a pair apart.
    """
    from lfs_cli.kernels.gluon_compatibility import gl

    registers = [[8, 0], *([0, 1 << bit] for bit in range(2, (D // 2).bit_length() - 1))]
    lanes, warps = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [64, D // 2])


def describe(x: Tensor, *block: int) -> Any:
    """Return what the copy engine is told of a tensor and its tiles: the kept one of such tiles, with this tensor.

    Making one anew checks what `unavailable_reason` has checked, and takes twice as long, for each of nine a backward.
    """
    kept = _tiles(block, x.dtype)
    described = object.__new__(type(kept))
    described.__dict__.update(kept.__dict__)
    described.base, described.shape, described.strides = x, list(x.shape), list(x.stride())
    return described


@cache
def _tiles(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    from lfs_cli.kernels.gluon_compatibility import TensorDescriptor

    return TensorDescriptor.from_tensor(torch.empty(block, dtype=dtype), list(block), layout_of(block, dtype))


@cache
def processors(device: torch.device) -> int:
    """Return how many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _section(group: int, S: int, D: int) -> int:
    """How many query heads are worked on at a time, so that their keys and values fit the L2 cache together."""
    fitting = max(1, min(L2_BYTES // (4 * S * D), LARGEST_SECTION))
    return group * max(1, (1 << fitting.bit_length() - 1) // group)


_recorded: set[Tensor] = set()
"""Orders that CUDA graphs read. They are kept for good: caches forget, and a graph is replayed without asking them."""


@lru_cache(maxsize=256)
def _forward_order(
    T: int,
    S: int,
    heads: int,
    section: int,
    block_t: int,
    block_s: int,
    causal: bool,
    programs: int,
    device: torch.device | str,
) -> Tensor:
    """Deal out the tiles of all heads to the programs, as `hopper_forward.Work` expects it.

    A tile takes as long as its blocks of keys and two more, for its beginning and end.
    """
    seen = [min(S, (m + 1) * block_t + S - T) if causal else S for m in range(-(-T // block_t))]
    return _dealt([-(-keys // block_s) + 2 for keys in seen], heads, section, programs, device)


@lru_cache(maxsize=256)
def _backward_order(
    T: int, S: int, heads: int, section: int, group: int, causal: bool, programs: int, device: torch.device | str
) -> Tensor:
    """Deal out the tiles of all key/value heads, as `hopper_backward.Work` expects it; costs are alike."""
    seeing = [T - max(128 * m - (S - T), 0) if causal else T for m in range(-(-S // 128))]
    return _dealt([-(-queries // ROWS) * group + 3 for queries in seeing], heads, section, programs, device)


def _dealt(costs: list[int], heads: int, section: int, programs: int, device: torch.device | str) -> Tensor:
    """Deal out the tiles of heads, each of which has tiles of such costs, the dearest of a section first."""
    busy = [(0, program) for program in range(programs)]
    tiles: list[list[int]] = [[] for _ in range(programs)]
    dearest_first = sorted(range(len(costs)), key=lambda m: -costs[m])
    for first in range(0, heads, section):
        for m in dearest_first:
            for head in range(first, min(first + section, heads)):
                until, program = busy[0]
                tiles[program].append(head * len(costs) + m)
                heapq.heapreplace(busy, (until + costs[m], program))
    starts = [programs + 1]
    for own in tiles:
        starts.append(starts[-1] + len(own))
    # One more at the end: kernels read one tile ahead
    order = [*starts, *(tile for own in tiles for tile in own), 0]
    with ThreadPoolExecutor(1) as other:  # inductor puts what this thread allocates where its graphs work
        return other.submit(torch.tensor, order, dtype=torch.int32, device=device).result()

"""The loss of rows of logits and their gradient for Hopper GPUs, in Gluon: each logit is read from memory once.

The math is that of `linear_cross_entropy.py`; read that first. New here is where a row lies between its two readings:
in shared memory. Copies of the whole row are started at once, in `GROUPS` that arrive in order:

    for each group:     wait for it; for each tile of it: update every thread's maximum m and sum l
    m, l of all threads -> s, the loss
    for each tile:      da from the copy, written over the row in global memory

Sources: those of `linear_cross_entropy.py`.
Numerics: as there, save that exp(z - s) is 2^(z log2(e) - s log2(e)), one instruction less; m and l belong to a
          thread, so that they are corrected once a tile, not once a number.
Layout:   one program owns one row. A tile is (repeats, threads, `WIDTH`): a thread copies, reads and writes the same
          16 bytes of each repeat. The vocabulary's last tile has masks, the others need none.
Traffic:  one reading and one writing of the row. Exponentials: two a logit and one a thread and tile; six and one with
          a soft cap, counting its divisions, and then these are the limit, not memory.
Limits:   bfloat16, float16; V <= 114,688, as a program has 227 KB of shared memory. Up to 57,344 two programs fit a
          processor, and one loads while the other computes.
Where:    Hopper, for `HOPPER_VOCABULARIES` of `linear_cross_entropy.py`.
Measured: one H200, 2026-11-29, bfloat16, milliseconds of this kernel beside that of `linear_cross_entropy.py`:

    rows x V           loss and da     the same, capped     loss alone
    4,096 x 50,304     0.22, 0.34      0.48, 0.54           0.11, 0.17
    4,096 x 16,384     0.08, 0.11      0.16, 0.18           0.04, 0.06
    16,384 x 10,000    0.19, 0.30      0.42, 0.51
    16,384 x 4,096     0.09, 0.13      0.16, 0.21
    16,384 x 2,048     0.08, 0.07      0.16, 0.11
    2,048 x 100,352    0.27, 0.35      0.59, 0.52           0.15, 0.16

    Tiles of 2,048 to 8,192 and 4 to 16 warps, at V = 50,304: 0.22 to 0.25. Tiles of 1,024 (with 4 warps), 2,048 and
    4,096 in one run:

    rows x V           loss and da               the same, capped
    16,384 x 10,000    0.166, 0.165, 0.188
    16,384 x 16,384    0.266, 0.265, 0.267       0.523, 0.515, 0.580
    5,376 x 50,304     0.306, 0.276, 0.272

    So that of 2,048 is taken up to `LARGE`; the first table is of 4,096 throughout.
"""

import torch
from torch import Tensor

from lfs_cli.kernels.gluon_compatibility import commit_copies, copy_async, gl, gluon, wait_for_copies

LARGE = 32_768
"""A vocabulary beyond this has larger tiles."""

WARPS = 8
GROUPS = gl.constexpr(4)
WIDTH = gl.constexpr(8)  # numbers in 16 bytes
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
MINUS_INFINITY = gl.constexpr(float("-inf"))


@gluon.jit
def _capped(a, softcap):
    """Return cap tanh(a / cap), as in `linear_cross_entropy.py`."""
    e = gl.exp2(gl.maximum(a, -a) * (-2.0 * LOG2_E / softcap))
    size = softcap * (1.0 - e) / (1.0 + e)
    return gl.where(a < 0, -size, size)


@gluon.jit
def _places(TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the numbers of a tile lie in it, by repeat, thread and number."""
    THREADS: gl.constexpr = 32 * gl.num_warps()
    r = gl.arange(0, TILE // (THREADS * WIDTH), gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    t = gl.arange(0, THREADS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    i = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return r[:, None, None] * (THREADS * WIDTH) + t[None, :, None] * WIDTH + i[None, None, :]


@gluon.jit
def _logits(tile, is_inside, softcap, LAYOUT: gl.constexpr):
    """Return z of a tile in shared memory. `is_inside` is None or says which numbers mean something."""
    z = tile.load(LAYOUT).to(gl.float32)
    if is_inside is not None:
        z = gl.where(is_inside, z, 0.0)
    if softcap is not None:
        z = _capped(z, softcap)
    return z


@gluon.jit
def _update(m, l, z):
    """Return the maximum and sum of each thread after one more tile."""
    n = gl.maximum(m, gl.max(gl.max(z, 2), 0))
    shift = gl.where(n == MINUS_INFINITY, 0.0, n)  # a thread beyond a small vocabulary has seen nothing
    p = gl.exp2(z * LOG2_E - (shift * LOG2_E)[None, :, None])
    return n, l * gl.exp2((m - shift) * LOG2_E) + gl.sum(gl.sum(p, 2), 0)


@gluon.jit
def _gradient(z, v, target, counts, s, weight, softcap):
    """Return da, as the definition has it."""
    da = gl.exp2(z * LOG2_E - s * LOG2_E) * weight - gl.where(v == target, 1.0, 0.0)
    if softcap is not None:
        da *= 1.0 - (z / softcap) * (z / softcap)
    return gl.where(counts, da, 0.0)


@gluon.jit
def _loss_and_gradient(
    logits_ptr,
    targets_ptr,
    counts_ptr,
    losses_ptr,
    stride,
    V,
    softcap,
    z_loss,
    TILE: gl.constexpr,
    TILES: gl.constexpr,
    WRITES_GRADIENT: gl.constexpr,
):
    """Do what the kernel of this name in `linear_cross_entropy.py` does. TILES tiles hold a row."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, WIDTH], [1, 32, 1], [1, gl.num_warps(), 1], [2, 1, 0])
    THREADS: gl.constexpr = 32 * gl.num_warps()
    LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    FULL: gl.constexpr = TILES - 1
    dtype: gl.constexpr = logits_ptr.dtype.element_ty
    row = gl.program_id(0).to(gl.int64)
    logits_ptr += row * stride
    place = _places(TILE, LAYOUT)
    v_last = FULL * TILE + place

    tiles = gl.allocate_shared_memory(
        dtype,
        [TILES, TILE // (THREADS * WIDTH), THREADS, WIDTH],
        gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]),
    )
    for group in gl.static_range(GROUPS):
        for i in range(group * FULL // GROUPS, (group + 1) * FULL // GROUPS):
            copy_async(tiles.index(i), logits_ptr + (i * TILE + place))
        if group == GROUPS - 1:
            copy_async(tiles.index(FULL), logits_ptr + v_last, mask=v_last < stride)
        commit_copies()

    # After the copies have started: each of these waits for the one before
    target = gl.load(targets_ptr + row)
    counts = gl.load(counts_ptr + row)
    is_known = (target >= 0) & (target < V)
    target_z = gl.load(logits_ptr + target, mask=is_known, other=float("nan")).to(gl.float32)
    if softcap is not None:
        target_z = _capped(target_z, softcap)

    m = gl.full([THREADS], MINUS_INFINITY, gl.float32, LANES)
    l = gl.zeros([THREADS], gl.float32, LANES)
    for group in gl.static_range(GROUPS):
        wait_for_copies(GROUPS - 1 - group)
        for i in range(group * FULL // GROUPS, (group + 1) * FULL // GROUPS):
            m, l = _update(m, l, _logits(tiles.index(i), None, softcap, LAYOUT))
    z = _logits(tiles.index(FULL), v_last < V, softcap, LAYOUT)
    m, l = _update(m, l, gl.where(v_last < V, z, MINUS_INFINITY))
    peak = gl.max(m, 0)
    s = peak + LN_2 * gl.log2(gl.sum(l * gl.exp2((m - peak) * LOG2_E), 0))
    gl.store(losses_ptr + row, gl.where(counts, s - target_z + z_loss * s * s, 0.0))

    if WRITES_GRADIENT:
        weight = 1.0 + 2.0 * z_loss * s
        for i in range(FULL):
            v = i * TILE + place
            z = _logits(tiles.index(i), None, softcap, LAYOUT)
            gl.store(logits_ptr + v, _gradient(z, v, target, counts, s, weight, softcap).to(dtype))
        z = _logits(tiles.index(FULL), v_last < V, softcap, LAYOUT)
        da = _gradient(z, v_last, target, counts, s, weight, softcap)
        gl.store(logits_ptr + v_last, da.to(dtype), mask=v_last < stride)


def tile_of(V: int) -> int:
    """Return the logits of a step: more make corrections rarer, and leave more of the last step unused."""
    return 4096 if V > LARGE else 2048


def loss_and_gradient(
    logits_RV: Tensor,
    targets_R: Tensor,
    counts_R: Tensor,
    losses_R: Tensor,
    softcap: float | None,
    z_loss: float,
    *,
    writes_gradient: bool,
) -> None:
    """Launch the kernel, on rows whose stride is a multiple of 64."""
    R, V = logits_RV.shape
    tile = tile_of(V)
    with torch.cuda.device_of(logits_RV):
        _loss_and_gradient[(R,)](
            logits_RV,
            targets_R,
            counts_R,
            losses_R,
            logits_RV.stride(0),
            V,
            softcap,
            z_loss,
            TILE=tile,
            TILES=-(-V // tile),
            WRITES_GRADIENT=writes_gradient,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )

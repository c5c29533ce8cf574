"""The product that makes queries, keys and values, with the first two turned, for Hopper GPUs, in Gluon.

The math is that of `rope.py`, of sums that `hopper_product.py` makes; read these first. Here is what the finisher does
with them, while the next tile is multiplied. Both sums are heads, 256 channels of them; a thread has whole pairs.

Numerics: as in `rope.py`, on sums that were rounded as it would find them.
Limits:   those of `product.py`; heads of D channels, where D divides 128.
"""

from lfs_cli.kernels.gluon_compatibility import gl, gluon
from lfs_cli.kernels.hopper_product import await_sums, load, make_work, multiply, release_sums


@gluon.jit
def _finish(work, y_ptr, cos_ptr, sin_ptr, T, TURNED, R, N: gl.constexpr, D: gl.constexpr):
    """The finisher: pairs of channels before TURNED by their angle, the others by none.

    A sum is a whole head or several, so all sums of a row have the same angles.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, 128, gl.SliceLayout(0, ROWS))
    pair_row = gl.arange(0, 64, gl.SliceLayout(1, PAIRS))
    pair = gl.arange(0, 64, gl.SliceLayout(0, PAIRS))
    turn = 0
    for tile in range(gl.program_id(0), work.TILES, gl.num_programs(0)):
        r_start, n_start = work.place(tile)
        for c in gl.static_range(2):
            r = r_start + 64 * c
            place = ((r + pair_row) % T)[:, None] * (D // 2) + (pair % (D // 2))[None, :]
            turns = n_start < TURNED
            cos = gl.load(cos_ptr + place, mask=turns, other=1.0)  # before the wait, which hides what it takes
            sin = gl.load(sin_ptr + place, mask=turns, other=0.0)
            await_sums(work, c, turn)
            for half in gl.static_range(2):
                n = n_start + 128 * half
                x = work.sums.index(2 * c + half).load(ROWS)
                at = y_ptr + (r.to(gl.int64) * N + n) + (row[:, None] * N + column[None, :])
                inside = (row < R - r)[:, None] & (column < N - n)[None, :]
                even, odd = gl.split(gl.reshape(x.to(gl.float32), [64, 64, 2]))
                even = gl.convert_layout(even, PAIRS)
                odd = gl.convert_layout(odd, PAIRS)
                both = gl.join(even * cos - odd * sin, even * sin + odd * cos)
                both = gl.convert_layout(gl.reshape(both, [64, 128]), ROWS).to(x.dtype)
                gl.store(at, gl.where((n + column < TURNED)[None, :], both, x), mask=inside)
            release_sums(work, c)
        turn += 1


@gluon.jit(do_not_specialize=["T", "TURNED", "TILES", "ACROSS", "STEPS", "R"])
def forward(
    x_desc,
    w_desc,
    next_w_desc,
    y_ptr,
    cos_ptr,
    sin_ptr,
    T,
    TURNED,
    TILES,
    ACROSS,
    STEPS,
    R,
    COLUMNS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FINISHER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Write this program's tiles of the result, (R, N), rows of which are T positions, again and again.

    `w_desc` is the (N, C) matrix, and `next_w_desc` the same from its 128th row on.
    """
    work = make_work(x_desc, w_desc, next_w_desc, TILES, ACROSS, STEPS, STAGES, 256, True, SUMS)
    gl.warp_specialize(
        [
            (multiply, (work, 0)),
            (multiply, (work, 1)),
            (_finish, (work, y_ptr, cos_ptr, sin_ptr, T, TURNED, R, COLUMNS, D)),
            (load, (work,)),
        ],
        [4, 4, 1],
        [REGISTERS, FINISHER_REGISTERS, LOADER_REGISTERS],
    )

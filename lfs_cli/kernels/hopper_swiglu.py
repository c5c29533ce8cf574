"""Products with SwiGLU behind them, and its gradient behind the product that makes dy, for Hopper GPUs, in Gluon.

The math is that of `swiglu.py`, of sums that `hopper_product.py` makes; read these first. Here is what the finisher
does with them, while the next tile is multiplied.

    forward     one sum has gates, the other has factors of the same 128 channels: the copy engine writes both from
                where they lie, the finisher reads them there and writes y
    backward    both sums are dy, of 256 channels, and the finisher reads gates and factors from memory. That takes it
                longer than all else: so it works in parts of 16 rows, and four of them are under way to its registers

Numerics: as in `swiglu.py`, on sums that were rounded as it would find them: the results are the same to the bit.
"""

from lfs_cli.kernels.gluon_compatibility import gl, gluon, store_tile, tma
from lfs_cli.kernels.hopper_product import await_sums, load, make_work, multiply, release_sums

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _finish_forward(work, gate_desc, up_desc, y_ptr, R, F: gl.constexpr):
    """The finisher: gates and factors as they are, and y of what they were rounded to."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    row = gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, 128, gl.SliceLayout(0, ROWS))
    turn = 0
    for tile in range(gl.program_id(0), work.TILES, gl.num_programs(0)):
        r_start, f_start = work.place(tile)
        for c in gl.static_range(2):
            r = r_start + 64 * c
            await_sums(work, c, turn)
            store_tile(gate_desc, [r, f_start], work.sums.index(2 * c))
            store_tile(up_desc, [r, f_start], work.sums.index(2 * c + 1))
            x = work.sums.index(2 * c).load(ROWS).to(gl.float32)
            u = work.sums.index(2 * c + 1).load(ROWS).to(gl.float32)
            y = x / (1.0 + gl.exp2(-x * LOG2_E)) * u
            at = y_ptr + (r.to(gl.int64) * F + f_start) + (row[:, None] * F + column[None, :])
            gl.store(at, y.to(dtype), mask=(row < R - r)[:, None] & (column < F - f_start)[None, :])
            tma.store_wait(0)  # the copies have left the buffers
            release_sums(work, c)
        turn += 1


@gluon.jit(do_not_specialize=["TILES", "ACROSS", "STEPS", "R"])
def forward(
    x_desc,
    gates_desc,
    ups_desc,
    gate_desc,
    up_desc,
    y_ptr,
    TILES,
    ACROSS,
    STEPS,
    R,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FINISHER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Write gates, factors and y of this program's tiles.

    `gates_desc` and `ups_desc` are the two matrices, (F, C), `gate_desc` and `up_desc` what they make, (R, F) each.
    """
    work = make_work(x_desc, gates_desc, ups_desc, TILES, ACROSS, STEPS, STAGES, 128, True, SUMS)
    gl.warp_specialize(
        [
            (multiply, (work, 0)),
            (multiply, (work, 1)),
            (_finish_forward, (work, gate_desc, up_desc, y_ptr, R, COLUMNS)),
            (load, (work,)),
        ],
        [4, 4, 1],
        [REGISTERS, FINISHER_REGISTERS, LOADER_REGISTERS],
    )


@gluon.jit
def _part(pointer, r, f, PART: gl.constexpr, R, F: gl.constexpr, ROWS: gl.constexpr):
    """Where the gates of a part of a tile are, (16, 128), and which of them exist. A tile has 16 parts, by its sums."""
    r += 64 * (PART // 8) + 16 * (PART % 4)
    f += 128 * (PART // 4 % 2)
    row = gl.arange(0, 16, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, 128, gl.SliceLayout(0, ROWS))
    at = pointer + (r.to(gl.int64) * (2 * F) + f) + (row[:, None] * (2 * F) + column[None, :])
    return at, (row < R - r)[:, None] & (column < F - f)[None, :]


@gluon.jit
def _read(x_ptr, r, f, next_r, next_f, PART: gl.constexpr, R, F: gl.constexpr, ROWS: gl.constexpr):
    """Begin to read gates and factors of a part of a tile, or from the 16th on of the next one."""
    if PART < 16:
        at, inside = _part(x_ptr, r, f, PART, R, F, ROWS)
    else:
        at, inside = _part(x_ptr, next_r, next_f, PART - 16, R, F, ROWS)
    return gl.load(at, mask=inside, other=0.0), gl.load(at + F, mask=inside, other=0.0)


@gluon.jit
def _finish_backward(work, x_ptr, dx_ptr, R, F: gl.constexpr):
    """The finisher: the gradients of gates and factors. Past its last tile it reads nothing, as rows end there."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = dx_ptr.dtype.element_ty
    first = gl.program_id(0)
    r, f = work.place(first)
    x1, u1 = _read(x_ptr, r, f, r, f, 0, R, F, ROWS)
    x2, u2 = _read(x_ptr, r, f, r, f, 1, R, F, ROWS)
    x3, u3 = _read(x_ptr, r, f, r, f, 2, R, F, ROWS)
    x4, u4 = _read(x_ptr, r, f, r, f, 3, R, F, ROWS)
    turn = 0
    for tile in range(first, work.TILES, gl.num_programs(0)):
        next_r, next_f = work.place(tile + gl.num_programs(0))
        for part in gl.static_range(16):
            x = x1.to(gl.float32)
            u = u1.to(gl.float32)
            x1, u1 = x2, u2
            x2, u2 = x3, u3
            x3, u3 = x4, u4
            x4, u4 = _read(x_ptr, r, f, next_r, next_f, part + 4, R, F, ROWS)
            if part % 8 == 0:
                await_sums(work, part // 8, turn)
            dy = work.sums.index(part // 4).slice(16 * (part % 4), 16).load(ROWS).to(gl.float32)
            if part % 8 == 7:
                release_sums(work, part // 8)
            s = 1.0 / (1.0 + gl.exp2(-x * LOG2_E))
            du = dy * x * s
            dx = dy * u * (s * (1.0 + x * (1.0 - s)))
            at, inside = _part(dx_ptr, r, f, part, R, F, ROWS)
            gl.store(at, dx.to(dtype), mask=inside)
            gl.store(at + F, du.to(dtype), mask=inside)
        r, f = next_r, next_f
        turn += 1


@gluon.jit(do_not_specialize=["TILES", "ACROSS", "STEPS", "R"])
def backward(
    do_desc,
    down_desc,
    next_down_desc,
    x_ptr,
    dx_ptr,
    TILES,
    ACROSS,
    STEPS,
    R,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FINISHER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Write the gradients of gates and factors, (R, 2 F), of this program's tiles.

    `down_desc` is the (C, F) matrix, and `next_down_desc` the same from its 128th column on.
    """
    work = make_work(do_desc, down_desc, next_down_desc, TILES, ACROSS, STEPS, STAGES, 256, False, SUMS)
    gl.warp_specialize(
        [
            (multiply, (work, 0)),
            (multiply, (work, 1)),
            (_finish_backward, (work, x_ptr, dx_ptr, R, COLUMNS)),
            (load, (work,)),
        ],
        [4, 4, 1],
        [REGISTERS, FINISHER_REGISTERS, LOADER_REGISTERS],
    )

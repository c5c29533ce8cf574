"""Rotary positions inside of the kernels for Hopper GPUs, in Gluon: blocks of one head, turned in registers.

The math is that of `rope.py`. A block is 64 positions, (64, D) numbers in the layout of a product's sum. There both
channels of a pair are one thread's, so no thread needs another one's. Cos, sin and the even or the odd channels of a
block are (64, D / 2), in a layout PAIRS that is the same but for the bit that tells the two apart:
`hopper_attention.pairs_layout`.
"""

from lfs_cli.kernels.gluon_compatibility import gl, gluon


@gluon.jit
def angles_of(cos_ptr, sin_ptr, start, T, D: gl.constexpr, PAIRS: gl.constexpr):
    """Cos and sin of 64 positions from `start` on, (64, D / 2) each; of an angle of 0 past T."""
    t = start + gl.arange(0, 64, gl.SliceLayout(1, PAIRS))
    i = gl.arange(0, D // 2, gl.SliceLayout(0, PAIRS))
    at = t[:, None] * (D // 2) + i[None, :]
    inside = (t < T)[:, None] & (i < D // 2)[None, :]
    return gl.load(cos_ptr + at, mask=inside, other=1.0), gl.load(sin_ptr + at, mask=inside, other=0.0)


@gluon.jit
def turned(x, cos, sin, D: gl.constexpr, PAIRS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return (64, D) numbers with each pair of channels turned by its angle, in a layout."""
    even, odd = gl.split(gl.reshape(x, [64, D // 2, 2]))
    even = gl.convert_layout(even, PAIRS)
    odd = gl.convert_layout(odd, PAIRS)
    both = gl.join(even * cos - odd * sin, even * sin + odd * cos)
    return gl.convert_layout(gl.reshape(both, [64, D]), LAYOUT)

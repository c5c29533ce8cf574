"""Buffers that are filled and emptied in turn, for the kernels in Gluon: which of them has a tile.

The i-th tile lies in buffer i % BUFFERS, and the buffer's barriers are in their (i // BUFFERS)-th phase, of which they
know whether it is even or odd.
"""

from lfs_cli.kernels.gluon_compatibility import gl, gluon, mbarrier


@gluon.jit
def buffer_of(i, BUFFERS: gl.constexpr):
    """Which of the buffers has the i-th tile. Of two by a bit: a signed remainder takes registers."""
    if BUFFERS == 2:
        return i & 1
    return i % BUFFERS


@gluon.jit
def phase_of(i, BUFFERS: gl.constexpr):
    """The phase of that buffer's barriers: even or odd, as it has had another tile before."""
    if BUFFERS == 2:
        return (i >> 1) & 1
    return (i // BUFFERS) & 1


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate barriers that each wait for ARRIVALS."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers

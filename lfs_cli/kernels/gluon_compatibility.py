"""Gluon, Triton's lower language, under one set of names for Triton 3.6 to 3.9.

Gluon shows what Triton hides: layouts of registers and shared memory, barriers, which warps do what. It is young, and
names moved between releases; the kernels use those below. Importing this file needs Triton and imports much of it.
"""

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])

if RELEASE >= (3, 8):
    from triton import aggregate

    load_tile, store_tile, add_tile = tma.async_load, tma.async_store, tma.async_atomic_add
    copy_async = async_copy.async_load
else:
    from triton._C.libtriton import ir
    from triton.language.core import _aggregate

    load_tile, store_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    copy_async = async_copy.async_copy_global_to_shared

    def aggregate(cls: type) -> type:
        """Make a struct of a class that only names its fields: its constructor takes them in that order."""

        def __init__(self: Any, *values: Any) -> None:  # noqa: N807  it becomes the method of that name
            for name, value in zip(cls.__annotations__, values, strict=True):
                setattr(self, name, value)

        __init__.__triton_builtin__ = True
        cls.__init__ = __init__
        return _aggregate(cls)

    @builtin
    def add_tile(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
        """Add a tile in shared memory to one in global memory; the compiler has it, the language only from 3.8 on."""
        place = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, place, src.handle)


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, gl.constexpr) else x


@builtin
def reinterpret(buffer: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The memory of a buffer as one of another type, shape and layout; the name of that method changed."""
    return _semantic.memdesc_reinterpret(buffer, _plain(dtype), [_plain(size) for size in shape], _plain(layout))


commit_copies, wait_for_copies = async_copy.commit_group, async_copy.wait_group
barrier = gl.thread_barrier if RELEASE < (3, 7) else gl.barrier

__all__ = [
    "TensorDescriptor",
    "add_tile",
    "aggregate",
    "barrier",
    "commit_copies",
    "copy_async",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_tile",
    "mbarrier",
    "reinterpret",
    "store_tile",
    "tma",
    "wait_for_copies",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]

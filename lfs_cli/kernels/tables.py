"""Tables of addresses, by which one launch of a kernel serves many tensors, whatever their number and sizes.

A table is made on the host and copied to the GPU, which the host does not wait for. Types are not in it: all tensors of
a table have the one that the kernel is compiled for. A kernel that goes through all numbers of the tensors has a
program for each block of them, and tables of which blocks there are.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import tl, triton


@triton.jit
def tensor_at(addresses_ptr, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):  # noqa: ANN201  a pointer of Triton
    """Return a pointer to the first number of a tensor whose address the table holds."""
    pointer = tl.load(addresses_ptr + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:  # told to the compiler, which then reads 16 bytes at once
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def own_block(sizes_ptr, tensor_of_ptr, block_of_ptr, BLOCK: tl.constexpr):  # noqa: ANN201  numbers of Triton
    """Return this program's tensor, its size, and the first of the BLOCK numbers in it that are this program's."""
    tensor = tl.load(tensor_of_ptr + tl.program_id(0))
    start = tl.load(block_of_ptr + tl.program_id(0)) * BLOCK
    return tensor, tl.load(sizes_ptr + tensor), start


def block_tables(sizes: Sequence[int], block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `own_block` reads for tensors of these sizes: those, and a tensor and a block for each program."""
    counts = torch.tensor(sizes, dtype=torch.int64)
    blocks = (counts + block - 1) // block
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    sizes_table, tensor_table, block_table = (
        on_device(table, device) for table in (counts, tensor_of, torch.arange(len(first)) - first)
    )
    return sizes_table, tensor_table, block_table


def addresses_of(*lists: Sequence[Tensor]) -> list[int]:
    """Return where the tensors of all lists begin."""
    return [x.data_ptr() for x in chain(*lists)]


def on_device(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return a table on the device, without waiting for it. Numbers become int64.

    It is copied from pinned memory that is new each time: torch gives that to others only when the copy is done.
    """
    is_pinned = device.type == "cuda"
    if isinstance(numbers, Tensor):
        table = numbers.pin_memory() if is_pinned else numbers
    else:
        table = torch.tensor(numbers, dtype=torch.int64, pin_memory=is_pinned)
    return table.to(device, non_blocking=True)

"""The length of many tensors taken as one vector, and the factor that bounds it, in two launches.

Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013 (arXiv:1211.5063), Algorithm 1.

Math, for gradients g:

    length = sqrt(sum over all numbers of g^2)
    factor = limit / (length + 1e-6) where the length is above the limit, else 1

Numerics: float32. A program sums `BLOCK` squares, and one sums what the programs found, always in the same order: equal
          runs are bit-equal. A length that is no number is above no limit.
Layout:   tables as in `adamw.py`: for each program a tensor and the first of its numbers, and where the tensors are.
Traffic:  reads every number once; the factor is multiplied by whoever reads the gradients next.
Waiting:  nothing here waits for the GPU, save the self-check, once a process.
Measured: one H200, 2026-11-30, `lfs bench kernels`: 0.128 ms for 124M numbers, 3.9 TB/s; PyTorch's operations on lists
          0.183, and what torch.compile makes of them 0.860.
Limits:   contiguous float32 tensors on one GPU. PyTorch does the rest: a launch for every few tensors, and a dozen for
          what comes after.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors
from lfs_cli.kernels.tables import addresses_of, block_tables, on_device, own_block, tensor_at

BLOCK = 8192
PARTS = 4096
"""Of the sum that are added up at once."""

EPSILON = 1e-6


@triton.jit
def _sum_squares(
    gradients_ptr,
    sizes_ptr,
    tensor_of_ptr,
    block_of_ptr,
    parts_ptr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of the squares of BLOCK numbers of one tensor."""
    tensor, size, start = own_block(sizes_ptr, tensor_of_ptr, block_of_ptr, BLOCK)
    at = start + tl.arange(0, BLOCK)
    pointers = tensor_at(gradients_ptr, tensor, tl.float32, ALIGNED) + at
    if start + BLOCK <= size:  # a mask would make every access a single number
        x = tl.load(pointers)
        tl.store(parts_ptr + tl.program_id(0), tl.sum(x * x, 0))
    else:
        x = tl.load(pointers, mask=at < size, other=0.0)
        tl.store(parts_ptr + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["N"])  # else the check would compile another kernel than a call
def _bound(parts_ptr, length_ptr, factor_ptr, N, limit, epsilon, PARTS: tl.constexpr):
    """Add N parts up, and write the length and the factor."""
    total = tl.zeros([PARTS], tl.float32)
    for start in tl.range(0, N, PARTS):
        at = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + at, mask=at < N, other=0.0)
    length = tl.sqrt(tl.sum(total, 0))
    tl.store(length_ptr, length)
    tl.store(factor_ptr, tl.where(length > limit, limit / (length + epsilon), 1.0))


def length_and_factor(gradients: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """Return the length of all ``gradients`` together, and what to multiply them by so that it is at most ``limit``.

    Args:
        gradients: At least one, all in float32 or better and on one device.
        limit: Largest length; infinity for any.

    Returns:
        Two scalars in float32 or better, on the device.
    """
    if unavailable(gradients) is None and _is_right(gradients[0].device):
        return _launch(gradients, limit)
    return reference_length_and_factor(gradients, limit)


def unavailable(gradients: Sequence[Tensor]) -> str | None:
    """Say why the kernels cannot run on these tensors, or None when they can. PyTorch takes their place then."""
    if any(type(x) is not Tensor or x.dtype != torch.float32 or not x.is_contiguous() for x in gradients):
        return "it needs contiguous tensors of float32"
    if len({x.device for x in gradients}) != 1:
        return "there are no tensors, or they are on several devices"
    return unavailable_reason(gradients[0].device.type, torch.float32)


def reference_length_and_factor(gradients: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    """The definition, in float32 or better. `length_and_factor` has the arguments."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    length = torch.stack(torch._foreach_norm(gradients, 2, wide)).norm()
    return length, torch.where(length > limit, limit / (length + EPSILON), 1.0)


class _Tables:
    """What the kernels know of tensors of these sizes.

    Args:
        sizes: Numbers of each.
        device: Where they are.
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.sizes, self.blocks = sizes, block_tables(sizes, BLOCK, device)
        self.programs = len(self.blocks[-1])
        self.addresses: list[int] = []
        self.places: Tensor | None = None

    def find(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the table of where they are: the one of the last call where they are still there."""
        addresses = addresses_of(gradients)
        if self.places is None or addresses != self.addresses:
            self.addresses, self.places = addresses, on_device(addresses, gradients[0].device)
        return self.places


_tables: dict[torch.device, _Tables] = {}
"""Those of the last call: a model's gradients are as large in each step."""


def _launch(gradients: Sequence[Tensor], limit: float) -> tuple[Tensor, Tensor]:
    device, sizes = gradients[0].device, [x.numel() for x in gradients]
    tables = _tables.get(device)
    if tables is None or tables.sizes != sizes:
        tables = _tables[device] = _Tables(sizes, device)
    places = tables.find(gradients)
    parts = torch.empty(tables.programs, dtype=torch.float32, device=device)
    results = torch.empty(8, dtype=torch.float32, device=device)  # 16 bytes apart, as tensors of their own would be
    length, factor = results[0], results[4]
    with torch.cuda.device_of(results):
        if tables.programs:
            _sum_squares[(tables.programs,)](
                places,
                *tables.blocks,
                parts,
                ALIGNED=not any(address % 16 for address in tables.addresses),
                BLOCK=BLOCK,
                num_warps=8,
            )
        _bound[(1,)](parts, length, factor, tables.programs, limit, EPSILON, PARTS=PARTS, num_warps=8)
    return length, factor


def _is_right(device: torch.device) -> bool:
    """Return whether the kernels are to be used, as they do on a small case what the definition does."""
    return is_trusted("clipping", _errors, device, allowed=LARGEST_ERROR[torch.float32])


def _errors(device: torch.device) -> list[float]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = BLOCK + 5, 3  # a whole block, and parts of one
    gradients = [torch.randn(size, generator=generator, device=device) for size in sizes]
    right = reference_length_and_factor([x.double() for x in gradients], 2.0)
    return relative_errors(_launch(gradients, 2.0), right)

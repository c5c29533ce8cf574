"""Muon's momentum, norms and moves for all matrices of a shape in one launch each; the products between are torch's.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, as in `optimizers/muon.py`.

Math, for one matrix w with gradient g:

    g <- scale g                            scale: what clipping left, read on the device; 1 without it
    m <- b m + g                            u = g + b m (Nesterov), or m
    x = u / (|u| + 1e-7)                    |u|: the root of the sum of all squares
    w <- w (1 - lr decay) - lr size y       y: what the iterations make of x; size: depends on the shape

Numerics: everything between loading and storing is float32, and so are m and the sum of squares, taken before u is
          rounded. x is rounded twice to the type of the stack, as u and as x: in bfloat16 by 2^-9 of an entry at most,
          each time, which is what every iteration adds again. Sums are taken in a fixed order, so equal runs are equal.
Layout:   matrices of R x C and of C x R share one stack, (matrices, short, long) with short <= long, in which tall ones
          lie transposed: products of twice as many. A program of `_prepare` and `_apply` owns a tile of one matrix, and
          one of `_normalize` a run of its numbers. Tables hold the matrices' addresses, as in `adamw.py`.
Traffic:  `_prepare` reads g, m and writes m, u; `_normalize` reads and writes the stack; `_apply` reads w, y and writes
          w: 28 bytes a weight with a stack of bfloat16.
Memory:   the stack and what the iterations hold, for one shape at a time.
Waiting:  nothing here waits for the GPU, save the self-check, once a process. lr and momentum are numbers of the host,
          so a CUDA graph would repeat those of the step that it recorded.
Limits:   contiguous float32 weights and gradients on one GPU. PyTorch does the rest. Vectors are right, and slow.
Measured: one H200, 2026-11-29, 72 matrices of 12 layers 768 wide, 85M weights: a step takes 4.03 ms, where PyTorch's
          operations on lists take 6.31. The products alone take 3.44 of them (3.62 with a stack for each shape), and
          these kernels 0.60: 4.0 TB/s. By CUDA events around steps of either in turn, by no command of `lfs`. Of the
          products' time 0.6 ms were copies of what was to be added to them; the iterations have done without since.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import tl, triton
from lfs_cli.kernels.operation import unavailable_reason
from lfs_cli.kernels.self_check import LARGEST_ERROR, is_trusted, relative_errors
from lfs_cli.kernels.tables import addresses_of, on_device, tensor_at

EPSILON = 1e-7
"""Added to a norm, so that a matrix of zeros stays one."""

TILE = 64
"""Rows and columns of a tile: 256 bytes of float32, and 128 of bfloat16, one after the other in either direction."""

BLOCK = 4096
"""Numbers that one program of `_normalize` divides."""

SUMS = 1024
"""Sums of tiles that it reads at once."""


@triton.jit
def _places(tile, short, long, TALL: tl.constexpr, TILE: tl.constexpr):
    """Return where the numbers of a tile lie in their matrix and in the stack, and which of them exist."""
    rows = long if TALL else short
    columns = short if TALL else long
    across = tl.cdiv(columns, TILE)
    r = (tile // across).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    c = (tile % across).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    at = r * columns + c
    return at, (c * long + r if TALL else at), (r < rows) & (c < columns)


@triton.jit
def _prepare_tile(
    g_ptr,
    m_ptr,
    u_ptr,
    tile,
    scale,
    momentum,
    short,
    long,
    NESTEROV: tl.constexpr,
    TALL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Do what `_prepare` does, but return the sum."""
    at, there, inside = _places(tile, short, long, TALL, TILE)
    g = tl.load(g_ptr + at, mask=inside, other=0.0) * scale
    m = momentum * tl.load(m_ptr + at, mask=inside, other=0.0) + g
    u = g + momentum * m if NESTEROV else m
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(u_ptr + there, u.to(u_ptr.dtype.element_ty), mask=inside)
    return tl.sum(u * u)


@triton.jit(do_not_specialize=["first", "wide"])  # else compiled again for a 1 and for multiples of 16
def _prepare(
    gradients_ptr,
    running_ptr,
    stack_ptr,
    sums_ptr,
    scale_ptr,
    momentum,
    first,
    wide,
    short,
    long,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move m and write u in one tile of one matrix, and the sum of its squares there. `scale_ptr` is None without one.

    `first` is the stack's first entry in the tables, and the first `wide` of its matrices are not tall.
    """
    tiles = tl.cdiv(short, TILE) * tl.cdiv(long, TILE)
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    g_ptr = tensor_at(gradients_ptr, first + matrix, tl.float32, ALIGNED)
    m_ptr = tensor_at(running_ptr, first + matrix, tl.float32, ALIGNED)
    u_ptr = stack_ptr + matrix.to(tl.int64) * short * long
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if matrix < wide:
        total = _prepare_tile(g_ptr, m_ptr, u_ptr, tile, scale, momentum, short, long, NESTEROV, False, TILE)
    else:
        total = _prepare_tile(g_ptr, m_ptr, u_ptr, tile, scale, momentum, short, long, NESTEROV, True, TILE)
    tl.store(sums_ptr + tl.program_id(0), total)


@triton.jit
def _normalize(stack_ptr, sums_ptr, tiles, numbers, epsilon, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Divide BLOCK numbers of one matrix of the stack, of `numbers`, by its norm."""
    blocks = tl.cdiv(numbers, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    squares = tl.zeros([SUMS], tl.float32)
    for start in range(0, tiles, SUMS):
        tile = start + tl.arange(0, SUMS)
        squares += tl.load(sums_ptr + matrix * tiles + tile, mask=tile < tiles, other=0.0)
    norm = tl.sqrt(tl.sum(squares)) + epsilon
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x_ptr = stack_ptr + matrix * numbers + at
    x = tl.load(x_ptr, mask=at < numbers).to(tl.float32) / norm
    tl.store(x_ptr, x.to(stack_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit
def _apply_tile(w_ptr, y_ptr, tile, keep, rate, short, long, TALL: tl.constexpr, TILE: tl.constexpr):
    """Do what `_apply` does."""
    at, there, inside = _places(tile, short, long, TALL, TILE)
    y = tl.load(y_ptr + there, mask=inside).to(tl.float32)
    w = tl.load(w_ptr + at, mask=inside)
    tl.store(w_ptr + at, w * keep - rate * y, mask=inside)


@triton.jit(do_not_specialize=["first", "wide"])
def _apply(
    weights_ptr,
    stack_ptr,
    keep,
    wide_rate,
    tall_rate,
    first,
    wide,
    short,
    long,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Move one tile of one matrix. keep is 1 - lr decay, the rates are lr size."""
    tiles = tl.cdiv(short, TILE) * tl.cdiv(long, TILE)
    matrix = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    w_ptr = tensor_at(weights_ptr, first + matrix, tl.float32, ALIGNED)
    y_ptr = stack_ptr + matrix.to(tl.int64) * short * long
    if matrix < wide:
        _apply_tile(w_ptr, y_ptr, tile, keep, wide_rate, short, long, False, TILE)
    else:
        _apply_tile(w_ptr, y_ptr, tile, keep, tall_rate, short, long, True, TILE)


@dataclass
class _Stack:
    """Matrices of short x long, or of long x short, which are tall and come last.

    Args:
        short: Rows of each matrix of the stack.
        long: Its columns, as many or more.
        wide: Matrices that are not tall: the number of the weight, and of its first entry there.
        tall: The others, likewise.
        first: The first matrix' place among those of all stacks.
    """

    short: int
    long: int
    wide: list[tuple[int, int]] = field(default_factory=list)
    tall: list[tuple[int, int]] = field(default_factory=list)
    first: int = 0

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return self.wide + self.tall

    @property
    def entries(self) -> slice:
        """Of the tables."""
        return slice(self.first, self.first + len(self.wide) + len(self.tall))

    def view(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrices of these contiguous tensors, each (short, long)."""
        numbers = self.short * self.long
        flat = [tensors[tensor].view(-1)[start : start + numbers] for tensor, start in self.matrices]
        wide, tall = flat[: len(self.wide)], flat[len(self.wide) :]
        return [x.view(self.short, self.long) for x in wide] + [x.view(self.long, self.short).mT for x in tall]


class _Rule(NamedTuple):
    """What a step does: `MuonTensors.step` has the arguments. The rate is of a matrix of so many rows and columns."""

    iterate: Callable[[Tensor], Tensor]
    rate: Callable[[int, int], float]
    momentum: float
    nesterov: bool
    keep: float
    scale: Tensor | None


class MuonTensors:
    """Weights and what Muon remembers of them: lists of one length, of tensors of one shape each.

    Args:
        weights: What moves, in place. The last two dimensions are the matrix; a vector is a matrix of one row.
        running: Running gradients, float32; zeros before the first step.
        parts: Matrices that each one of these holds, one below the other.
        stack_type: Type of the matrices that the iterations get.

    Attributes:
        reason: Why the kernels cannot run on these, whatever the gradients are; None when they can.

    Raises:
        ValueError: When the lists do not fit together.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        running: Sequence[Tensor],
        *,
        parts: int = 1,
        stack_type: torch.dtype = torch.bfloat16,
    ) -> None:
        self.weights, self.running, self.parts, self.stack_type = weights, running, parts, stack_type
        self._shapes = [weight.shape for weight in weights]
        if [x.shape for x in running] != self._shapes:
            raise ValueError("running and weights differ in number or shape")
        self.reason = _reason([*weights, *running])
        self.stacks = _stacks(self._shapes, parts)
        self._addresses = addresses_of(weights, running)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._gradient_addresses: list[int] = []
        self._gradient_table: Tensor | None = None
        self._aligned: list[bool] = []

    def holds(self, weights: Sequence[Tensor], running: Sequence[Tensor], parts: int) -> bool:
        """Return whether this is of these very tensors, and they still lie where they lay when it was made."""
        kept, asked = (*self.weights, *self.running), (*weights, *running)
        return (
            (len(kept), self.parts) == (len(asked), parts)
            and all(map(is_, kept, asked))
            and self._addresses == addresses_of(weights, running)
        )

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        iterate: Callable[[Tensor], Tensor],
        size: Callable[[int, int], float],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Tensor | None = None,
    ) -> None:
        """Move all weights once.

        Args:
            gradients: One for each weight, in its shape.
            iterate: Makes matrices of norm 1, (matrices, short, long) with short <= long, orthogonal. It may change
                them, and returns as many.
            size: Of a step, as a multiple of ``lr``, for the rows and columns of a matrix.
            lr: Step size.
            momentum: Share of the running gradient kept.
            nesterov: Look ahead along the running gradient.
            weight_decay: Share of the weight removed, as a multiple of ``lr``.
            scale: (), on the device: factor of all gradients; None for 1.

        Raises:
            ValueError: When ``gradients`` do not fit the weights.
        """
        if [x.shape for x in gradients] != self._shapes:
            raise ValueError("gradients and weights differ in number or shape")
        step = _reference_step if unavailable(self, gradients) else MuonTensors._launch
        rate = lambda rows, columns: float(lr * size(rows, columns))  # noqa: E731  a whole number would be compiled in
        step(self, gradients, _Rule(iterate, rate, float(momentum), nesterov, 1.0 - lr * weight_decay, scale))

    def _launch(self, gradients: Sequence[Tensor], rule: _Rule) -> None:
        if not self.stacks:
            return
        iterate, rate, momentum, nesterov, keep, scale = rule
        device = self.weights[0].device
        gradients = [gradient.contiguous() for gradient in gradients]
        weights_table, running_table, gradients_table = self._on_device(gradients, device)
        for stack, is_aligned in zip(self.stacks, self._aligned, strict=True):
            short, long, count = stack.short, stack.long, len(stack.matrices)
            tiles, numbers = triton.cdiv(short, TILE) * triton.cdiv(long, TILE), short * long
            x = torch.empty(count, short, long, dtype=self.stack_type, device=device)
            sums = torch.empty(count, tiles, device=device)
            where = (stack.first, len(stack.wide), short, long)
            how = {"num_warps": 8, "enable_fp_fusion": True}
            with torch.cuda.device_of(x):
                tables = (gradients_table, running_table, x, sums, scale)
                constants = {"NESTEROV": nesterov, "ALIGNED": is_aligned, "TILE": TILE}
                _prepare[(count * tiles,)](*tables, momentum, *where, **constants, **how)
                constants = {"SUMS": SUMS, "BLOCK": BLOCK}
                blocks = count * triton.cdiv(numbers, BLOCK)
                _normalize[(blocks,)](x, sums, tiles, numbers, EPSILON, **constants, **how)
                y = iterate(x).contiguous()
                rates = rate(short, long), rate(long, short)
                constants = {"ALIGNED": is_aligned, "TILE": TILE}
                _apply[(count * tiles,)](weights_table, y, keep, *rates, *where, **constants, **how)
            del x, y, sums  # else they would be there beside those of the next stack

    def _on_device(self, gradients: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the matrices of weights, running gradients and gradients lie."""
        matrices = partial(_matrix_addresses, self.stacks)
        if self._tables is None:
            self._tables = on_device(matrices(self.weights), device), on_device(matrices(self.running), device)
        addresses = addresses_of(gradients)
        if self._gradient_table is None or addresses != self._gradient_addresses:
            self._gradient_table, self._gradient_addresses = on_device(matrices(gradients), device), addresses
            of_all = [matrices(tensors) for tensors in (self.weights, self.running, gradients)]
            self._aligned = [
                not any(address % 16 for addresses in of_all for address in addresses[stack.entries])
                for stack in self.stacks
            ]
        return *self._tables, self._gradient_table


def unavailable(tensors: MuonTensors, gradients: Sequence[Tensor]) -> str | None:
    """Say why the kernels cannot run on these tensors, or None when they can. PyTorch takes their place then."""
    if tensors.reason is not None or not gradients:
        return tensors.reason
    if {x.device for x in gradients} != {tensors.weights[0].device}:
        return "the tensors are on several devices"
    if any(x.dtype != torch.float32 for x in gradients):
        return "it needs float32"
    return None


def _reason(tensors: Sequence[Tensor]) -> str | None:
    if any(x.dtype != torch.float32 for x in tensors):
        return "it needs float32"
    if not all(x.is_contiguous() for x in tensors):
        return "it needs contiguous tensors"
    if len({x.device for x in tensors}) > 1:
        return "the tensors are on several devices"
    return unavailable_reason(tensors[0].device.type, torch.float32) if tensors else None


def is_usable(device: torch.device, stack_type: torch.dtype, *, is_nesterov: bool, is_scaled: bool) -> bool:
    """Return whether the kernels can run here and, on a small case, do what the definition does in float64.

    Args:
        device: Where.
        stack_type: Type of the matrices that the iterations get.
        is_nesterov: Whether steps look ahead.
        is_scaled: Whether gradients are to be multiplied by a number on the device.
    """
    if unavailable_reason(device.type, stack_type) is not None:
        return False
    return is_trusted("Muon", _errors, device, stack_type, is_nesterov, is_scaled, allowed=1)


def _errors(device: torch.device, stack_type: torch.dtype, is_nesterov: bool, is_scaled: bool) -> list[float]:
    """Return errors of weights and running gradients, as shares of those allowed, after two steps.

    Iterations only turn rows around, which shows matrices that are not where they should be.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(TILE + 16, TILE), (TILE, TILE + 16), (TILE, TILE)]  # two share a stack; parts of tiles, and whole ones
    drawn = [[torch.randn(shape, generator=generator, device=device) for shape in shapes] for _ in range(3)]
    scale = torch.full((), 0.5, device=device) if is_scaled else None
    settings = {"lr": 0.5, "nesterov": is_nesterov, "weight_decay": 0.5, "scale": scale}
    cases = []
    for wide in (torch.float64, torch.float32):  # float64 is what the kernels cannot do
        weights, *gradients = [[x.to(wide, copy=True) for x in each] for each in drawn]
        cases.append(MuonTensors(weights, [torch.zeros_like(x) for x in weights], stack_type=stack_type))
        for each in gradients:  # steps are about as large as the weights, and of tall matrices larger
            cases[-1].step(each, lambda x: x.flip(-1), lambda rows, columns: columns + 1.5 * rows, **settings)
    exact, ours = cases
    moved = [error / LARGEST_ERROR[stack_type] for error in relative_errors(ours.weights, exact.weights)]
    return moved + [error / LARGEST_ERROR[torch.float32] for error in relative_errors(ours.running, exact.running)]


def _reference_step(tensors: MuonTensors, gradients: Sequence[Tensor], rule: _Rule) -> None:
    """The definition, in the type of the running gradients."""
    iterate, rate, momentum, nesterov, keep, scale = rule
    directions = []
    for running, gradient in zip(tensors.running, gradients, strict=True):
        g = gradient.to(running.dtype) * (1 if scale is None else scale)
        running.mul_(momentum).add_(g)
        directions.append((g + momentum * running if nesterov else running).contiguous())
    moved = [x.to(running.dtype).contiguous() for x, running in zip(tensors.weights, tensors.running, strict=True)]
    for stack in tensors.stacks:
        u = torch.stack(stack.view(directions))
        y = iterate(u / (u.norm(dim=(-2, -1), keepdim=True) + EPSILON))
        rates = [rate(stack.short, stack.long)] * len(stack.wide) + [rate(stack.long, stack.short)] * len(stack.tall)
        for weight, each, own in zip(stack.view(moved), y, rates, strict=True):
            weight.mul_(keep).sub_(own * each)
    for weight, new in zip(tensors.weights, moved, strict=True):
        weight.copy_(new)


def _stacks(shapes: Sequence[torch.Size], parts: int) -> list[_Stack]:
    """Return the stacks of all matrices that weights of these shapes hold."""
    stacks: dict[tuple[int, int], _Stack] = {}
    for weight, shape in enumerate(shapes):
        if not shape.numel():
            continue
        rows, columns = (1, *shape)[-2:]
        rows //= parts
        short, long = sorted((rows, columns))
        stack = stacks.setdefault((short, long), _Stack(short, long))
        alike = stack.tall if rows > columns else stack.wide
        alike += [(weight, first) for first in range(0, shape.numel(), rows * columns)]
    first = 0
    for stack in stacks.values():
        stack.first = first
        first += len(stack.matrices)
    return list(stacks.values())


def _matrix_addresses(stacks: Sequence[_Stack], tensors: Sequence[Tensor]) -> list[int]:
    """Return where the matrices of float32 tensors begin, stack after stack."""
    starts = addresses_of(tensors)
    return [starts[tensor] + 4 * first for tensor, first in chain(*(stack.matrices for stack in stacks))]

"""Weights in the type of the matrix products, cast at most once a step and shared by all its passes.

Weights are float32, and in bfloat16 training products read them in that type. A pass casts each as it comes to it: 4
bytes read and 2 written, as often as a step has passes, always of the same numbers. Here a step casts them once, to
where the copies of the step before were, so that CUDA graphs find them. AdamW's kernel does even that on the way: it
has just written the weight, and writes the copy beside it, 2 bytes. So a step of a single pass, which would cast each
weight once by itself, has copies only of what AdamW keeps up.

They take the place of copies that a pass keeps for its backward, so the peak of a pass stays; with activation
checkpointing a pass keeps none, and in layers that mix values it keeps its own, scaled: there it rises by them. Between
passes they stay. If there is no memory for them when a run first wants them, its passes cast as they would without, to
the end.

A copy is fresh as long as nothing but that kernel has moved the weight: PyTorch counts what its own operations write,
in the weight's version, and the kernel leaves that as it is. What moves `weight.data` is not counted, so a run with
plugins has no copies that AdamW keeps up.

Gradients come to the float32 weights as they do without, so losses, gradients and weights are the same to the bit.

A step of gpt2_small.json casts 124M weights in 16 passes: 0.18 ms each at 4.2 TB/s, of 57 ms; in a single pass 0.39 ms,
by a launch for each matrix (one H200, torch's profiler, 2026-11-30).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from lfs_cli.model import Transformer
from lfs_cli.model.attention import Attention
from lfs_cli.model.device import is_out_of_memory
from lfs_cli.model.feed_forward import SwiGLU
from lfs_cli.model.layers import Linear, on_gpu, pays_to_stack
from lfs_cli.optimizers import AdamW, Optimizer


class Casts:
    """Copies of the matrices of a model.

    Args:
        model: Whose layers read them.
        dtype: Type of the matrix products.
        optimizers: That move its weights; AdamW keeps copies up.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, optimizers: Sequence[Optimizer] = ()) -> None:
        self._model, self._dtype = model, dtype
        self._stacks = _stacks(model)
        self._adams = [each for each in optimizers if type(each) is AdamW] if on_gpu(model.head_weight) else []
        self._copies: dict[int, Tensor] = {}
        """Where they are, by the index of their stack."""
        self._has_memory = True
        self._fresh: dict[int, list[tuple[int, int]]] = {}
        """The versions and places of the weights of a stack, as its copy has them, by its index."""

    @contextmanager
    def kept(self, passes: int) -> Iterator[None]:
        """Within the block, let passes read copies of the weights as they are now, if there are any to be saved.

        Args:
            passes: Of the step.
        """
        copies = self._refreshed(passes)
        if not any(copy is not None for copy in copies):
            yield
            return
        try:
            self._give(copies)
            yield
        finally:  # stale as soon as the weights move, and not for passes without gradients
            self._give([None] * (len(self._stacks) + 1))

    def bytes_held(self, passes: int) -> int:
        """Return what the copies take in a step of so many passes."""
        is_used = [self._is_used(index, passes) for index in range(len(self._stacks) + 1)]
        stacks = (stack for stack, used in zip(self._matrices(), is_used, strict=True) if used)
        return sum(self._dtype.itemsize * weight.numel() for stack in stacks for weight in stack)

    def _is_used(self, index: int, passes: int) -> bool:
        """Whether a step of so many passes has a copy of this stack."""
        if self._dtype == torch.float32:
            return False
        is_checkpointed = self._model.config.checkpointing != "none"  # a pass keeps no copies of its own
        return passes > 1 or (not is_checkpointed and index in self._kept_up)

    def _matrices(self) -> list[list[Tensor]]:
        return [*([layer.weight for layer in stack] for stack in self._stacks), [self._model.head_weight]]

    @cached_property
    def _kept_up(self) -> set[int]:
        """The stacks all of whose weights AdamW moves, by their index."""
        moved = {weight for adam in self._adams for group in adam.param_groups for weight in group["params"]}
        return {index for index, stack in enumerate(self._matrices()) if moved.issuperset(stack)}

    def _make_room(self, wanted: Sequence[int]) -> None:
        """Have a copy of each of these stacks, and tell AdamW of those that it is to keep up.

        Where there is no memory for all, there is none of any, to the end: another try would cost the allocator its
        cache.
        """
        missing = {index: self._matrices()[index] for index in wanted if index not in self._copies}
        if not missing:
            return
        try:
            for index, stack in missing.items():
                shape = (sum(map(len, stack)), *stack[0].shape[1:])
                self._copies[index] = stack[0].new_empty(shape, dtype=self._dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._copies.clear()
            self._has_memory = False
        views: dict[Tensor, Tensor] = {}
        for index in self._kept_up & self._copies.keys():
            stack = self._matrices()[index]
            views.update(zip(stack, self._copies[index].split([len(weight) for weight in stack]), strict=True))
        for adam in self._adams:
            adam.keep_up(views)

    @torch.no_grad()
    def _refreshed(self, passes: int) -> list[Tensor | None]:
        """Return the copies that a step of so many passes has, as the weights are now."""
        wanted = [index for index in range(len(self._stacks) + 1) if self._is_used(index, passes)]
        if self._has_memory:
            self._make_room(wanted)
        if not (wanted and self._has_memory):
            return []
        found: list[Tensor | None] = [None] * (len(self._stacks) + 1)
        matrices = self._matrices()
        for index in wanted:
            found[index] = copy = self._copies[index]
            now = None
            if index in self._kept_up:
                now = [(weight._version, weight.data_ptr()) for weight in matrices[index]]
            if now is None or now != self._fresh.get(index):
                torch.cat(matrices[index], out=copy)
            if now is not None:
                self._fresh[index] = now
        return found

    def _give(self, copies: Sequence[Tensor | None]) -> None:
        *matrices, self._model.head_cast = copies
        for stack, matrix in zip(self._stacks, matrices, strict=True):
            stack[0].cast = matrix


def _stacks(model: Transformer) -> list[tuple[Linear, ...]]:
    """Return the layers of the blocks by the products that they are multiplied in."""
    stacks: list[tuple[Linear, ...]] = []
    if pays_to_stack(model.head_weight):
        for module in model.modules():
            if type(module) is Attention:  # a class of a plugin may stack others
                stacks.append((module.query, module.key, module.value))
            elif type(module) is SwiGLU:
                stacks.append((module.gate, module.up))
    known: set[nn.Module | None] = {model.head, *(layer for stack in stacks for layer in stack)}
    return stacks + [(module,) for module in model.modules() if isinstance(module, Linear) and module not in known]

"""What all optimizers share: the loop over weights, the state of each, and `step`.

A new optimizer is one file in this room: a class with `update`, which moves one weight, and if it remembers anything
`start`, which says what a weight's memory looks like before its first step. Saving, loading, groups with settings of
their own and closures come from torch.optim.Optimizer, whose interface this is.

A model has a hundred weights, and on a GPU a step of a hundred small updates waits for launches, not for numbers. So
`step` hands over all weights of a group at once, to `update_many`: by default that calls `update` for one after the
other, and an optimizer may say it again with operations on lists (`torch._foreach_...`) or on stacks of matrices.

Both see float32 or wider, whatever type the weights have: a small step is lost in the rounding of bfloat16, and so is
a running mean. No step asks the device for a number.

Clipping ends in a factor for all gradients, a number on the device. `step` takes it and multiplies them first, which is
a pass over memory of its own; an optimizer with a kernel, as AdamW and Muon, multiplies them as it reads them instead.
"""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lfs_cli.registry import Registry

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""Weights, or named weights, or groups: dicts with `params` and settings that differ from the defaults."""

State: TypeAlias = dict[str, Any]
"""What is remembered of one weight: tensors by name, and under `step` the number of its steps."""

Group: TypeAlias = dict[str, Any]
"""Settings of the group that a weight belongs to, such as `lr`; a schedule may change them between steps."""


class Optimizer(torch.optim.Optimizer):
    """Moves each weight that has a gradient by the rule that a subclass writes in `update`.

    Args:
        params: Weights, or groups of weights with settings of their own.
        defaults: Settings of groups that do not state them.

    Raises:
        ValueError: When a rate, decay or other plain number among the settings is negative.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name in defaults:
                for value in group[name] if isinstance(group[name], list | tuple) else [group[name]]:
                    if isinstance(value, int | float) and value < 0:
                        raise ValueError(f"`{name}` must not be negative, and is {group[name]}")

    def start(self, weight: Tensor) -> State:
        """Return the state of ``weight`` before its first step; `step` is counted besides."""
        return {}

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        """Move ``weight`` in place by one step.

        Args:
            weight: Changed in place; gradients are not recorded here. In float32 or wider.
            gradient: Of the loss with respect to ``weight``; in its shape and type. Not to be changed.
            state: What `start` returned, changed in place, and `step`: 1 at the first step.
            group: The weight's settings.
        """

    def update_many(self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group) -> None:
        """Do what `update` does for each of several weights, which have the step, type and device in common."""
        for weight, gradient, state in zip(weights, gradients, states, strict=True):
            self.update(weight, gradient, state, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scale: Tensor | None = None) -> Any:
        """Move all weights once.

        Args:
            closure: Computes the loss again and leaves new gradients; called first if given.
            scale: (), on the device: what gradients are multiplied by before they count, such as clipping's factor.
                They may be multiplied where they lie, so a second step needs new ones. None for 1.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: defaultdict[tuple[Any, ...], list[tuple[Tensor, Tensor, State]]] = defaultdict(list)
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(self.start(_wide(weight)), step=0)
                state["step"] += 1
                alike[state["step"], weight.dtype, weight.device].append((weight, gradient, state))
            for found in alike.values():
                weights, gradients, states = map(list, zip(*found, strict=True))
                self._move(weights, gradients, states, group, scale)
        return loss

    def _move(
        self, weights: list[Tensor], gradients: list[Tensor], states: list[State], group: Group, scale: Tensor | None
    ) -> None:
        """Move weights of one step, type and device, which may be narrow, by gradients times ``scale``.

        Here that is `update_many` and what must be done around it. Only an optimizer with a kernel does it otherwise.
        """
        if scale is not None:
            torch._foreach_mul_(gradients, scale)
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        gradients = [gradient if gradient.dtype == wide else gradient.to(wide) for gradient in gradients]
        if weights[0].dtype == wide:
            self.update_many(weights, gradients, states, group)
            return
        copies = [weight.to(wide) for weight in weights]
        self.update_many(copies, gradients, states, group)
        torch._foreach_copy_(weights, copies)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Torch would give each tensor the type of its weight; here it keeps its own. Settings that the state lacks, as an
        optimizer had none of that name when it was saved, have their defaults.
        """
        super().load_state_dict(state_dict)
        defaults = {name: value for name, value in self.defaults.items() if name != "differentiable"}  # torch adds it
        for group in self.param_groups:
            group.update({name: value for name, value in defaults.items() if name not in group})
        numbers = _flat([group["params"] for group in state_dict["param_groups"]])
        weights = _flat([group["params"] for group in self.param_groups])
        for number, weight in zip(numbers, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[weight][name] = value.to(weight.device)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself where it has the digits, else a copy that has them."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in lists for item in items]


OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", room="lfs_cli.optimizers")

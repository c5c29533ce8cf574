"""What all optimizers share: the loop over weights, the state of each, and `step`.

A new optimizer is one file in this room: a class with `update`, which moves one weight, and if it remembers anything
`start`, which says what a weight's memory looks like before its first step. Saving, loading, groups with settings of
their own and closures come from torch.optim.Optimizer, whose interface this is.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
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
            weight: Changed in place; gradients are not recorded here.
            gradient: Of the loss with respect to ``weight``; in its shape and type. Not to be changed.
            state: What `start` returned, changed in place, and `step`: 1 at the first step.
            group: The weight's settings.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all weights once.

        Args:
            closure: Computes the loss again and leaves new gradients; called first if given.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(self.start(weight), step=0)
                state["step"] += 1
                self.update(weight, weight.grad, state, group)
        return loss


OPTIMIZERS: Registry[type[Optimizer]] = Registry("optimizer", room="lfs_cli.optimizers")

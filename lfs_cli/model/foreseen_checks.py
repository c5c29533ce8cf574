"""Which self-checks of kernels a model will ask for, found out before it has numbers."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lfs_cli.kernels.operation import OPERATIONS, as_it_is
from lfs_cli.kernels.self_check import Case, Check, Listed, begin_checks, listed_checks

__all__ = ["Case", "Check", "Listed", "begin_checks", "checks_of", "listed_checks"]


def checks_of(function: Callable[[], object], device: torch.device) -> dict[Case, Check]:
    """Return the checks that ``function`` would ask for if its tensors had numbers, and were on ``device``.

    Args:
        function: Works on fake tensors, whose addresses must not be known: see `training/trace.py`.
        device: Where kernels are to run.
    """
    watch = _Watch(device)
    with watch:
        function()
    return watch.found


class _Watch(TorchDispatchMode):
    """Calls what each operation of ours calls where there are numbers, up to its first check."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: dict[Case, Check] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATIONS:
            with as_it_is(), listed_checks() as found, suppress(Listed), self:  # which sees the operations in it, too
                OPERATIONS[func](*tree_map(self._there, args), **tree_map(self._there, kwargs or {}))
            self.found |= found
        return func(*args, **(kwargs or {}))

    def _there(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)

"""What the tests of fused kernels share: which types there are, and how a result is judged."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lfs_cli.kernels import self_check

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_KERNELS = INTERPRETED or torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16]
if not INTERPRETED:  # the interpreter truncates to bfloat16 where a GPU rounds
    DTYPES.append(torch.bfloat16)


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def differentiate(function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The outputs of ``function``, and the inputs' gradients for outputs' gradients that every type can hold."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randint(-8, 9, x.shape, generator=generator).to(x.device, x.dtype) / 4 for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], roundings: float = 8) -> None:
    """Require that each result differs from float64's by a few roundings of its largest entry, or of 1."""
    for number, (mine, right) in enumerate(zip(ours, exact, strict=True)):
        assert mine.shape == right.shape
        if not right.numel():
            continue
        allowed = roundings * torch.finfo(mine.dtype).eps * max(1.0, float(right.abs().max()))
        error = float((mine.double() - right.double()).abs().max())
        assert error <= allowed, f"result {number}: largest error {error:.2e} exceeds {allowed:.2e}"


class Watch(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def backward_of(self, output: Tensor) -> list[str]:
        """The names of those that backward takes."""
        self.names.clear()
        with self:
            output.sum().backward()
        return self.names


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Within the block, an error for what waits for the GPU, which is behind meanwhile."""
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stand_in(module: Any, monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> list[str]:
    """Let the operations of ``module`` run on any machine, and forget what they were found to be.

    Where there are no kernels, the definitions take their place.

    Returns:
        Which kernel is launched, from now on, in order.
    """
    launched: list[str] = []
    monkeypatch.setattr(self_check, "_verdicts", {})
    for step, definition in (("forward", forward), ("backward", module._reference_backward)):
        name = f"_launch_{step}"
        run = getattr(module, name) if HAS_KERNELS else definition
        monkeypatch.setattr(module, name, lambda *inputs, step=step, run=run: launched.append(step) or run(*inputs))
    if not HAS_KERNELS:
        monkeypatch.setattr(module, "unavailable_reason", lambda *_: None)
    return launched

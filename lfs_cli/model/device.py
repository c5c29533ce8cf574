"""Which device and type a run computes with, decided once and passed down from there; and a device that is full."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lfs_cli.errors import DeviceError
from lfs_cli.kernels.operation import as_by_compiler, as_on_gpu, as_written

__all__ = [
    "as_by_compiler",
    "as_on_gpu",
    "as_written",
    "choose_compile",
    "choose_device",
    "choose_dtype",
    "compiled_call",
    "is_out_of_memory",
    "precision",
    "release_memory",
]

KINDS_OF_BLOCKS = 32
"""With and without gradients, with and without a window, a table of values, a document: far more than any model has."""


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        DeviceError: When this machine does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, here in available.items() if here))
    if not available[name]:
        raise DeviceError(f"no {name.upper()} device on this machine", hint="set `device` to `auto` or `cpu`")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type called ``name``: `auto` is bfloat16 where CUDA computes it natively, else float32.

    Raises:
        DeviceError: When the device cannot compute in it.
    """
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_compile(asked: bool | str, device: torch.device) -> bool:
    """Return whether to compile: `auto` does where torch.compile has what it needs, a CUDA GPU and Triton."""
    return device.type == "cuda" and find_spec("triton") is not None if asked == "auto" else bool(asked)


def compiled_call() -> Callable[..., Tensor]:
    """Return a function that calls a module, its first argument, with the others, compiled once for modules alike.

    The weights are inputs of what is compiled, so that all blocks of a model share it.
    """
    # Blocks may come in a few kinds, each with and without gradients; beyond the limit torch would not compile at all
    torch._dynamo.config.recompile_limit = max(KINDS_OF_BLOCKS, torch._dynamo.config.recompile_limit)

    def call(module: nn.Module, *inputs: Tensor | None, **more: Tensor | None) -> Tensor:
        return module(*inputs, **more)

    return torch.compile(call)


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which matrix products use ``dtype`` while weights and sums stay float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that an allocation was refused, by CUDA, MPS, or the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

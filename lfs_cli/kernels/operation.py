"""What kernels need around them: to be one operation of torch, and to know whether they can run."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lfs_cli.kernels.compatibility import AVAILABLE, INTERPRETED

PROGRAMS_EACH = 4
"""Programs of one processor of a GPU, so that some load while others compute."""


OPERATIONS: dict[Any, Callable[..., Any]] = {}
"""The operations ``lfs::*`` and what each calls where tensors have numbers."""


def operation(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function the operation ``lfs::<name>`` of torch, and gives that in its place.

    Not `torch.library.custom_op`, which puts some 50 us of checks around each call. What the function returns must be
    new tensors, and `torch.library.register_fake` has to be told their shapes.

    Args:
        name: Under `torch.ops.lfs`.
        mutates: Names of the arguments that are changed in place.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(f"lfs::{name}", schema)
        torch.library.impl(f"lfs::{name}", "CompositeExplicitAutograd", function)
        registered = getattr(torch.ops.lfs, name).default
        OPERATIONS[registered] = function
        return registered

    return register


class _Assumed(threading.local):
    """What this thread takes for given. It is set for each object: torch.compile does not see a class change."""

    def __init__(self) -> None:
        self.gpu: bool | None = None
        self.compiler = False
        self.hopper = False


_assumed = _Assumed()


@contextmanager
def as_on_gpu(*, is_compiled: bool, is_hopper: bool = False) -> Iterator[None]:
    """Within the block, take the paths of a CUDA GPU, whatever the device: for traces of tensors without numbers.

    Args:
        is_compiled: Take a kernel also for what torch.compile would make one of.
        is_hopper: Take those of the Hopper generation.
    """
    with _assuming(gpu=True, compiler=is_compiled, hopper=is_hopper):
        yield


@contextmanager
def as_by_compiler() -> Iterator[None]:
    """Within the block, take a kernel for what torch.compile would make one of, wherever it is: for traces likewise."""
    with _assuming(compiler=True):
        yield


@contextmanager
def as_written() -> Iterator[None]:
    """Within the block, take the paths that call each layer by itself, on a GPU too: for those who watch layers."""
    with _assuming(gpu=False):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    """Within the block, assume nothing, whatever is assumed around it."""
    with _assuming(gpu=None, compiler=False, hopper=False):
        yield


@contextmanager
def _assuming(**changes: bool | None) -> Iterator[None]:
    before = dict(vars(_assumed))
    vars(_assumed).update(changes)
    try:
        yield
    finally:
        vars(_assumed).update(before)


def under_same_assumptions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` for calls from elsewhere, under what is assumed here: autograd has threads of its own."""
    if torch.compiler.is_compiling():  # one graph then, wherever it runs
        return function
    assumed = dict(vars(_assumed))
    if assumed == vars(_Assumed()):
        return function

    def run(*inputs: Any, **more: Any) -> Any:
        with _assuming(**assumed):
            return function(*inputs, **more)

    return run


def as_compiled() -> bool:
    """Return whether this is a trace of what torch.compile would make of the steps."""
    return _assumed.compiler


def on_gpu(x: Tensor) -> bool:
    """Return whether ``x`` is, or is to be taken to be, on a CUDA GPU."""
    return x.is_cuda if _assumed.gpu is None else _assumed.gpu


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Say why a kernel in Triton cannot run on such tensors here, or None when it can.

    Args:
        device_type: Such as "cuda".
        dtype: Of the numbers it reads and writes.
    """
    is_assumed = _assumed.gpu or _assumed.compiler
    if not AVAILABLE and not is_assumed:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not is_assumed and not (INTERPRETED and device_type == "cpu"):
        return f"it needs a CUDA GPU, and this is {device_type}"
    return None


def no_hopper_reason(device: torch.device) -> str | None:
    """Say why kernels for Hopper GPUs, which are written in Gluon, cannot run on ``device``, or None when they can."""
    return None if _assumed.hopper else _no_hopper_reason(device)


@cache
def _no_hopper_reason(device: torch.device) -> str | None:
    if not AVAILABLE:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this is {device.type}"
    if INTERPRETED:
        return "Triton's interpreter cannot run it"
    if torch.version.hip or not torch.cuda.is_available():
        return "no NVIDIA GPU was found"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the GPU is not of the Hopper generation"
    try:
        from lfs_cli.kernels import gluon_compatibility  # noqa: F401  the version check is its import
    except (ImportError, AttributeError) as error:  # Gluon's names move between releases
        return f"this Triton has another Gluon: {error}"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of ``x`` are taken: its own, or autocast's, which leaves float64."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def programs_for(device: torch.device, each: int = PROGRAMS_EACH) -> int:
    """Return how many programs to launch where each takes a fixed share of the work: ``each`` for every processor."""
    if device.type != "cuda":
        return 3  # few and uneven, so that tests cross every edge
    return each * torch.cuda.get_device_properties(device).multi_processor_count

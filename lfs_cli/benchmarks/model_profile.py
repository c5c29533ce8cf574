"""One training step under torch.profiler, with its phases and modules named.

The step is eager: what torch.compile made of it has no modules left. On CUDA every phase ends when the GPU has done it,
so that the times of both agree. The profiler's own work is in the host's times: read shares, not speeds. Tables of
tokens are called one by one, as their names need it; training looks all of them up at once, which is faster on a GPU.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from lfs_cli.benchmarks.measure import Row
from lfs_cli.benchmarks.model_step import Training, Variant, multiplying_as
from lfs_cli.benchmarks.model_trace import MODULE, Event, kernel_rows, memory_rows

DEPTH = 2
"""Names in the path of the innermost modules that are told apart, layers not counted: blocks.*.attention."""


@dataclass(frozen=True)
class StepProfile:
    """What was seen of one step.

    Args:
        events: Of the trace.
        held: Address of what was there before, to what it is for and its bytes.
        gradients: Addresses of the weights' gradients after backward.
        device_type: Such as "cuda".
        files: What was written for other tools.
    """

    events: list[Event]
    held: dict[int, tuple[str, int]]
    gradients: frozenset[int]
    device_type: str
    files: tuple[Path, ...] = ()

    @cached_property
    def kernels(self) -> list[Row]:
        """Where the time went (`model_trace.kernel_rows`)."""
        return kernel_rows(self.events)

    @cached_property
    def memory(self) -> list[Row]:
        """What was in memory when (`model_trace.memory_rows`)."""
        return memory_rows(self.events, self.held, self.gradients, self.device_type)


def profile_step(training: Training, variant: Variant, keep: Path | None = None) -> StepProfile:
    """Run one step and return what was seen.

    Args:
        training: The model, whose optimizer has its state already.
        variant: How to compute.
        keep: Begin of the names of files to write: `.trace.json` for Chrome and Perfetto, and on CUDA
            `.memory.pickle`, for https://pytorch.org/memory_viz. None writes nothing.
    """
    device = training.device
    is_cuda = device.type == "cuda"
    training.forget()
    with multiplying_as(variant.precision):
        _step(training, variant)  # what happens once, such as compiling a kernel, must not be seen
    held = {address: ("weights", size) for address, size in map(_storage, training.weights)}
    held |= {address: ("state", size) for address, size in map(_storage, training.state())}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    files = []
    with ExitStack() as stack:
        stem = keep or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "step"
        stem.parent.mkdir(parents=True, exist_ok=True)
        if is_cuda and keep:
            torch.cuda.memory._record_memory_history()
            stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
        stack.enter_context(multiplying_as(variant.precision))
        stack.enter_context(_named_modules(training.model, device))
        profiler = profile(activities=activities, profile_memory=True, record_shapes=keep is not None, acc_events=True)
        with _quietly(profiler) as seen:
            gradients = _step(training, variant)
        if is_cuda and keep:
            files.append(Path(f"{stem}.memory.pickle"))
            torch.cuda.memory._dump_snapshot(str(files[-1]))
        trace = Path(f"{stem}.trace.json")
        seen.export_chrome_trace(str(trace))
        files = [trace, *files] if keep else []
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return StepProfile(events, held, gradients, device.type, tuple(files))


@contextmanager
def _quietly(profiler: AbstractContextManager[profile]) -> Iterator[profile]:
    """Enter and leave ``profiler`` without its notices on stderr that it starts and stops."""
    with ExitStack() as stack:
        with _without_notices():
            seen = stack.enter_context(profiler)
        try:
            yield seen
        finally:
            with _without_notices():
                stack.close()


@contextmanager
def _without_notices() -> Iterator[None]:
    """Pass on what is written to stderr when all is done, but for notices of Kineto, the profiler inside torch.

    They are of a kind, USDT, that it ranks above errors (pytorch/kineto#1325, in torch 2.13): a `KINETO_LOG_LEVEL` that
    hides them hides those too.
    """
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            with open(2, "wb", closefd=False) as terminal:
                terminal.write(re.sub(rb"USDT:\d[^\n]*\n", b"", written.read()))


def _step(training: Training, variant: Variant) -> frozenset[int]:
    """Run a step with its phases named, and return the addresses of the gradients."""
    device = training.device
    with _phase("forward", device):
        hidden_BTC = training.hidden(training.tokens_BT, variant.dtype)
    with _phase("loss", device):
        loss = training.head_loss(hidden_BTC, training.targets_BT, variant.dtype)
        del hidden_BTC
    with _phase("backward", device):
        loss.backward()
        del loss
    gradients = frozenset(_storage(weight.grad)[0] for weight in training.weights if weight.grad is not None)
    with _phase("optimizer", device):
        with _named(f"{MODULE}clip", device):
            scale = training.clip()
        training.optimizer.step(scale=scale)
        del scale
        training.forget()
    return gradients


@contextmanager
def _named(name: str, device: torch.device) -> Iterator[None]:
    """Give what runs inside a name, in torch.profiler and on CUDA as an NVTX range, in Nsight Systems."""
    with record_function(name):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


@contextmanager
def _phase(name: str, device: torch.device) -> Iterator[None]:
    with _named(name, device):
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextmanager
def _named_modules(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Give the forward of each module a name, down to `DEPTH`."""
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if path and sum(not part.isdigit() for part in path.split(".")) <= DEPTH:
                for handle in _name_forward(module, f"{MODULE}{path}", device):
                    hooks.callback(handle.remove)
        yield


def _name_forward(module: nn.Module, name: str, device: torch.device) -> tuple[Any, Any]:
    entered: list[ExitStack] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        stack = ExitStack()
        stack.enter_context(_named(name, device))
        entered.append(stack)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        entered.pop().close()

    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)


def _storage(x: Tensor) -> tuple[int, int]:
    """Return the address and the bytes of the memory behind ``x``."""
    return x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()

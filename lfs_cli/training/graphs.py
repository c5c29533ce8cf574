"""A pass, forward and backward, as one CUDA graph: recorded once, then replayed by a single launch.

A small model has hundreds of kernels that the GPU finishes faster than Python can launch them: 22.7M weights take an
H100 12 ms for 128 x 256 tokens, and the host 19 ms. A graph keeps the launches with all their arguments, so:

    addresses    tokens and targets are copied to where they were when it was recorded; loss and gradients come out
                 where they came out then. Weights are read where they were; once they have moved, all is recorded anew
    gradients    the first pass of a batch leaves new ones, and the others add to those: two graphs, in one pool
    warm-up      the first batches of a shape run as they are, beside the main stream as recording does, since kernels
                 are compiled, checked and chosen then, which cannot be recorded
    memory       all that a pass needs stays reserved between passes, until a lack of memory: then graphs are dropped
    limits       nothing in a pass may wait for the GPU, ask it for a number or depend on one. What cannot be recorded
                 runs as it is, after a warning

Recording runs the Python of a pass but none of its kernels, so a recording is replayed at once to have its results.

Source: PyTorch, "CUDA semantics", the section on CUDA graphs: whole-network capture, and graph memory management.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lfs_cli.config import TrainConfig
from lfs_cli.errors import ConfigError, DeviceError, LfsError
from lfs_cli.model.device import is_out_of_memory
from lfs_cli.training.cost import flops_per_token
from lfs_cli.training.step import LossFunction, plain_pass

LARGEST_FLOPS = 3.2e13
"""Of a pass that `auto` replays. Below 8e12, 20 ms of an H100, the host needs longer than the GPU; above, kernels still
follow each other sooner: a step of gpt2_small.json, 2.6e13, took 59.0 ms and not 59.8 (one H200, 2026-11-29)."""

WARM_UPS = 3
"""Batches of a shape that run as they are: the first compiles, and later ones may choose another kernel."""


def check_graphs(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError or DeviceError when `cuda_graphs` is true and a pass of the run cannot be recorded."""
    if config.cuda_graphs is True and (refusal := _refusal(config, device)) is not None:
        raise refusal


def choose_graphs(config: TrainConfig, device: torch.device, rows: int) -> tuple[bool, str]:
    """Return whether passes of so many sequences are replayed, and why, in words.

    Raises:
        ConfigError: When it is asked for, and the data or a plugin prevents it.
        DeviceError: When it is asked for on another device.
    """
    check_graphs(config, device)
    if config.cuda_graphs != "auto":
        return config.cuda_graphs, "as asked"
    if (refusal := _refusal(config, device)) is not None:
        return False, str(refusal)
    flops = flops_per_token(config.model) * rows * config.model.context_length
    is_small = flops < LARGEST_FLOPS
    why = "end sooner with one launch than with many" if is_small else "hide their launches"
    return is_small, f"the {flops / 1e12:,.1f} TFLOPs of a pass {why}"


def _refusal(config: TrainConfig, device: torch.device) -> LfsError | None:
    hint = "set `cuda_graphs` to `auto` or `false`"
    if device.type != "cuda":
        return DeviceError(f"CUDA graphs are for CUDA GPUs, and this is {device.type}", hint=hint)
    if config.data.documents == "packed":
        return ConfigError("packed documents have lengths that a CUDA graph cannot follow", hint=hint)
    if config.plugins:
        return ConfigError(f"the plugin `{config.plugins[0]}` may do what a CUDA graph cannot hold", hint=hint)
    return None


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Queue it on the current stream."""


class Recorder(Protocol):
    """Runs and records work."""

    def new_pool(self) -> Any:
        """Return a name for memory that graphs can work in, one at a time."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Run ``work`` where `record` would record it."""
        ...

    def record(self, work: Callable[[], Tensor], pool: Any) -> tuple[Graph, Tensor]:
        """Return the kernels of ``work``, which do not run, and the place in ``pool`` where its result will be."""
        ...


class CudaRecorder:
    """Records on a stream of its own, on which the warm-up runs too: autograd and libraries keep things by stream.

    Args:
        device: The current CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._called_off: list[torch.cuda.CUDAGraph] = []

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        with self._beside():
            return work()

    def record(self, work: Callable[[], Tensor], pool: Any) -> tuple[Graph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # the pool is memory of its own, and cannot have what is kept for others
        with self._beside():
            # Only this thread must not wait for the GPU now: another one may be writing a checkpoint
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                self._end(graph, pool)
        return graph, result

    def _end(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """End a recording, also one that the driver has called off, as it does when something waits for the GPU.

        Torch 2.11 to 2.13 then stops halfway: its allocator would refuse to free memory, and its generator to draw,
        as if the recording went on.
        """
        try:
            graph.capture_end()
        except RuntimeError:
            index = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
            self._called_off.append(graph)  # the allocator of pinned memory still points to it
            raise

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Make the stream the current one: it begins after what is queued, and what is queued later waits for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)


@dataclass(frozen=True)
class _Recording:
    """A pass that can be replayed, with the places of its share of the loss and of each weight's gradient."""

    graph: Graph
    loss: Tensor
    gradients: list[Tensor | None]


@dataclass
class _Shape:
    """What is kept for passes of one shape.

    Args:
        tokens: (B, T), where they are read.
        targets: (B, T), and these.
        pool: Memory of both graphs.
        batches: Seen so far.
        first: The pass that leaves new gradients.
        further: The pass that adds to those of `first`.
    """

    tokens: Tensor
    targets: Tensor
    pool: Any
    batches: int = 0
    first: _Recording | None = None
    further: _Recording | None = None


class GraphedPass:
    """Does what `plain_pass` does, by replaying it once it has been recorded.

    The loss that a call returns holds until the next one, and the gradients that it leaves until the next batch.

    Args:
        loss_function: Forward, up to the mean loss.
        model: Whose weights and tables that reads.
        recorder: Such as a `CudaRecorder`.
    """

    def __init__(self, loss_function: LossFunction, model: nn.Module, recorder: Recorder) -> None:
        self._loss_function, self._model, self._recorder = loss_function, model, recorder
        self._weights = list(model.parameters())
        self._places: list[int] = []
        self._shapes: dict[tuple[torch.Size, int], _Shape] = {}
        self._is_refused = False

    def __call__(self, tokens_BT: Tensor, targets_BT: Tensor, passes: int) -> Tensor:
        """Add the gradients of one of ``passes`` equal parts of a batch, and return its share of the mean loss.

        Raises:
            RuntimeError: When memory runs out. All recordings are dropped then, and with them the memory they hold.
        """
        if self._is_refused:
            return plain_pass(self._loss_function, tokens_BT, targets_BT, passes)
        try:
            return self._run(tokens_BT, targets_BT, passes)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.drop()
            raise

    def drop(self) -> None:
        """Forget all recordings: the next batches are warm-ups again."""
        self._shapes.clear()

    def _run(self, tokens_BT: Tensor, targets_BT: Tensor, passes: int) -> Tensor:
        gradients = self._gradients()
        is_first = all(gradient is None for gradient in gradients)
        if is_first:
            self._drop_if_moved()
        key = (tokens_BT.shape, passes)
        if key not in self._shapes:
            places = (torch.empty_like(tokens_BT), torch.empty_like(targets_BT))
            self._shapes[key] = _Shape(*places, self._recorder.new_pool())
        shape = self._shapes[key]
        shape.tokens.copy_(tokens_BT)
        shape.targets.copy_(targets_BT)
        work = partial(plain_pass, self._loss_function, shape.tokens, shape.targets, passes)

        if is_first:
            shape.batches += 1
            if shape.batches <= WARM_UPS:
                return self._recorder.aside(work)
            recording = shape.first = shape.first or self._record(work, shape.pool)
        else:
            if shape.first is None or not _are_same(gradients, shape.first.gradients):
                return self._recorder.aside(work)
            recording = shape.further = shape.further or self._record(work, shape.pool)
        if recording is None:
            self.drop()
            return work()
        recording.graph.replay()
        for weight, gradient in zip(self._weights, recording.gradients, strict=True):
            weight.grad = gradient  # the step drops them, and they must not be freed
        return recording.loss

    def _record(self, work: Callable[[], Tensor], pool: Any) -> _Recording | None:
        """Return the recording of a pass; None, after a warning, when it cannot be recorded, then or later."""
        gradients = self._gradients()
        try:
            graph, loss = self._recorder.record(work, pool)
        except Exception as error:  # a compiler may raise anything
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.grad = gradient  # no kernel ran, so their numbers are what they were
            if (lack := _lack_of_memory(error)) is not None:
                raise lack from None
            self._is_refused = True
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            warnings.warn(
                f"a pass cannot be recorded as a CUDA graph, and runs without: {reason}", RuntimeWarning, stacklevel=2
            )
            return None
        return _Recording(graph, loss, self._gradients())

    def _gradients(self) -> list[Tensor | None]:
        return [weight.grad for weight in self._weights]

    def _drop_if_moved(self) -> None:
        """Drop all recordings if a weight or table lies elsewhere than in the last batch, such as after `model.to`.

        Loading a checkpoint copies into the weights where they are. Asking each for its place takes a few microseconds
        a layer; a flag would have to be set by everyone who may move them.
        """
        places = [tensor.data_ptr() for tensor in chain(self._model.parameters(), self._model.buffers())]
        if places != self._places:
            self.drop()
            self._places, self._weights = places, list(self._model.parameters())


def _are_same(gradients: list[Tensor | None], others: list[Tensor | None]) -> bool:
    return all(one is other for one, other in zip(gradients, others, strict=True))


def _lack_of_memory(error: BaseException | None) -> BaseException | None:
    """Return the lack of memory that led to ``error``: a recording that it cuts off may end with another error."""
    while error is not None and not is_out_of_memory(error):
        error = error.__context__
    return error

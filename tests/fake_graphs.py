"""CUDA graphs without a GPU: a recorder that does on a CPU what `CudaRecorder` does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAN = float("nan")


class FakeGraph:
    """Replays by running the work again, into the tensors that it left when it was recorded."""

    def __init__(
        self, work: Callable[[], Tensor], weights: list[nn.Parameter], before: list[Any], loss: Tensor
    ) -> None:
        self._work, self._weights, self._before, self._loss = work, weights, before, loss
        self._after = [weight.grad for weight in weights]
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        now = [weight.grad for weight in self._weights]
        for weight, gradient in zip(self._weights, self._before, strict=True):
            weight.grad = gradient
        self._loss.copy_(self._work())
        for weight, place, gradient in zip(self._weights, self._after, now, strict=True):
            if weight.grad is not place:
                place.copy_(weight.grad)
            weight.grad = gradient


class FakeRecorder:
    """Does on a CPU what a CUDA graph does: recording computes nothing, so what it leaves has no numbers yet."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.asides = 0
        self.graphs: list[FakeGraph] = []
        self.pools: list[Any] = []
        self.failure: tuple[int, Exception] | None = None
        """After how many recordings the next one fails, and how."""

    def new_pool(self) -> object:
        return object()

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        self.asides += 1
        return work()

    def record(self, work: Callable[[], Tensor], pool: Any) -> tuple[FakeGraph, Tensor]:
        before = [weight.grad for weight in self.weights]
        numbers = [None if gradient is None else gradient.clone() for gradient in before]
        loss = work().fill_(NAN)
        for weight, old in zip(self.weights, numbers, strict=True):
            weight.grad.copy_(torch.full_like(weight, NAN) if old is None else old)
        if self.failure is not None and len(self.graphs) == self.failure[0]:
            raise self.failure[1]
        graph = FakeGraph(work, self.weights, before, loss)
        self.graphs.append(graph)
        self.pools.append(pool)
        return graph, loss

"""One step of each registered optimizer beside its counterpart in torch.optim.

Weights and gradients are float32, as in training, in square matrices like those of a Transformer. `torch` is the
counterpart with its default loop over tensors, `torch fused` the one that torch writes as a single kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Candidate, Row
from lfs_cli.config import BenchConfig
from lfs_cli.optimizers import OPTIMIZERS

COUNTERPARTS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
"""What torch offers under each of our names. An optimizer without an entry is compared with torch's AdamW."""

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    "sgd": {"lr": 1e-3, "momentum": 0.9},
}
"""Settings that both sides get; an optimizer without an entry runs with its defaults."""

_FLOATS_PER_WEIGHT = 6
"""Upper estimate of what a step holds for a weight: itself, its gradient, two of state, two while it is updated."""


@BENCHMARKS.register("optimizer")
def bench_optimizer(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time one step of every optimizer at every number of weights."""
    asked = settings.optimizer
    names = asked.names or tuple(OPTIMIZERS.names())
    counts = asked.parameters or ((100_000_000,) if bench.device.type == "cuda" else (1_000_000, 10_000_000))
    rows: list[Row] = []
    for count in counts:
        for name in names:
            rows += _bench_one(name, count, bench)
    return rows


def _bench_one(name: str, count: int, bench: Bench) -> list[Row]:
    theirs = name if name in COUNTERPARTS else "adamw"
    counterpart, ours = COUNTERPARTS[theirs], OPTIMIZERS.get(name)
    builders: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "torch": partial(counterpart, **OPTIONS[theirs]),
        "lfs": partial(ours, **OPTIONS.get(name, {})),
    }
    if bench.device.type in ("cuda", "cpu"):
        builders["torch fused"] = partial(counterpart, fused=True, **OPTIONS[theirs])
    for build in builders.values():  # torch loads parts of itself at its first step, which must not count as memory
        warm = _Case(build, 1_000, bench)
        warm.build()
        warm.step()
    cases = {which: _Case(build, count, bench) for which, build in builders.items()}
    results = bench.measure(
        f"optimizer {name}, {count:,} weights",
        [
            Candidate(which, case.step, prepare=case.build, needs_bytes=4 * _FLOATS_PER_WEIGHT * count)
            for which, case in cases.items()
        ],
    )
    return [
        {
            "parameters": count,
            "optimizer": name,
            "implementation": which,
            "weights_per_second": count / result.timing.median if result.timing else None,
            **result.row(results["torch"], f"torch {theirs}"),
        }
        for which, result in results.items()
    ]


@dataclass
class _Case:
    """An optimizer with weights and gradients of its own, made when it is first used."""

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    count: int
    bench: Bench
    optimizer: list[torch.optim.Optimizer] = field(default_factory=list)

    def build(self) -> None:
        if self.optimizer:
            return
        generator = torch.Generator(self.bench.device).manual_seed(0)
        weights = []
        for shape in weight_shapes(self.count):
            weight, gradient = torch.randn(2, *shape, generator=generator, device=self.bench.device)
            weights.append(weight.clone().requires_grad_())
            weights[-1].grad = gradient.clone()
        self.optimizer.append(self.make(weights))

    def step(self) -> None:
        self.optimizer[0].step()


def weight_shapes(count: int) -> list[tuple[int, ...]]:
    """Return shapes of ``count`` weights together: square matrices, and a vector of what is left."""
    side = 1_024 if count >= 32_000_000 else 512
    matrices, rest = divmod(count, side * side)
    shapes: list[tuple[int, ...]] = [(side, side)] * matrices
    return [*shapes, (rest,)] if rest else shapes

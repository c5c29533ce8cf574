"""One step of each registered optimizer beside its counterpart in torch.optim.

Weights and gradients are float32, as in training, in square matrices like those of a Transformer. `torch` is the
counterpart with its default loop over tensors, `torch fused` the one that torch writes as a single kernel, where it
has one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.measure import BENCHMARKS, Bench, Candidate, Row
from lfs_cli.config import BenchConfig
from lfs_cli.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class Counterpart:
    """What torch offers under the name of one of ours, so that both do the same.

    Args:
        optimizer: Class in torch.optim.
        options: Settings that both sides get.
        ours: Settings of ours that have no name in torch.
        difference: What a reader of the rows must know about the two.
        has_matrices_only: Whether it refuses a vector. It gets one as a matrix of one row, and so does ours.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    difference: str = ""
    has_matrices_only: bool = False


COUNTERPARTS = {
    "adafactor": Counterpart(
        torch.optim.Adafactor,
        {"lr": 1e-3},
        ours={"relative": True},  # as torch's always is
        difference="both step in proportion to the weight",
    ),
    "adamw": Counterpart(torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}),
    "muon": Counterpart(
        torch.optim.Muon,
        {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0},
        difference="torch's iterates in bfloat16 on any device, ours on a GPU only",
        has_matrices_only=True,
    ),
    "sgd": Counterpart(torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
}
"""By our names. An optimizer without an entry runs with its defaults and is compared with torch's AdamW."""

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
    counterpart, candidates = COUNTERPARTS[theirs], builders(name, bench.device.type)
    few, shapes = (weight_shapes(n, has_matrices_only=counterpart.has_matrices_only) for n in (1_000, count))
    for build in candidates.values():  # torch loads parts of itself at its first step, which must not count as memory
        warm = _Case(build, few, bench)
        warm.build()
        warm.step()
    cases = {which: _Case(build, shapes, bench) for which, build in candidates.items()}
    results = bench.measure(
        f"optimizer {name}, {count:,} weights",
        [
            Candidate(which, case.step, prepare=case.build, needs_bytes=4 * _FLOATS_PER_WEIGHT * count)
            for which, case in cases.items()
        ],
    )
    difference = counterpart.difference if theirs == name else f"torch has no {name}"
    if difference and results["lfs"].status == "ok":
        note = f"{name} beside torch.optim.{counterpart.optimizer.__name__}: {difference}"
        results["lfs"] = replace(results["lfs"], note=note)
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


def builders(name: str, device_type: str) -> dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]:
    """Return what takes part beside our optimizer called ``name``, and it, as functions of the weights."""
    counterpart = COUNTERPARTS.get(name, COUNTERPARTS["adamw"])
    ours = counterpart.options | counterpart.ours if name in COUNTERPARTS else {}
    theirs = partial(counterpart.optimizer, **counterpart.options)
    found: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]
    found = {"torch": theirs, "lfs": partial(OPTIMIZERS.get(name), **ours)}
    if device_type in ("cuda", "cpu") and "fused" in signature(counterpart.optimizer).parameters:
        found["torch fused"] = partial(theirs, fused=True)
    return found


@dataclass
class _Case:
    """An optimizer with weights and gradients of its own, made when it is first used."""

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    shapes: list[tuple[int, ...]]
    bench: Bench
    optimizer: list[torch.optim.Optimizer] = field(default_factory=list)

    def build(self) -> None:
        if self.optimizer:
            return
        generator = torch.Generator(self.bench.device).manual_seed(0)
        weights = []
        for shape in self.shapes:
            weight, gradient = torch.randn(2, *shape, generator=generator, device=self.bench.device)
            weights.append(weight.clone().requires_grad_())
            weights[-1].grad = gradient.clone()
        self.optimizer.append(self.make(weights))

    def step(self) -> None:
        self.optimizer[0].step()


def weight_shapes(count: int, *, has_matrices_only: bool = False) -> list[tuple[int, ...]]:
    """Return shapes of ``count`` weights together: square matrices, and a vector or row of what is left."""
    side = 1_024 if count >= 32_000_000 else 512
    matrices, rest = divmod(count, side * side)
    shapes: list[tuple[int, ...]] = [(side, side)] * matrices
    last = (1, rest) if has_matrices_only else (rest,)
    return [*shapes, last] if rest else shapes

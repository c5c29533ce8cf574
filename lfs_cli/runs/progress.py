"""What a run knows of itself and keeps in each checkpoint, and which batch a step gets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any

from lfs_cli.training.budget import lost_seconds


@dataclass
class Progress:
    """How far a run is. Everything in it is JSON.

    Args:
        step: Steps done.
        loss: Mean nats per token of the last batch.
        seconds: Seconds of the training steps.
        warm_steps: Steps but the first of each start, in which kernels are compiled; on a GPU but the first two.
        warm_seconds: Their seconds.
        cold_steps: Those first steps.
        cold_seconds: Their seconds.
        recent: Seconds of each of the last warm steps.
        evaluated: Step of the last evaluation.
        best: The record of the evaluation with the lowest loss.
        sample: What the model wrote last.
        skipped: Batches that a rollback left out, by their number, in order.
        passed: Updates in a row that were not applied.
        losses: What `training.anomaly.Watch` remembers of the losses.
        norms: And of the gradient norms.
        microbatch: Under `rows`, the sequences that go through the model at once, and under `asked` what the config
            said then; empty where that says it all (`microbatch.py`).
    """

    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    warm_steps: int = 0
    warm_seconds: float = 0.0
    cold_steps: int = 0
    cold_seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    evaluated: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    sample: str = ""
    skipped: list[int] = field(default_factory=list)
    passed: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    microbatch: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return a copy that later steps do not change."""
        return asdict(self)

    def go_back(self, record: dict[str, Any]) -> None:
        """Become what `record` returned, in place.

        Raises:
            KeyError: When it lacks a field.
            TypeError: When one is of another kind.
        """
        later: dict[str, Any] = {"microbatch": {}, "cold_steps": 0, "cold_seconds": 0.0}  # than the first checkpoints
        record = later | record
        _check(record)
        for item in fields(self):
            value = record[item.name]
            mine = getattr(self, item.name)
            if isinstance(mine, list):
                mine[:] = value  # others hold on to it
            else:
                setattr(self, item.name, value)

    def lost(self) -> float:
        """Return the seconds of compiling, which the schedule of a run on the clock leaves out."""
        return lost_seconds(self.cold_steps, self.cold_seconds, self.recent)

    def is_best(self) -> bool:
        """Whether the lowest validation loss so far was measured after the last step."""
        return self.best.get("step") == self.step


def _check(record: dict[str, Any]) -> None:
    """Raise TypeError when a value of a progress that was written down is of another kind than those there can be."""
    wider = {float: int | float, type(None): int | float | None}
    for name, value in Progress().record().items():
        if not isinstance(record[name], wider.get(type(value), type(value))):
            raise TypeError(f"`{name}` is `{str(record[name])[:40]}`")
    lists = [value for value in record.values() if isinstance(value, list)]
    numbers = [record["best"].get("step", 0), record["best"].get("loss", 0.0), *chain.from_iterable(lists)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("what it remembers of the last steps is not in numbers")


def batch_of(step: int, skipped: Sequence[int]) -> int:
    """Return the number of the batch that ``step`` trains on: they are taken in order, but for those left out.

    >>> [batch_of(step, [1, 2]) for step in (1, 2, 3)]
    [0, 3, 4]

    Args:
        step: From 1.
        skipped: Numbers of batches that are left out, from 0 and in order.
    """
    number = step - 1
    for left_out in skipped:
        if left_out <= number:
            number += 1
    return number

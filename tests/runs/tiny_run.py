"""A small experiment that trains in a tenth of a second, and somebody who watches it."""

from collections.abc import Callable
from typing import Any

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.train import TrainResult

TINY = {
    "name": "tiny",
    "data.dataset": "sample",
    "data.sample_bytes": 60_000,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "optimizer.0.lr": 0.01,
    "steps": 8,
    "batch_size": 4,
    "eval_every": 2,
    "eval_batches": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
    "sample_prompt": "Once",
    "sample_tokens": 4,
    "device": "cpu",
}

Train = Callable[..., TrainResult]


class Watcher(Observer):
    """Keeps what it is told, and does something after a step."""

    def __init__(self, after: dict[int, Callable[[], None]] | None = None) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []
        self._after = after or {}

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, record: Any) -> None:
        self._after.get(record.step, lambda: None)()


def tiny(**changes: Any) -> TrainConfig:
    """Return the small experiment with changes; `__` stands for a dot."""
    return load_config(TrainConfig, options=TINY | {name.replace("__", "."): value for name, value in changes.items()})


def folder_of(result: TrainResult) -> RunFolder:
    """Return the folder of a run that has ended."""
    return RunFolder(result.directory)

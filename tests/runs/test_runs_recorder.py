"""The records of a run as it goes."""

from pathlib import Path

import pytest
import torch

from lfs_cli.config import TrainConfig
from lfs_cli.runs import recorder as module
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress
from lfs_cli.training.step import StepRecord


class Seen(Observer):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize(("device", "cold"), [("cpu", 1), ("cuda", 2)])
def test_steps_beside_which_the_host_compiled_do_not_count_as_fast(
    device: str, cold: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the second step may be done when the first is recorded: then its time is next to nothing."""
    monkeypatch.setattr(module, "peak_flops", lambda _: None)
    monkeypatch.setattr(module, "memory_bytes", lambda _: 0)
    clock = iter([0.0, 20.0, 20.001, 20.1, 20.2])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    seen, progress = Seen(), Progress()
    recorder = module.Recorder(TrainConfig(), RunFolder.create(tmp_path, "run"), progress, seen, torch.device(device))
    for step in range(1, 5):
        recorder.take(step, 1e-3, torch.tensor([2.0, 1.0]))
    assert (progress.cold_steps, progress.warm_steps) == (cold, 4 - cold)
    fast = TrainConfig().batch_tokens / 0.08
    assert (max(record.tokens_per_second for record in seen.records) < fast) == (device == "cuda")

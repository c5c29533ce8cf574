"""What a step takes here is measured on little, and scaled to the step."""

from types import SimpleNamespace

import pytest
import torch

from lfs_cli.config import ModelConfig, TrainConfig
from lfs_cli.training import pace
from lfs_cli.training.cost import flops_per_token

CPU = torch.device("cpu")
SMALL = {"vocab_size": 300, "context_length": 16, "width": 16, "heads": 2}


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_passes_and_layers_are_added_up(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says: 2 s a pass and 3 s a layer and sequence in it, 5 s an update and 7 s a layer in that."""
    monkeypatch.setattr(pace, "product_rate", lambda device: 1e15)
    monkeypatch.setattr(pace, "_times", lambda config, n, rows, *_: (2 + 3 * n * rows, 5 + 7 * n))
    config = TrainConfig(model=ModelConfig(**SMALL, layers=layers), batch_size=12, microbatch=4)
    found = pace.measured_step_seconds(config, CPU, torch.float32, None)
    assert found == 3 * (2 + 3 * layers * 4) + 5 + 7 * layers


@pytest.mark.parametrize("why", ["time", "memory"])
def test_what_is_too_large_to_try_is_counted(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "product_rate", lambda device: 1e9 if why == "memory" else 10.0)
    monkeypatch.setattr(pace, "_times", lambda *_: pytest.fail("it was tried"))
    config = TrainConfig(model=ModelConfig(**SMALL), batch_size=4)
    rate = pace.EXPECTED_SHARE * pace.product_rate(CPU)
    found = pace.measured_step_seconds(config, CPU, torch.float32, 1000 if why == "memory" else 2**40)
    assert found == pytest.approx(4 * 16 * flops_per_token(config.model) / rate)


def test_a_slow_device_is_given_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(pace, "product_rate", lambda device: 1e8)
    monkeypatch.setattr(pace, "_times", lambda config, n, rows, *_: tried.append(rows) or (1.0 * rows, 0.0))
    config = TrainConfig(model=ModelConfig(**SMALL), batch_size=64)
    assert pace.measured_step_seconds(config, CPU, torch.float32, None) == 64
    assert 1 <= tried[0] < 64


def test_passes_and_updates_are_timed_but_for_the_first_and_the_odd_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of its own, on which a pass takes 2 s and an update 5 s, save the first and the third of each."""
    now, counts, passed, clip = [0.0], {2: 0, 5: 0}, pace.run_pass, pace.clip_scale

    def takes(seconds: int) -> None:
        counts[seconds] += 1
        now[0] += 1000.0 if counts[seconds] in (1, 3) else seconds

    monkeypatch.setattr(pace, "product_rate", lambda device: 1e15)
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(pace, "run_pass", lambda *arguments: (passed(*arguments), takes(2)))
    monkeypatch.setattr(pace, "clip_scale", lambda *arguments: (clip(*arguments), takes(5))[0])
    config = TrainConfig(model=ModelConfig(**SMALL, layers=1), batch_size=256, microbatch=4)
    assert pace.measured_step_seconds(config, CPU, torch.float32, None) == 64 * 2 + 5

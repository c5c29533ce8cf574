"""The comparison with nanoGPT, on a stand-in for its clone: a model of one layer with the same face."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeRecorder
from torch import nn

from lfs_cli.config import ReportConfig, TrainConfig, load_config
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.report import report
from lfs_cli.runs.train import train
from lfs_cli.training.graphs import GraphedPass
from lfs_cli.training.step import LossFunction
from tests.peers import nanogpt

STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, tokens, targets=None):
        logits = self.table(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""

CONFIG = {
    "data.dataset": "sample",
    "data.sample_bytes": 60_000,
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "steps": 20,
    "batch_size": 8,
    "microbatch": 4,
    "eval_every": 5,
    "eval_batches": 2,
    "sample_tokens": 0,
    "device": "cpu",
}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LFS_DATA", str(tmp_path / "data"))
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "model.py").write_text(STAND_IN)
    return tmp_path / "clone"


def test_a_race_leaves_a_run_that_is_compared_with_others(clone: Path) -> None:
    config = load_config(TrainConfig, options=CONFIG)
    folder = nanogpt.race(config, clone, nanogpt.Shape(300, 16), minutes=0.03, lr=0.1)
    ours = train(config)
    found = report(ReportConfig(runs=(str(folder), str(ours.directory))))
    peer = next(row for row in found.rows if row["optimizer"] == "torch.adamw")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {kind: [record["loss"] for record in records if record["kind"] == kind] for kind in ("step", "evaluation")}
    assert losses["step"][-1] < losses["step"][0]
    assert peer["best_val_loss"] == min(losses["evaluation"])
    assert peer["minutes"] > 0.02
    assert {row["axis"] for row in found.costs} == {"step", "tokens", "seconds"}


def test_steps_are_timed_in_turn(clone: Path) -> None:
    config = load_config(TrainConfig, options=CONFIG)
    ours, theirs = nanogpt.time_steps(config, clone, nanogpt.Shape(300, 16), batch=2, seconds=0.2)
    assert (ours["name"], theirs["name"], theirs["speed_ratio"]) == ("lfs", "nanogpt", 1.0)
    assert ours["speed_ratio"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])
    assert ours["tokens_per_second"] == pytest.approx(2 * 16 / ours["median_ms"] * 1e3)
    assert DataFolder.here().all_runs() == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process does not tell its memory")
def test_the_memory_of_a_step_is_that_beside_weights_and_optimizer(clone: Path) -> None:
    config = load_config(TrainConfig, options=CONFIG | {"model.vocab_size": 4000})
    _, theirs = nanogpt.time_steps(config, clone, nanogpt.Shape(4000, 16), batch=2, seconds=0.2)
    weights = 4 * 4000 * 4000  # with AdamW's two numbers of each and gradients that would be four times as much
    assert weights <= theirs["peak_bytes"] < 4 * weights


def test_the_memory_of_a_step_is_that_of_its_recording(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[FakeRecorder] = []

    class Recordings:
        """Measures, in place of memory, how often was recorded."""

        def __init__(self, device: torch.device) -> None: ...

        def start(self) -> None:
            self.before = len(recorders[0].graphs)

        def peak_bytes(self) -> int:
            return len(recorders[0].graphs) - self.before

    def graphed(loss: LossFunction, model: nn.Module, recorder: None) -> GraphedPass:
        recorders.append(FakeRecorder(model))
        return GraphedPass(loss, model, recorders[0])

    monkeypatch.setattr(nanogpt, "PeakMemory", Recordings)
    monkeypatch.setattr(nanogpt, "choose_graphs", lambda *_: (True, ""))
    monkeypatch.setattr(nanogpt, "CudaRecorder", lambda _: None)
    monkeypatch.setattr(nanogpt, "GraphedPass", graphed)
    config = load_config(TrainConfig, options=CONFIG)
    ours, theirs = nanogpt.time_steps(config, clone, nanogpt.Shape(300, 16), batch=2, seconds=0.2)
    assert (ours["peak_bytes"], theirs["peak_bytes"]) == (1, 0)
    assert recorders[0].graphs[0].replays > 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("default", "error:a pass cannot be recorded")
def test_on_a_gpu_a_replayed_step_needs_the_memory_of_a_plain_one(clone: Path) -> None:
    peaks = []
    for has_graphs in (True, False):
        shape = {"model.vocab_size": 4000, "model.width": 64}
        options = {"device": "cuda", "compile": False, "cuda_graphs": has_graphs}
        config = load_config(TrainConfig, options=CONFIG | shape | options)
        ours, _ = nanogpt.time_steps(config, clone, nanogpt.Shape(4000, 16), batch=64, seconds=0.2)
        peaks.append(ours["peak_bytes"])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
    assert peaks[1] > 2 * 4 * 4000 * 64  # the gradients of embedding and head

"""A run whose passes are CUDA graphs ends as any other, and is refused where it could not have them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeRecorder
from tiny_run import Train, Watcher, folder_of, tiny
from torch import nn

from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.runs import setup, train
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.plan import make_plan
from lfs_cli.runs.verify import compare_runs, verify_resume
from lfs_cli.training.graphs import WARM_UPS, GraphedPass
from lfs_cli.training.step import LossFunction


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    """Let runs on the CPU have graphs; collects what they are recorded by."""
    made: list[FakeRecorder] = []

    def graphed(loss: LossFunction, model: nn.Module, _recorder: None) -> GraphedPass:
        made.append(FakeRecorder(model))
        return GraphedPass(loss, model, made[-1])

    monkeypatch.setattr(train, "choose_graphs", lambda config, device, rows: (True, "as asked"))
    monkeypatch.setattr(train, "CudaRecorder", lambda device: None)
    monkeypatch.setattr(train, "GraphedPass", graphed)
    return made


def differing(one: RunFolder, other: RunFolder) -> list[str]:
    return [row["what"] for row in compare_runs(one, other) if row["different"]]


def test_a_run_with_graphs_ends_as_one_without(
    train_tiny: Train, whole: RunFolder, recorders: list[FakeRecorder]
) -> None:
    """Evaluations, samples and checkpoints in between neither move the weights nor see the graphs."""
    run = folder_of(train_tiny(tiny()))
    assert not differing(whole, run)
    assert [graph.replays for graph in recorders[0].graphs] == [8 - WARM_UPS]


def test_a_resumed_run_with_graphs_ends_like_one_without_a_stop(
    data: DataFolder, recorders: list[FakeRecorder]
) -> None:
    _, error = verify_resume(tiny(microbatch=2), data=data)
    assert error is None
    assert sum(graph.replays for recorder in recorders for graph in recorder.graphs)


def test_an_evaluation_without_memory_has_that_of_the_graphs(
    train_tiny: Train, recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = setup.next_token_loss, []

    def loss(hidden: torch.Tensor, *rest: torch.Tensor, **options: float) -> torch.Tensor:
        if not torch.is_grad_enabled() and recorders[0].graphs and not failed:
            failed.append(recorders[0].asides)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(hidden, *rest, **options)

    monkeypatch.setattr(setup, "next_token_loss", loss)
    watcher = Watcher()
    train_tiny(tiny(), observer=watcher)
    assert failed == [WARM_UPS]
    assert recorders[0].asides == WARM_UPS + 2 * WARM_UPS  # passes are half as large from here on
    assert any("out of memory" in warning for warning in watcher.warnings)


@pytest.mark.parametrize("what", ["train", "plan"])
def test_graphs_on_a_cpu_are_refused_before_anything_is_made(what: str, train_tiny: Train, tmp_path: Path) -> None:
    begin: Callable[..., object] = train_tiny if what == "train" else make_plan
    with pytest.raises(DeviceError, match="CUDA graphs are for CUDA GPUs, and this is cpu") as caught:
        begin(tiny(cuda_graphs=True))
    assert caught.value.hint == "set `cuda_graphs` to `auto` or `false`"
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_a_gpu_by_name_refuses_what_it_could_not_do() -> None:
    with pytest.raises(ConfigError, match="packed documents"):
        make_plan(tiny(device="auto", cuda_graphs=True, data__documents="packed"), "H100")


def test_a_run_on_a_cpu_does_not_speak_of_graphs(train_tiny: Train) -> None:
    watcher = Watcher()
    train_tiny(tiny(), observer=watcher)
    assert not any("graph" in stage for stage in watcher.stages)

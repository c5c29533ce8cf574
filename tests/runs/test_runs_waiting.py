"""The loop of `lfs train` does not wait for the GPU, and a text read ahead of it is the one that lies on it.

Torch can refuse what makes the host wait for a GPU: `item`, a copy that is not asynchronous, `nonzero` and their like.
It does so here in whole turns of the loop, from the record of one step to that of another: budget, rates, batch, casts,
passes, update and records. Before them kernels are compiled, chosen and recorded, and after them the model is evaluated
and saved. Waiting for an event is let pass: so are the numbers of the step before read. Without a GPU there is nothing
to refuse, and the same runs show that the refusal would hold for these turns.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tiny_run import TINY, Train, Watcher, folder_of

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.corpus.batches import Batches, BatchesAhead, BatchesOnDevice
from lfs_cli.runs import setup
from lfs_cli.runs import train as training
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.verify import compare_runs

STEPS, FIRST, LAST = 30, 5, 25
RUN = TINY | {
    "model.context_length": 128,
    "model.width": 128,  # 64 channels a head, which the fastest kernels take
    "model.layers": 4,
    "microbatch": 2,
    "dtype": "bfloat16",
    "steps": STEPS,
    "eval_every": 1000,
    "checkpoint_every": 1000,
}
SPEEDRUN = {"model.window": 48, "model.window_pattern": "SL", "model.z_loss": 1e-4, "model.value_embeddings": 1}
LOOPS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "as written": (None, {"compile": False, "cuda_graphs": False}),
    "compiled, with CUDA graphs": (None, {"compile": True}),
    "speedrun, with CUDA graphs": ("speedrun", SPEEDRUN),
    "speedrun on packed documents": ("speedrun", SPEEDRUN | {"data.documents": "packed"}),
}
ON_CPU = {"device": "cpu", "compile": False, "model.context_length": 64, "model.width": 32}
ON_GPU = {"device": "cuda"}


def loop(name: str, **changes: Any) -> TrainConfig:
    file, settings = LOOPS[name]
    return load_config(TrainConfig, file, options=RUN | settings | changes)


@contextmanager
def waiting_refused() -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation by its name")

    with pytest.MonkeyPatch.context() as patch:
        for owner in (torch.cuda, torch.cuda.Stream):  # torch's mode lets these pass
            patch.setattr(owner, "synchronize", refuse)
        with warnings.catch_warnings(action="ignore"):  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def train_refusing(train_tiny: Train, config: TrainConfig) -> None:
    """Train, and refuse to wait for the GPU in the turns of the loop between the records of steps FIRST and LAST."""
    with ExitStack() as refusal:
        hours = {FIRST: lambda: refusal.enter_context(waiting_refused()), LAST: refusal.close}
        assert train_tiny(config, observer=Watcher(hours)).steps == STEPS


@pytest.mark.parametrize("name", LOOPS)
def test_waiting_would_be_refused_in_twenty_turns(
    name: str, train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, steps, step = [], [], training.train_step
    monkeypatch.setattr(training, "train_step", lambda *a, **k: steps.append(1) or step(*a, **k))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: modes.append((mode, len(steps))))
    train_refusing(train_tiny, loop(name, **ON_CPU))
    assert modes == [("error", FIRST), ("default", LAST)]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a compiler has its own
@pytest.mark.parametrize("name", LOOPS)
def test_no_turn_of_the_loop_waits_for_the_gpu(name: str, train_tiny: Train) -> None:
    train_refusing(train_tiny, loop(name, **ON_GPU))


@pytest.mark.gpu
def test_no_turn_waits_for_the_gpu_where_the_text_is_read_ahead(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "MOST_TEXT_BYTES", 0)
    train_refusing(train_tiny, loop("as written", **ON_GPU))


@pytest.mark.gpu
def test_a_loop_that_does_wait_is_refused(train_tiny: Train) -> None:
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        train_refusing(train_tiny, loop("as written", **ON_GPU, **{"anomaly.policy": "skip"}))


def loaded(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch, where: dict[str, Any], watcher: Watcher
) -> tuple[list[type[Batches]], RunFolder]:
    """Train with sums in a fixed order, and return the loaders of both texts and the run."""
    loaders, choose = [], setup._for_device

    def chosen(batches: Batches, device: torch.device) -> Batches:
        loaders.append(choose(batches, device))
        return loaders[-1]

    with monkeypatch.context() as patch:
        patch.setattr(setup, "_for_device", chosen)
        config = loop("as written", **where, deterministic=True, eval_every=10)
        run = folder_of(train_tiny(config, observer=watcher))
    return [type(loader) for loader in loaders], run


def test_a_text_read_ahead_gives_the_losses_of_one_on_the_device(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "_for_device", lambda batches, device: BatchesOnDevice(batches, device))
    there, whole = loaded(train_tiny, monkeypatch, ON_CPU, Watcher())
    monkeypatch.setattr(setup, "_for_device", lambda batches, device: BatchesAhead(batches, pins=False))
    ahead, run = loaded(train_tiny, monkeypatch, ON_CPU, Watcher())
    assert (there, ahead) == ([BatchesOnDevice] * 2, [BatchesAhead] * 2)
    assert not [row for row in compare_runs(whole, run) if row["different"]]


@pytest.mark.gpu
def test_a_text_read_ahead_gives_a_gpu_the_losses_of_one_that_lies_there(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the GPU lags, so that a batch waits for it in pinned memory while the next ones are read."""
    there, whole = loaded(train_tiny, monkeypatch, ON_GPU, Watcher())
    monkeypatch.setattr(setup, "MOST_TEXT_BYTES", 0)
    lag = Watcher({step: lambda: torch.cuda._sleep(50_000_000) for step in range(3, STEPS)})
    ahead, run = loaded(train_tiny, monkeypatch, ON_GPU, lag)
    assert (there, ahead) == ([BatchesOnDevice] * 2, [BatchesAhead] * 2)
    assert not [row for row in compare_runs(whole, run) if row["different"]]

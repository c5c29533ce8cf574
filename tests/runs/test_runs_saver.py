"""Checkpoints are written while training goes on: one at a time, of one moment, and errors come to light."""

import threading
from pathlib import Path

import pytest
import torch

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.errors import CheckpointError
from lfs_cli.model import Transformer, cross_entropy
from lfs_cli.optimizers import build_optimizers
from lfs_cli.runs import saver as saver_module
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.saver import Saver
from lfs_cli.training.checkpoint import read_checkpoint, write_snapshot


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=300, context_length=16, width=32, layers=1, heads=4))
    optimizers = build_optimizers(model, [OptimizerGroup(lr=0.01)])
    move(model, optimizers)
    return model, optimizers


def move(model, optimizers) -> None:
    tokens = torch.randint(300, (2, 16))
    cross_entropy(model(tokens), tokens.roll(-1)).backward()
    optimizers[0].step()
    optimizers[0].zero_grad()


@pytest.fixture
def saver(tmp_path: Path, parts) -> Saver:
    return Saver(RunFolder(tmp_path), *parts, identity={"mark": 1}, tokenizer=b"{}", keep=2)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes only once this is set."""
    opened = threading.Event()

    def slow(*args) -> None:
        assert opened.wait(20)
        write_snapshot(*args)

    monkeypatch.setattr(saver_module, "write_snapshot", slow)
    return opened


def test_training_goes_on_while_the_disk_is_busy(saver: Saver, parts, gate: threading.Event, tmp_path: Path) -> None:
    model, optimizers = parts
    before = [weight.clone() for weight in model.parameters()]
    with saver:
        saver.save(Progress(step=2))
        assert not (tmp_path / "checkpoints" / "step-000002").exists()
        saver.check()
        for _ in range(3):
            move(model, optimizers)
        gate.set()
    state = read_checkpoint(tmp_path / "checkpoints" / "step-000002", model, optimizers)
    assert (state["progress"]["step"], state["mark"]) == (2, 1)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_two_are_never_written_at_once(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, most = [], []

    def watched(*args) -> None:
        writing.append(1)
        most.append(len(writing))
        write_snapshot(*args)
        writing.pop()

    monkeypatch.setattr(saver_module, "write_snapshot", watched)
    with saver:
        for step in range(1, 6):
            saver.save(Progress(step=step))
    assert most == [1] * 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-000004", "step-000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000005\n"


def test_the_best_one_is_kept_besides(saver: Saver, tmp_path: Path) -> None:
    with saver:
        for step in range(1, 6):
            saver.save(Progress(step=step, best={"step": min(step, 2)}))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-000002", "step-000004", "step-000005"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-000002\n"


@pytest.mark.parametrize("where", ["check", "save", "wait", "exit"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError("a bug")])
def test_an_error_in_the_thread_comes_to_light(
    where: str, error: Exception, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args) -> None:
        raise error

    monkeypatch.setattr(saver_module, "point_to", fail)

    def save() -> None:
        with saver:
            saver.save(Progress(step=2))
            if where != "exit":
                saver._thread.join()
                {"check": saver.check, "wait": saver.wait, "save": lambda: saver.save(Progress(step=3))}[where]()

    is_full = isinstance(error, OSError)
    with pytest.raises(
        CheckpointError if is_full else ZeroDivisionError, match="No space left" if is_full else "a bug"
    ) as caught:
        save()
    assert not is_full or "free some space" in caught.value.hint
    saver.wait()  # it was raised once


def save_and_raise(saver: Saver, error: BaseException) -> None:
    with saver:
        saver.save(Progress(step=2))
        raise error


def test_an_interruption_does_not_wait_for_the_disk(saver: Saver, gate: threading.Event, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(saver, KeyboardInterrupt())
    assert not (tmp_path / "checkpoints" / "step-000002").exists()
    gate.set()
    saver.wait()


def test_another_error_waits_for_the_checkpoint_and_is_the_one_to_show(saver: Saver, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        save_and_raise(saver, KeyError())
    assert (tmp_path / "checkpoints" / "step-000002").exists()

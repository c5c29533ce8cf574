"""The loop under stress: signals, the clock, wrong numbers, full disks, damaged checkpoints."""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_run import Train, Watcher, folder_of, tiny

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.corpus.batches import Batches
from lfs_cli.corpus.shards import Tokens
from lfs_cli.errors import CheckpointError, ConfigError, DataError, LfsError
from lfs_cli.model import load_weights
from lfs_cli.runs import recorder
from lfs_cli.runs import setup as preparation
from lfs_cli.runs import train as training
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import batch_of
from lfs_cli.runs.verify import compare_runs


def records(run: RunFolder, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] in kinds]


def steps_of(run: RunFolder, *kinds: str) -> list[int]:
    return [record["step"] for record in records(run, *kinds)]


def assert_same(one: RunFolder, other: RunFolder) -> None:
    assert [row for row in compare_runs(one, other) if row["different"]] == []


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# Signals


@pytest.mark.parametrize("step", [1, 2, 7, 8])
def test_a_stopped_run_goes_on_to_the_same_end(step: int, train_tiny: Train, whole: RunFolder) -> None:
    part = train_tiny(tiny(), observer=Watcher({step: terminate}))
    assert (part.status, part.signal, part.steps) == ("stopped", signal.SIGTERM, step)
    assert folder_of(part).checkpoint(step).is_dir()
    assert json.loads(folder_of(part).result.read_text())["status"] == "stopped"
    end = train_tiny(tiny(), resume=folder_of(part))
    assert (end.status, end.steps) == ("finished", 8)
    assert end.best_val_loss == json.loads(whole.result.read_text())["best_val_loss"]
    assert_same(whole, folder_of(end))
    assert steps_of(folder_of(end), "step") == list(range(1, 9))
    assert steps_of(folder_of(end), "evaluation") == [2, 4, 6, 8]


@pytest.mark.parametrize("what", ["evaluation", "sample"])
def test_a_signal_while_looking_gives_that_up_and_makes_up_for_it(
    what: str, train_tiny: Train, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if what == "evaluation":
            sequential = Batches.sequential

            def interrupted(self: Batches, batches: int):
                terminate()
                return sequential(self, batches)

            patch.setattr(Batches, "sequential", interrupted)
        else:
            stream = training.Setup.writer

            def writer(self):
                terminate()
                return stream(self)

            patch.setattr(training.Setup, "writer", writer)
        part = train_tiny(tiny())
    assert (part.status, part.steps) == ("stopped", 2)
    assert records(folder_of(part), "evaluation") == []
    assert not folder_of(part).samples.exists()
    end = train_tiny(tiny(), resume=folder_of(part))
    assert_same(whole, folder_of(end))


def test_a_second_signal_ends_at_once_and_harms_nothing(train_tiny: Train, whole: RunFolder, tmp_path: Path) -> None:

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, SystemExit)):  # the latter where SIGINT was ignored, as with nohup
        train_tiny(tiny(), observer=Watcher({5: twice}))
    (run,) = map(RunFolder, (tmp_path / "runs").iterdir())
    assert run.checkpoint_steps()[-1] in (2, 4)  # the second one was perhaps still on its way to the disk
    assert_same(whole, folder_of(train_tiny(tiny(), resume=run)))


def test_signals_are_given_back(train_tiny: Train) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_tiny(tiny(steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_is_complete_stays_as_it_is(train_tiny: Train) -> None:
    run = folder_of(train_tiny(tiny()))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.result}
    assert train_tiny(tiny(), resume=run).status == "finished"
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path != run.result} == before


# The clock


def test_max_time_ends_the_run_with_the_schedule_at_its_end(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=0.05)  # a clock on which each step takes so many seconds
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    often = {"steps": 10_000_000, "eval_every": 10_000_000, "checkpoint_every": 10_000_000}
    result = train_tiny(tiny(**often, max_time="1s"))
    run = folder_of(result)
    rates = [record["lr"] for record in records(run, "step")]
    assert (result.status, result.steps, result.seconds) == ("finished", 20, pytest.approx(1.0))
    assert rates[-1] == pytest.approx(0.01 * 0.1)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert steps_of(run, "evaluation") == [20] == run.checkpoint_steps()

    assert train_tiny(tiny(**often, max_time="1s"), resume=run).steps == 20  # it is complete
    longer = train_tiny(tiny(**often, max_time="2s"), resume=run)  # what was spent stays spent
    assert (longer.steps, longer.seconds) == (40, pytest.approx(2.0))
    assert steps_of(run, "step") == list(range(1, 41))
    assert records(run, "step")[-1]["lr"] == pytest.approx(0.01 * 0.1)


def test_max_epochs_ends_the_run_with_the_schedule_at_its_end(train_tiny: Train) -> None:
    class Watching(Observer):
        bounds: ClassVar[list[int]] = []

        def bounded(self, steps: int) -> None:
            self.bounds.append(steps)

    often = {"steps": 10_000, "eval_every": 10_000, "checkpoint_every": 10_000, "schedule__name": "linear"}
    state = folder_of(train_tiny(tiny(steps=1))).checkpoint(1) / "state.json"
    text_tokens = json.loads(state.read_text())["text"]["tokens"]
    config = tiny(**often, max_epochs=6.5 * 64 / text_tokens)
    result = train_tiny(config, observer=Watching())
    run = folder_of(result)
    assert (result.status, result.steps, Watching.bounds) == ("finished", 6, [6])
    rates = [record["lr"] for record in records(run, "step")]
    assert rates[-1] == min(rates) < 0.5 * max(rates)
    assert load_config(TrainConfig, run.config) == config  # so that more may be read later
    assert train_tiny(tiny(**often, max_epochs=9 * 64 / text_tokens), resume=run).steps == 9
    assert train_tiny(tiny(steps=3, max_epochs=1e308)).steps == 3
    assert train_tiny(tiny(steps=3, max_epochs=1e-300)).steps == 1


@pytest.mark.parametrize("steps", [1, 26, 100, 12_345])
@pytest.mark.parametrize("text_tokens", [7, 64, 99_999, 18_376_784])
def test_the_readings_that_a_number_of_steps_needs_allow_it(steps: int, text_tokens: int) -> None:
    config = tiny(steps=10**9)
    enough = config.epochs_for(steps, text_tokens)
    allowed = config.model_copy(update={"max_epochs": enough}).steps_for(text_tokens)
    assert steps <= allowed <= steps + 1 + text_tokens / config.batch_tokens / 1_000


def test_a_schedule_that_refuses_the_steps_of_a_short_text_leaves_no_run(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_schedule: Any, steps: int) -> Any:
        if steps < 8:
            raise ConfigError("too few")
        return lambda _: 1.0

    monkeypatch.setattr(training, "build_schedule", build)
    with pytest.raises(ConfigError, match="too few"):
        train_tiny(tiny(max_epochs=1e-9))
    assert not list((tmp_path / "runs").glob("*"))


def test_compiling_leaves_the_warm_up_of_the_clock_alone(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks() -> Iterator[float]:
        yield from (0.0, 0.0)
        yield from count(10.0, 0.05)  # the first step takes ten seconds

    clock = ticks()
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    often = {"steps": 10_000_000, "eval_every": 10_000_000, "checkpoint_every": 10_000_000}
    schedule = {"schedule__warmup": 0.5, "schedule__name": "linear", "schedule__final": 0.0}
    run = folder_of(train_tiny(tiny(**often, **schedule, max_time="12s")))
    first, *rates = [record["lr"] for record in records(run, "step")]
    assert len(rates) == 40
    assert max(rates) == pytest.approx(0.01, rel=0.1)
    assert rates.index(max(rates)) == pytest.approx(20, abs=2)
    assert first < rates[3] < 0.003
    step = records(run, "step")[0]
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])


def test_a_rollback_on_the_clock_does_not_set_the_schedule_back(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(float("nan"), 2)  # back to the beginning, where nothing was compiled yet
    changes = {"anomaly__policy": "rollback", "checkpoint_every": 100, "eval_every": 100}
    run = folder_of(train_tiny(tiny(**changes)))
    state = json.loads((run.checkpoint(8) / "state.json").read_text())["progress"]
    assert state["cold_steps"] == 1
    assert 0 < state["cold_seconds"] < state["seconds"]


# Wrong numbers


@pytest.fixture
def poison(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Multiply the loss of some batches by a factor, by their numbers."""
    real = preparation.next_token_loss
    factors: dict[tuple[int, ...], float] = {}

    def put(factor: float, *numbers: int, **shape: Any) -> None:
        tokens = Tokens.open(data.tokens("sample-300"), "train")
        batches = Batches(tokens, batch_size=4, context_length=16, seed=0, order="shuffled")
        factors.update({tuple(batches.at(number)[1].flatten().tolist()): factor for number in numbers})

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        return real(hidden, weight, targets, **options) * factors.get(tuple(targets.flatten().tolist()), 1.0)

    monkeypatch.setattr(preparation, "next_token_loss", loss)
    return put


def test_a_run_that_diverges_is_a_result(poison: Callable[..., None], train_tiny: Train, data: DataFolder) -> None:
    poison(float("nan"), 4)
    result = train_tiny(tiny())
    run = folder_of(result)
    assert (result.status, result.steps) == ("diverged", 4)
    assert result.problem == "loss is not a number at step 5; first to go wrong: the logits or the loss"
    assert result.hint == "last good checkpoint: step 4; try `--set optimizer.0.lr=0.0025`"
    assert json.loads(run.result.read_text())["status"] == "diverged"
    row = next(line for line in data.table.read_text().splitlines() if run.name in line)
    assert row.endswith("| diverged |")
    assert all(weight.isfinite().all() for weight in load_weights(run.checkpoint(4) / "model.safetensors").values())
    assert steps_of(run, "step") == [1, 2, 3, 4]


def test_the_highest_of_several_rates_is_the_one_to_lower(
    poison: Callable[..., None], train_tiny: Train, data: DataFolder
) -> None:
    poison(float("nan"), 4)
    groups = ({"match": "*norm*", "name": "sgd", "lr": 0.01}, {"match": "*", "name": "sgd", "lr": 0.04})
    result = train_tiny(tiny(optimizer=groups))
    assert result.hint.endswith("try `--set optimizer.1.lr=0.01`")


def test_the_layer_is_named(train_tiny: Train) -> None:
    result = train_tiny(tiny(optimizer__0__name="sgd", optimizer__0__lr=1e38, clip=0, schedule__warmup=0))
    assert result.status == "diverged"
    assert "; first to go wrong: the output of `" in result.problem


def test_where_the_update_came_first_the_last_checkpoint_tells(
    poison: Callable[..., None], train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(float("inf"), 5)
    monkeypatch.setattr(training, "partial", lambda *args: None)  # as on a GPU, which is not asked first
    result = train_tiny(tiny())
    assert result.problem == (
        "loss is not a number at step 6; first to go wrong: the logits or the loss (with the weights of step 4)"
    )


def test_a_skipped_update_is_not_applied(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(float("nan"), 4)
    settings = {"anomaly__policy": "skip", "checkpoint_every": 1}
    result = train_tiny(tiny(**settings), observer=(watcher := Watcher()))
    run = folder_of(result)
    assert (result.status, result.steps) == ("finished", 8)
    before, after = (load_weights(run.checkpoint(step) / "model.safetensors") for step in (4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert steps_of(run, "step") == [1, 2, 3, 4, 6, 7, 8]
    assert records(run, "anomaly") == [
        {"kind": "anomaly", "step": 5, "what": "loss is not a number", "action": "skip", "batch": 4, "at": 5}
    ]
    assert watcher.warnings == ["loss is not a number at step 5: its update is not applied"]


def test_skipping_has_an_end(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(float("nan"), 3, 4, 5)
    assert train_tiny(tiny(anomaly__policy="skip", anomaly__repeats=3)).status == "finished"
    result = train_tiny(tiny(anomaly__policy="skip", anomaly__repeats=2))
    assert (result.status, result.steps) == ("diverged", 6)
    assert result.problem.startswith("loss is not a number, 3 times in a row, at step 6")


def test_a_rollback_leaves_the_batch_out(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(float("nan"), 4)
    result = train_tiny(tiny(anomaly__policy="rollback"), observer=(watcher := Watcher()))
    run = folder_of(result)
    assert (result.status, result.steps) == ("finished", 8)
    assert steps_of(run, "step") == list(range(1, 9))
    assert [(r["step"], r["at"], r["batch"]) for r in records(run, "anomaly")] == [(4, 5, 4)]
    assert watcher.warnings == [
        "loss is not a number at step 5: back to the checkpoint of step 4, and on without batch 4"
    ]
    state = json.loads((run.checkpoint(8) / "state.json").read_text())
    assert state["progress"]["skipped"] == [4]


def test_time_that_a_rollback_wasted_has_passed(
    poison: Callable[..., None], train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()  # a clock on which each step takes a second
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    poison(float("nan"), 5)
    result = train_tiny(tiny(anomaly__policy="rollback"))
    assert (result.steps, result.seconds) == (8, 9)  # step 5 was done twice


@pytest.mark.parametrize("bad", [0, 1, 7])
def test_a_rollback_works_before_the_first_checkpoint_and_at_the_last_step(
    bad: int, poison: Callable[..., None], train_tiny: Train
) -> None:
    poison(float("nan"), bad)
    result = train_tiny(tiny(anomaly__policy="rollback", checkpoint_every=3, eval_every=100))
    assert (result.status, result.steps) == ("finished", 8)
    assert steps_of(folder_of(result), "step") == list(range(1, 9))


def test_rolling_back_has_an_end(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(float("nan"), 4, 5, 6)
    assert train_tiny(tiny(anomaly__policy="rollback", anomaly__repeats=3)).status == "finished"
    result = train_tiny(tiny(anomaly__policy="rollback", anomaly__repeats=2))
    assert (result.status, result.steps) == ("diverged", 4)
    assert result.problem.startswith("loss is not a number at step 5")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("step", [3, 4, 5, 6, 7])
def test_a_run_with_anomalies_is_resumed_exactly(
    step: int, policy: str, poison: Callable[..., None], train_tiny: Train
) -> None:
    poison(float("nan"), 3, 5)
    config = tiny(anomaly__policy=policy, anomaly__window=8)
    whole = train_tiny(config)
    part = train_tiny(config, observer=Watcher({step: terminate}))
    end = train_tiny(config, resume=folder_of(part)) if part.status == "stopped" else part
    assert_same(folder_of(whole), folder_of(end))
    found = [[(r["at"], r["batch"]) for r in records(folder_of(each), "anomaly")] for each in (whole, end)]
    assert found[0] == found[1] != []


class Killed(BaseException):
    pass


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_once(
    train_tiny: Train, tmp_path: Path, whole: RunFolder
) -> None:
    class Killer(Watcher):
        def sample(self, step: int, text: str) -> None:
            if step == 4:
                raise Killed

    with pytest.raises(Killed):
        train_tiny(tiny(), observer=Killer())
    (run,) = map(RunFolder, (tmp_path / "runs").iterdir())
    assert run.checkpoint_steps() == [2]
    assert "## Step 4" in run.samples.read_text()
    assert_same(whole, folder_of(train_tiny(tiny(), resume=run)))


def test_a_rollback_is_remembered_by_a_run_that_is_killed_after_it(
    poison: Callable[..., None], train_tiny: Train, tmp_path: Path
) -> None:
    poison(float("nan"), 4)
    config = tiny(anomaly__policy="rollback")
    undisturbed = folder_of(train_tiny(config))

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        train_tiny(config, observer=Watcher({5: die}))  # the first step after the rollback
    (run,) = {RunFolder(path) for path in (tmp_path / "runs").iterdir()} - {undisturbed}
    end = train_tiny(config, resume=run, observer=(watcher := Watcher()))
    assert watcher.warnings == []  # the batch is left out from the start
    assert_same(undisturbed, folder_of(end))


def test_spikes_are_found_where_they_are_looked_for(poison: Callable[..., None], train_tiny: Train) -> None:
    poison(5.0, 29)
    settings = {"steps": 32, "eval_every": 100, "checkpoint_every": 100, "anomaly__grace": 20}
    assert train_tiny(tiny(**settings)).status == "finished"  # `stop` minds only what is not finite
    stopped = train_tiny(tiny(**settings, anomaly__spike=10.0))
    assert stopped.status == "diverged"
    assert " spreads above its recent median " in stopped.problem
    skipped = folder_of(train_tiny(tiny(**settings, anomaly__policy="skip")))
    assert steps_of(skipped, "anomaly") == [30]
    back = folder_of(train_tiny(tiny(**settings, anomaly__policy="rollback")))
    assert [record["batch"] for record in records(back, "anomaly")] == [29]


def test_batches_are_taken_in_order_but_for_those_left_out() -> None:
    assert [batch_of(step, []) for step in (1, 2, 3)] == [0, 1, 2]
    assert [batch_of(step, [0, 1, 4]) for step in (1, 2, 3, 4)] == [2, 3, 5, 6]


# Disks and files


def full_disk(path: str, reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the system refuses to open files of that name for writing."""
    real = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **options: Any):
        if path in str(self) and mode != "r" and mode != "rb":
            raise OSError(reason, os.strerror(reason), str(self))
        return real(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)


def wait_for_the_disk() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint of "):
            thread.join()


REASONS = [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EIO, errno.ESTALE]


FILES = ["metrics.jsonl", "samples.md", "state.json", "best", "latest", "SHA256SUMS"]
CASES = [
    pytest.param(path, reason, id=f"{path}-{os.strerror(reason)}")
    for number, (path, reason) in enumerate(product(FILES, REASONS))
    if number % 5 == 0  # each file and each reason a few times
]


@pytest.mark.parametrize(("path", "reason"), CASES)
def test_a_disk_that_refuses_is_one_error_and_the_last_checkpoint_is_whole(
    path: str, reason: int, train_tiny: Train, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fill() -> None:
        wait_for_the_disk()
        full_disk(path, reason, patch)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        train_tiny(tiny(), observer=Watcher({5: fill}))
    assert os.strerror(reason) in str(caught.value)
    assert caught.value.hint
    (run,) = map(RunFolder, (tmp_path / "runs").iterdir())
    assert 4 in run.checkpoint_steps()
    assert_same(whole, folder_of(train_tiny(tiny(), resume=run)))


def test_a_run_folder_that_goes_away_is_one_error(train_tiny: Train, tmp_path: Path) -> None:
    def remove() -> None:
        wait_for_the_disk()
        shutil.rmtree(tmp_path / "runs")

    with pytest.raises(LfsError) as caught:
        train_tiny(tiny(), observer=Watcher({5: remove}))
    assert "No such file or directory" in str(caught.value)


def test_tokens_that_are_removed_while_they_are_read_are_not_missed(
    data: DataFolder, train_tiny: Train, whole: RunFolder, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(data.root, kept)
    for folder in ("tokens", "tokenizers"):
        shutil.copytree(data.root / folder, kept / folder, dirs_exist_ok=True)
    from lfs_cli.runs.train import train

    watcher = Watcher({3: lambda: [shutil.rmtree(kept / name) for name in ("raw", "tokens", "tokenizers")]})
    assert_same(whole, folder_of(train(tiny(), data=DataFolder(kept), observer=watcher)))


def test_tokens_are_enough_when_their_text_is_gone(
    data: DataFolder, train_tiny: Train, whole: RunFolder, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(data.root, kept)
    shutil.rmtree(kept / "raw")
    watcher = Watcher()
    result = training.train(tiny(), tmp_path / "runs", data=DataFolder(kept), observer=watcher)
    assert_same(whole, folder_of(result))
    assert result.bits_per_byte
    assert watcher.stages[0].endswith("; their text is no longer here")
    assert not (kept / "raw").exists()


@pytest.mark.parametrize("loss", ["valid-00000.bin", "manifest.json"])
def test_tokens_that_are_not_whole_are_made_again_from_a_new_text(
    data: DataFolder, train_tiny: Train, whole: RunFolder, tmp_path: Path, loss: str
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(data.root, kept)
    shutil.rmtree(kept / "raw")
    (lost,) = kept.glob(f"tokens/*/{loss}")
    lost.unlink()
    result = training.train(tiny(), tmp_path / "runs", data=DataFolder(kept), observer=Watcher())
    assert_same(whole, folder_of(result))
    assert lost.exists()


def test_tokens_that_are_cut_short_while_they_are_read_are_one_error(
    data: DataFolder, train_tiny: Train, whole: RunFolder, tmp_path: Path
) -> None:
    from lfs_cli.runs.train import train

    kept = tmp_path / "kept"
    shutil.copytree(data.root, kept)
    (shard,) = kept.glob("tokens/*/train-00000.bin")
    content = shard.read_bytes()
    runs = tmp_path / "runs"
    with pytest.raises(DataError, match="was changed while it was read"):
        train(tiny(), runs, data=DataFolder(kept), observer=Watcher({5: lambda: os.truncate(shard, 0)}))
    shard.write_bytes(content)
    (run,) = map(RunFolder, runs.iterdir())
    assert max(run.checkpoint_steps()) == 4
    assert_same(whole, folder_of(train(tiny(), runs, data=DataFolder(kept), resume=run)))


# Damaged checkpoints


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(name: str, train_tiny: Train, whole: RunFolder) -> None:
    run = folder_of(train_tiny(tiny(), observer=Watcher({6: terminate})))
    flip(run.checkpoint(6) / name)
    result = train_tiny(tiny(), resume=run, observer=(watcher := Watcher()))
    assert len(watcher.warnings) == 1
    assert str(run.checkpoint(6)) in watcher.warnings[0]
    assert watcher.warnings[0].endswith("; it is now damaged-step-000006, and the run goes on from step 4")
    assert (run.checkpoints / "damaged-step-000006").is_dir()
    assert result.status == "finished"
    assert_same(whole, run)


def test_what_a_killed_writer_left_is_put_right(train_tiny: Train, whole: RunFolder) -> None:
    run = folder_of(train_tiny(tiny(), observer=Watcher({6: terminate})))
    run.checkpoint(6).rename(run.checkpoints / ".step-000006.old")  # as killed between two renamings
    for name in (".step-000006.tmp", ".step-000002.gone"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "model.safetensors").write_bytes(b"half")
    train_tiny(tiny(), resume=run, observer=Watcher({7: terminate}))
    assert run.checkpoint_steps() == [2, 4, 6, 7]
    assert not list(run.checkpoints.glob(".step-*"))
    assert_same(whole, folder_of(train_tiny(tiny(), resume=run)))


def test_the_pointers_follow_the_checkpoint_that_is_taken(train_tiny: Train) -> None:
    run = folder_of(train_tiny(tiny()))
    assert [p.read_text() for p in (run.latest_pointer, run.best_pointer)] == ["step-000008\n"] * 2
    for step in (6, 8):
        flip(run.checkpoint(step) / "state.safetensors")
    train_tiny(tiny(), resume=run, observer=Watcher({5: terminate}))
    assert run.latest_pointer.read_text() == "step-000005\n"
    assert run.best_pointer.read_text() == "step-000004\n"


def test_where_no_checkpoint_is_whole_the_error_says_how_to_go_on(train_tiny: Train) -> None:
    run = folder_of(train_tiny(tiny()))
    for step in run.checkpoint_steps():
        flip(run.checkpoint(step) / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no checkpoint of {run.path} is whole: .*step-000008") as caught:
        train_tiny(tiny(), resume=run)
    assert caught.value.hint == f"put back a copy of one, or start again: `lfs train {run.config}`"
    assert run.checkpoint_steps() == [2, 4, 6, 8]  # nothing was touched


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(train_tiny: Train, whole: RunFolder) -> None:
    run = folder_of(train_tiny(tiny()))
    shutil.rmtree(run.checkpoints)
    train_tiny(tiny(), resume=run)
    assert_same(whole, run)


def test_another_text_is_told(train_tiny: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder_of(train_tiny(tiny(), observer=Watcher({3: terminate})))
    real = Tokens.open

    def other(*args: Any, **options: Any) -> Tokens:
        tokens = real(*args, **options)
        tokens.checksum = 1
        return tokens

    monkeypatch.setattr(Tokens, "open", other)
    train_tiny(tiny(), resume=run, observer=(watcher := Watcher()))
    assert watcher.warnings[0].startswith("the text of `sample` is not the one that ")


def test_compiled_blocks_train_as_blocks_do(
    train_tiny: Train, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[torch.nn.Module] = []

    def call(module: torch.nn.Module, *inputs: Any, **more: Any) -> torch.Tensor:
        called.append(module)
        return module(*inputs, **more)

    monkeypatch.setattr("lfs_cli.runs.setup.compiled_call", lambda: call)
    result = train_tiny(tiny(compile="blocks"))
    assert len(called) > 8  # at each step, and in evaluations
    assert_same(folder_of(result), whole)


RISES = [
    (2.021, 1e9, {}, "try a lower learning rate"),
    (2.021, 10, {}, "fewer steps, or more text, would have done better"),
    (2.021, 10, {"max_epochs": 1e3}, "fewer steps, or more text, would have done better"),
    (2.021, 10, {"max_epochs": 8.01 * 6.4}, "a lower `max_epochs`, or more text, would have done better"),
    (2.019, 10, {}, ""),
    (1.0, 10, {}, ""),
]


@pytest.mark.parametrize(("last", "text_tokens", "bound", "advice"), RISES)
def test_a_loss_that_rises_at_the_end_is_told(
    last: float, text_tokens: float, bound: dict, advice: str, train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, last])
    real = training.evaluate

    def evaluate(*inputs: Any, **more: Any) -> Any:
        return replace(real(*inputs, **more), loss=next(losses))

    monkeypatch.setattr(training, "evaluate", evaluate)
    told = recorder.Recorder.tell_of_a_rise
    monkeypatch.setattr(recorder.Recorder, "tell_of_a_rise", lambda self, _: told(self, text_tokens))
    watcher = Watcher()
    train_tiny(tiny(**bound), observer=watcher)
    texts = [text for text in watcher.warnings if "validation loss" in text]
    assert len(texts) == bool(advice)
    for text in texts:
        assert "lowest after step 4 (2.0000) and rose to 2.0210; the run read its text" in text
        assert text.endswith(f"{8 * 64 / text_tokens:.1f} times: {advice}")

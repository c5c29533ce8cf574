"""How many sequences go through the model at once: chosen to fit, written down, halved when memory runs out."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Train, Watcher, folder_of, tiny

from lfs_cli.errors import DeviceError
from lfs_cli.generation.language_model import LanguageModel
from lfs_cli.runs import microbatch, setup
from lfs_cli.runs.changes import resumed_config
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.microbatch import rows_at_once
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.recorder import Recorder
from lfs_cli.runs.verify import compare_runs, verify_resume
from lfs_cli.training.memory import predict_memory
from lfs_cli.training.step import Readback

KINDS = ("losses, norms and rates of each step", "weights", "evaluations", "samples")
ALWAYS = {"eval_every": 100, "checkpoint_every": 1}


def records(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [record for line in run.metrics.read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def decided(run: RunFolder) -> list[tuple[int, int]]:
    """The steps after which it was written down how many sequences go at once, and how many."""
    return [(record["step"], record["rows"]) for record in records(run, "microbatch")]


def differing(one: RunFolder, other: RunFolder) -> list[str]:
    return [row["what"] for row in compare_runs(one, other) if row["different"] and row["what"] in KINDS]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    pass


def die() -> None:
    raise Killed


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Memory for passes of `rows` sequences, from the step after `after` training losses on."""
    real, has = setup.next_token_loss, {"rows": 99, "after": 0, "calls": 0}

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        result = real(hidden, weight, targets, **options)
        if hidden.requires_grad or has.get("evaluation"):
            has["calls"] += 1
            if has["calls"] > has["after"] and len(targets) > has["rows"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    monkeypatch.setattr(setup, "next_token_loss", loss)
    return has


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say that the machine has just the memory for so many sequences of the small experiment."""

    def set_to(rows: int) -> None:
        needs = predict_memory(tiny(microbatch=rows), "cpu", torch.float32).peak
        weights = predict_memory(tiny(microbatch=rows), "cpu", torch.float32).weights
        monkeypatch.setattr(
            microbatch, "free_bytes", lambda device: (needs - weights) / microbatch.USED_SHARE["cpu"] + 64
        )

    return set_to


# As many as fit


@pytest.mark.parametrize("rows", [4, 1])
def test_the_largest_that_fits_is_chosen_said_and_written_down(
    rows: int, free: Callable[[int], None], train_tiny: Train
) -> None:
    free(rows)
    chosen = folder_of(train_tiny(tiny(microbatch="auto"), observer=(watcher := Watcher())))
    assert decided(chosen) == [(0, rows)]
    (line,) = [stage for stage in watcher.stages if stage.startswith("training ")]
    assert f"), microbatch {rows} of 4 (the largest that fits in " in line
    assert differing(chosen, folder_of(train_tiny(tiny(microbatch=rows)))) == []


def test_one_is_tried_where_not_even_that_is_predicted_to_fit(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(microbatch, "free_bytes", lambda device: 1000)
    run = folder_of(train_tiny(tiny(microbatch="auto", steps=1), observer=(watcher := Watcher())))
    assert decided(run) == [(0, 1)]
    assert any("microbatch 1 of 4 (even one may be too many for " in stage for stage in watcher.stages)


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_a_resumed_run_keeps_what_was_chosen_whatever_is_free_now(
    journal: str, free: Callable[[int], None], train_tiny: Train
) -> None:
    free(2)
    whole = folder_of(train_tiny(tiny(microbatch="auto")))
    part = train_part(train_tiny, tiny(microbatch="auto"), 5)
    if journal == "lost":
        part.metrics.unlink()
    free(4)
    end = folder_of(train_tiny(tiny(microbatch="auto"), resume=part, observer=(watcher := Watcher())))
    assert any("microbatch 2 of 4 (as before)" in stage for stage in watcher.stages)
    assert [what for what in differing(whole, end) if journal == "kept" or what == "weights"] == []


def train_part(train_tiny: Train, config: Any, steps: int) -> RunFolder:
    """Train until a signal after so many steps."""
    return folder_of(train_tiny(config, observer=Watcher({steps: terminate})))


def test_another_setting_than_the_one_it_was_chosen_for_is_followed(
    free: Callable[[int], None], train_tiny: Train
) -> None:
    free(2)
    part = train_part(train_tiny, tiny(microbatch="auto"), 5)
    config, notes = resumed_config(part, ["microbatch=1"])
    assert notes[0].startswith("`microbatch` is `1` from here on, and was `auto`: the weights will not be those")
    train_tiny(config, resume=part, observer=(watcher := Watcher()))
    assert not any("microbatch" in stage for stage in watcher.stages)
    assert decided(part) == [(0, 2)]


@pytest.mark.parametrize("kept", [{"asked": "auto", "rows": rows} for rows in (3, 0, -4, 8, "2", None, True)] + [{}])
def test_a_number_that_makes_no_sense_is_not_used(kept: dict[str, Any]) -> None:
    assert rows_at_once(tiny(microbatch="auto"), Progress(microbatch=kept)) == 4


def test_runs_that_are_to_be_equal_get_one_number_though_less_is_free_later(
    data: DataFolder, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(2)
    readings = iter([microbatch.free_bytes(torch.device("cpu")), *[1000] * 9])
    monkeypatch.setattr(microbatch, "free_bytes", lambda device: next(readings))
    rows, error = verify_resume(tiny(microbatch="auto", verify_steps=3), data=data)
    assert error is None, rows


# Fewer when memory runs out


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_run_goes_on_as_one_that_was_resumed_with_smaller_passes(
    asked: int | str | None, memory: dict[str, int], train_tiny: Train
) -> None:
    memory.update(rows=2, after=4)
    run = folder_of(train_tiny(tiny(microbatch=asked, **ALWAYS), observer=(watcher := Watcher())))
    assert decided(run)[-1] == (4, 2)
    assert records(run, "microbatch")[-1]["why"] == "out of memory"
    assert watcher.warnings == [
        "out of memory after step 4: from here on 2 of 4 sequences at once, which changes nothing but rounding"
    ]

    memory.update(rows=99)
    other = train_part(train_tiny, tiny(**ALWAYS), 4)
    config, _ = resumed_config(other, ["microbatch=2"])
    train_tiny(config, resume=other)
    assert differing(run, other) == []
    losses = [
        [record["loss"] for record in records(each, "step")] for each in (run, folder_of(train_tiny(tiny(**ALWAYS))))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("step", "stop"), [(3, terminate), (5, terminate), (5, die)])
def test_it_is_remembered_by_a_run_that_goes_on(
    step: int, stop: Callable[[], None], memory: dict[str, int], train_tiny: Train
) -> None:
    settings = {"eval_every": 100, "checkpoint_every": 2}
    memory.update(rows=2, after=4)
    whole = folder_of(train_tiny(tiny(**settings)))
    memory.update(calls=0)
    with pytest.raises(Killed) if stop is die else nullcontext():
        train_tiny(tiny(**settings), observer=Watcher({step: stop}))
    (run,) = {RunFolder(path) for path in whole.path.parent.iterdir()} - {whole}
    memory.update(rows=2 if step < 5 else 99, calls=run.checkpoint_steps()[-1])  # from 5 on there is memory again
    train_tiny(tiny(**settings), resume=run)
    assert differing(whole, run) == []
    assert decided(run) == [(4, 2)]


def test_a_rollback_does_not_try_the_larger_passes_again(memory: dict[str, int], train_tiny: Train) -> None:
    memory.update(rows=2, after=2)
    real, bad = setup.next_token_loss, {5}
    steps = []

    def once_bad(hidden: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        result = real(hidden, *args, **options)
        if hidden.requires_grad:
            steps.append(len(steps))
            if steps[-1] in bad:
                return result * float("nan")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "next_token_loss", once_bad)
        settings = {"eval_every": 100, "checkpoint_every": 100, "anomaly__policy": "rollback"}
        run = folder_of(train_tiny(tiny(**settings), observer=(watcher := Watcher())))
    assert [line.split(" ")[0] for line in watcher.warnings] == ["out", "loss"]  # no second lack of memory
    assert decided(run) == [(0, 2)]
    assert [record["step"] for record in records(run, "step")] == list(range(1, 9))


def test_a_step_that_a_gpu_has_not_finished_is_recorded_before_it(tmp_path: Path) -> None:
    run, progress = RunFolder.create(tmp_path, "run"), Progress()
    recorder = Recorder(tiny(), run, progress, Watcher(), torch.device("cpu"))
    recorder._pending = (1, 0.1, Readback(torch.tensor([2.5, 1.0])))  # as `take` leaves it on a GPU
    recorder.ran_out(2)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("step", 1), ("microbatch", 1)]
    assert progress.microbatch == {"asked": None, "rows": 2}


def test_an_evaluation_without_memory_is_done_on_less(memory: dict[str, int], train_tiny: Train) -> None:
    memory.update(rows=2, after=2, evaluation=1)
    run = folder_of(train_tiny(tiny(), observer=(watcher := Watcher())))
    assert decided(run) == [(2, 2)]
    assert len(watcher.warnings) == 1
    memory.update(rows=99)
    plain = folder_of(train_tiny(tiny()))
    losses = [[record["loss"] for record in records(each, "evaluation")] for each in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_sample_without_memory_is_left_out(
    train_tiny: Train, whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LanguageModel, "stream", refuse)
    run = folder_of(train_tiny(tiny(), observer=(watcher := Watcher())))
    assert watcher.warnings == [f"out of memory: no sample after step {step}" for step in (2, 4, 6, 8)]
    assert differing(whole, run) == ["samples"]


def test_where_one_sequence_is_too_many_it_is_an_error_with_a_hint(memory: dict[str, int], train_tiny: Train) -> None:
    memory.update(rows=0, after=3)
    with pytest.raises(DeviceError, match="out of memory at microbatch 1 x 16 tokens") as caught:
        train_tiny(tiny())
    assert caught.value.hint == "choose a smaller model or a shorter context, or try `--set model.checkpointing=full`"


def test_where_the_update_has_no_memory_it_is_an_error_with_a_hint(
    train_tiny: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lfs_cli.training.step.clip_scale", refuse)
    with pytest.raises(DeviceError, match="out of memory beside the passes of 4 x 16 tokens") as caught:
        train_tiny(tiny())
    assert "an optimizer that remembers less" in caught.value.hint

"""The search for tiles: where it goes, what it leaves out, and what it keeps."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfs_cli.benchmarks import Bench, attention, attention_tuning
from lfs_cli.benchmarks.attention import draw
from lfs_cli.benchmarks.attention_accuracy import TENSORS, Inputs, Judge
from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.attention_tuning import (
    CUT,
    RACE_SECONDS,
    TUNING_SECONDS,
    Choice,
    Search,
    Tunable,
    countdown,
    nothing_ahead,
    refuse_without_gpu,
)
from lfs_cli.config import BenchConfig, load_config
from lfs_cli.errors import DeviceError
from lfs_cli.kernels import hopper_attention, triton_attention
from lfs_cli.model import ATTENTION
from lfs_cli.runs.bench import _keep_tuned
from lfs_cli.runs.observer import Observer

CPU = torch.device("cpu")
SHAPE = Shape(1, 2, 2, 8, 4, torch.float32)
INPUTS = draw(SHAPE, 0, CPU)


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each race collects garbage first, which takes nearly all of its time here."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def output(inputs: Inputs = INPUTS) -> dict[str, Tensor]:
    return {"output": ATTENTION.get("reference")(*inputs[:3], causal=True).detach()}


class FakeKernel:
    """Takes as long as `seconds` says for a choice of two numbers, and can spill, fail and be wrong."""

    def __init__(self, seconds: Callable[[int, int], float], **faults: set[Choice]) -> None:
        self.seconds, self.faults = seconds, faults
        self.last: Choice = (0, 0)
        self.timed: list[Choice] = []
        self.compiled: list[Choice] = []
        self.in_memory: list[Choice] = []  # as Triton has it: in the order in which they were first launched

    def run(self, choice: Choice) -> dict[str, Tensor]:
        self.last = choice
        self.compiled.append(choice)
        self.in_memory += [choice] if choice not in self.in_memory else []
        if choice in self.faults.get("fails", ()):
            raise RuntimeError("PassManager::run failed\nmore")
        found = output()
        return {"output": found["output"] * 2} if choice in self.faults.get("wrong", ()) else found

    def spilled(self) -> int | None:
        return 16 if self.in_memory[-1] in self.faults.get("spills", ()) else 0

    def timer(self, run: Callable[[], object]) -> float:
        run()
        self.timed.append(self.last)
        return self.seconds(*self.last)

    def search(self, start: Choice = (32, 1), left=lambda: math.inf, ahead=nothing_ahead, **bench) -> Search:
        tunable = Tunable(
            kernel="forward",
            bucket={"bytes": 4},
            names=("block", "stages"),
            ladders=((16, 32, 64, 128), (1, 2, 3)),
            start=start,
            kind="forward",
            run=self.run,
            spilled_bytes=self.spilled,
            forget=self.in_memory.clear,
        )
        bench = {"warmup": 1, "repeats": 3, **bench}
        return Search(tunable, Judge(SHAPE, INPUTS), Bench(CPU, timer=self.timer, **bench), left, ahead)

    def rows(self, start: Choice = (32, 1), **how) -> dict[Choice, dict]:
        search = self.search(start, **how)
        search.run()
        return by_choice(search)


def by_choice(search: Search) -> dict[Choice, dict]:
    return {tuple(row["choice"].values()): row for row in search.rows()}


def distance_to(block: int, stages: int) -> Callable[[int, int], float]:
    return lambda b, s: 1.0 + 0.1 * abs(b.bit_length() - block.bit_length()) + 0.05 * abs(s - stages)


def best(rows: dict[Choice, dict]) -> list[Choice]:
    return [choice for choice, row in rows.items() if row["is_best"]]


def test_what_another_shape_has_launched_is_not_held_against_a_choice() -> None:
    kernel = FakeKernel(distance_to(64, 1), spills={(128, 1), (128, 2)})
    first, second = kernel.rows(), kernel.rows()
    assert {choice: row["status"] for choice, row in second.items()} == {c: row["status"] for c, row in first.items()}
    assert first[128, 1]["status"] == "spills"
    assert best(second) == [(64, 1)]


def test_the_search_walks_to_the_fastest_choice() -> None:
    kernel = FakeKernel(distance_to(128, 3))
    rows = kernel.rows()
    assert best(rows) == [(128, 3)]
    assert rows[128, 3]["speed_ratio"] == pytest.approx((1.0 + 0.2 + 0.1) / 1.0)
    assert [choice for choice, row in rows.items() if row["is_start"]] == [(32, 1)]
    assert rows[128, 3]["tflops"] == pytest.approx(SHAPE.forward_flops / 1.0 / 1e12)
    json.dumps(list(rows.values()))


def test_it_stays_where_nothing_is_faster_by_more_than_noise() -> None:
    rows = FakeKernel(lambda block, stages: 1.0 if (block, stages) == (32, 2) else 0.995).rows(start=(32, 2))
    assert best(rows) == [(32, 2)]
    assert set(rows) == {(32, 2), (16, 2), (64, 2), (32, 1), (32, 3)}


@pytest.mark.parametrize(
    ("fault", "status", "note"),
    [
        ("spills", "spills", "16 bytes do not fit into registers"),
        ("wrong", "wrong", "output differs from float64"),
        ("fails", "failed", "RuntimeError: PassManager::run failed"),
    ],
)
def test_what_is_not_clean_is_never_timed(fault: str, status: str, note: str) -> None:
    kernel = FakeKernel(distance_to(64, 1), **{fault: {(64, 1)}})
    rows = kernel.rows()
    assert rows[64, 1]["status"] == status
    assert note in rows[64, 1]["note"]
    assert rows[64, 1]["median_ms"] is None
    assert (64, 1) not in kernel.timed
    assert best(rows) != [(64, 1)]


def test_a_start_that_spills_is_left() -> None:
    rows = FakeKernel(distance_to(32, 1), spills={(32, 1)}).rows()
    assert rows[32, 1]["status"] == "spills"
    assert best(rows) == [(32, 2)]
    assert rows[32, 2]["speed_ratio"] is None


def test_nothing_clean_has_no_best() -> None:
    everything = {(block, stages) for block in (16, 32, 64, 128) for stages in (1, 2, 3)}
    assert best(FakeKernel(distance_to(32, 1), wrong=everything).rows()) == []


def test_hopeless_choices_are_dropped_after_two_runs() -> None:
    kernel = FakeKernel(lambda block, stages: 5.0 if block == 16 else 1.0)
    rows = kernel.rows(repeats=10)
    assert rows[16, 1]["status"] == "slow"
    assert kernel.timed.count((16, 1)) == 2
    assert kernel.timed.count((64, 1)) == 12


def test_no_choice_is_compiled_twice_for_the_judge() -> None:
    kernel = FakeKernel(distance_to(128, 3))
    judged: list[Choice] = []
    search = kernel.search()
    real = search._refusal
    search._refusal = lambda choice: judged.append(choice) or real(choice)
    search.run()
    assert len(judged) == len(set(judged)) > 5


def test_neighbours_differ_by_one_step_and_stay_on_the_ladders() -> None:
    tunable = Tunable("k", {}, ("a", "b"), ((16, 32, 64), (1, 2)), (16, 2), "forward", lambda choice: {})
    assert tunable.neighbours((16, 2)) == [(32, 2), (16, 1)]
    assert tunable.neighbours((32, 1)) == [(16, 1), (64, 1), (32, 2)]
    assert tunable.neighbours((48, 1)) == [(32, 1), (64, 1), (48, 2)]  # off the ladder, from a table of others


def test_every_kernel_of_the_table_is_offered_and_gets_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def backward(*tensors: Tensor, tiles: dict, **_: object) -> list[Tensor]:
        tried.append(tiles)
        return list(tensors[:3])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_attention, "forward", lambda q, *_, tiles=None, **__: tried.append(tiles) or (q, q))
    monkeypatch.setattr(triton_attention, "backward", backward)
    offered = {tunable.kernel: tunable for tunable in attention_tuning.kernels_of(SHAPE, INPUTS)}
    assert set(offered) == {kernel for kernel, *_ in triton_attention.TILES}
    for kernel, tunable in offered.items():
        assert tunable.start == tuple(triton_attention.TILES[kernel, 4, 32][1])
        assert set(tunable.run((16, 32, 8, 5))) == set(TENSORS[:1] if tunable.kind == "forward" else TENSORS[1:])
        assert tried[-1] == {kernel: triton_attention.Tile(16, 32, 8, 5)}


@pytest.mark.parametrize(("seq", "head_dim"), [(1024, 64), (8192, 64), (64, 128)])
def test_the_hopper_kernels_are_offered_where_they_can_run(
    monkeypatch: pytest.MonkeyPatch, seq: int, head_dim: int
) -> None:
    shape = Shape(1, 1, 1, seq, head_dim, torch.bfloat16)
    inputs = draw(shape, 0, torch.device("cpu"))
    tried = []

    def backward(*tensors: Tensor, tile: hopper_attention.BackwardTile, **_: object) -> list[Tensor]:
        tried.append(tile)
        return list(tensors[:3])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_attention, "forward", lambda q, *_, tiles=None, **__: (q, q))
    monkeypatch.setattr(hopper_attention, "unavailable_reason", lambda *_, **__: None)
    monkeypatch.setattr(hopper_attention, "forward", lambda q, *_, tile, **__: tried.append(tile) or (q, q))
    monkeypatch.setattr(hopper_attention, "backward", backward)
    forward, backward_, *_ = attention_tuning.kernels_of(shape, inputs)
    assert (forward.kernel, backward_.kernel) == ("hopper forward", "hopper backward")
    assert forward.start == tuple(hopper_attention.forward_tile(seq, head_dim, causal=True))
    assert set(forward.run(forward.start)) == {"output"}
    assert tried.pop() == hopper_attention.forward_tile(seq, head_dim, causal=True)
    assert set(backward_.run(backward_.start)) == set(TENSORS[1:])
    assert tried.pop() == hopper_attention.BACKWARD[head_dim]
    for tunable in (forward, backward_):
        assert all(value in ladder for value, ladder in zip(tunable.start, tunable.ladders, strict=True))
        json.dumps(dict(tunable.bucket) | dict(zip(tunable.names, tunable.start, strict=True)))
    assert all(choice[0] in hopper_attention.REGISTERS for choice in forward.neighbours(forward.start))


@pytest.mark.parametrize("is_interpreted", [True, False])
def test_tuning_without_compiled_kernels_is_refused(monkeypatch: pytest.MonkeyPatch, is_interpreted: bool) -> None:
    monkeypatch.setattr(attention_tuning, "INTERPRETED", is_interpreted)
    with pytest.raises(DeviceError, match="can only be tuned on a CUDA GPU") as caught:
        refuse_without_gpu(torch.device("cuda" if is_interpreted else "cpu"))
    assert "leave out `--tune`" in caught.value.hint


def test_a_walk_that_ends_by_itself_is_done() -> None:
    search = FakeKernel(distance_to(128, 3)).search()
    search.run()
    assert search.is_done
    assert {row["note"] for row in search.rows() if row["status"] == "ok"} == {""}
    assert search.summary() == "forward: 9 tried, block 128, stages 3, 1.300 times the table now"


def test_the_start_is_measured_even_when_no_time_is_left() -> None:
    kernel = FakeKernel(distance_to(128, 3))
    search = kernel.search(left=lambda: 0.0)
    search.run()
    rows = by_choice(search)
    assert list(rows) == best(rows) == [(32, 1)]
    assert rows[32, 1]["runs"] == 3  # a race of a second
    assert (rows[32, 1]["note"], search.is_done) == (CUT, False)
    assert search.summary() == f"forward: 1 tried, block 32, stages 1, 1.000 times the table now; {CUT}"


@pytest.mark.parametrize("checks", range(1, 9))
def test_what_was_checked_before_the_time_was_over_is_in_the_rows(checks: int) -> None:
    kernel = FakeKernel(distance_to(128, 3))
    judged: list[Choice] = []
    search = kernel.search(left=lambda: float(len(judged) < checks))
    real = search._refusal
    search._refusal = lambda choice: judged.append(choice) or real(choice)
    search.run()
    rows = by_choice(search)
    assert len(judged) == checks
    assert set(rows) == set(judged) == set(kernel.timed)
    assert {row["status"] for row in rows.values()} <= {"ok", "slow"}
    (leader,) = best(rows)
    assert rows[leader]["median_ms"] == min(row["median_ms"] for row in rows.values())
    assert (rows[leader]["note"], search.is_done) == (CUT, False)
    assert CUT in search.summary()


def test_a_race_takes_no_longer_than_what_is_left() -> None:
    allowed: list[float] = []
    search = FakeKernel(distance_to(32, 1)).search(left=lambda: 7.0, max_seconds=5.0)
    real = Bench.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "measure", lambda bench, *rest: allowed.append(bench.max_seconds) or real(bench, *rest))
        search.run()
        search = replace(search, left=lambda: 3.0)
        search.run()
        search = replace(search, left=lambda: 0.25)
        search.run()
    assert allowed == [5.0] * 2 + [3.0] * 2 + [RACE_SECONDS] * 2


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError("CUDA error: an illegal access")])
@pytest.mark.parametrize(("runs", "timed"), [(4, 0), (6, 0), (20, 4), (34, 4), (60, 7)])
def test_what_was_measured_before_an_interruption_is_in_the_rows(runs: int, timed: int, raised) -> None:
    """At any moment: while checking, in a quick look, in the race after it, in a later step."""
    kernel = FakeKernel(distance_to(128, 3))
    real = kernel.run

    def run(choice: Choice) -> dict[str, Tensor]:
        if len(kernel.compiled) == runs:
            raise raised
        return real(choice)

    kernel.run = run
    search = kernel.search()
    if isinstance(raised, RuntimeError):  # which the bench keeps as a result: then nothing more can be measured
        search.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            search.run()
    rows = by_choice(search)
    assert len([choice for choice, row in rows.items() if row["median_ms"]]) == timed
    assert len(best(rows)) == (timed > 0)
    json.dumps(list(rows.values()))


def test_neighbours_are_compiled_ahead_of_their_check_and_progress_says_how_far_it_is() -> None:
    order, told = [], []

    def ahead(shape, kernel, choices, seconds, done) -> tuple[Choice, ...]:
        order.append(("ahead", tuple(choices)))
        assert (shape, kernel, seconds) == (SHAPE, "forward", 60.0)
        for number in range(len(choices) + 1):
            done(number)
        return ()

    kernel = FakeKernel(distance_to(64, 1))
    search = kernel.search(left=lambda: 60.0, ahead=ahead, on_progress=lambda *progress: told.append(progress))
    real = search._refusal
    search._refusal = lambda choice: order.append(("check", choice)) or real(choice)
    search.run()
    first, second = (choices for what, choices in order if what == "ahead")
    assert first == ((32, 1), (16, 1), (64, 1), (32, 2))
    assert second == ((128, 1), (64, 2))
    assert [what for what, _ in order] == ["ahead", *["check"] * 4, "ahead", *["check"] * 2]
    assert [progress for progress in told if progress[0] == "compiling forward, step 1"] == [
        ("compiling forward, step 1", done, 4) for done in range(5)
    ]
    assert ("checking forward, step 2", 1, 2) in told
    assert ("timing forward, step 2", 9, 9) in told


def test_a_choice_that_does_not_end_in_a_worker_is_not_tried_but_the_start_always_is() -> None:
    kernel = FakeKernel(distance_to(64, 1))
    search = kernel.search(ahead=lambda *_: [(32, 1), (64, 1)])
    tried = []
    real = search._refusal
    search._refusal = lambda choice: tried.append(choice) or real(choice)
    search.run()
    assert (32, 1) in tried
    assert (64, 1) not in tried
    row = next(row for row in search.rows() if row["choice"] == {"block": 64, "stages": 1})
    assert (row["status"], row["note"]) == ("failed", "it did not end in a process of its own")
    assert search.is_done


def test_each_step_is_told() -> None:
    notes: list[str] = []
    FakeKernel(distance_to(128, 1)).rows(on_note=notes.append)
    assert notes == [
        "forward, step 1: 4 tried, block 64, stages 1 is best, 1100 ms",
        "forward, step 2: 6 tried, block 128, stages 1 is best, 1000 ms",
    ]


class FakeSearch(Search):
    """Finds the best at once, or is interrupted after it has measured the start."""

    def run(self) -> None:
        kernel = FakeKernel(distance_to(64, 2))
        search = kernel.search()
        search.run()
        self.results, self.best, self.is_done = search.results, search.best, True
        if self.tunable.kernel == "forward":
            self.results = {(32, 1): search.results[32, 1]}
            raise KeyboardInterrupt


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict], list[str]]]:
    """Tune fake kernels by name; return the rows and the notes."""

    def tune(*kernels: str, names: tuple[str, ...] = (), seconds: float = 60.0) -> tuple[list[dict], list[str]]:
        offered = [replace(FakeKernel(distance_to(64, 2)).search().tunable, kernel=kernel) for kernel in kernels]
        monkeypatch.setattr(attention, "kernels_of", lambda *_: iter(offered))
        monkeypatch.setattr(attention, "Search", FakeSearch)
        monkeypatch.setattr(attention, "unavailable_reason", lambda *_: None)
        notes: list[str] = []
        rows = attention._tune_all([SHAPE], names, 0, seconds, Bench(CPU, torch.float32, on_note=notes.append))
        return rows, notes

    return tune


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), ["hopper forward", "dq", "dkdv", "forward"]),
        (("hopper",), ["hopper forward"]),
        (("triton",), ["dq", "dkdv", "forward"]),
    ],
)
def test_what_was_found_before_an_interruption_is_kept(names: tuple[str, ...], expected: list[str], tune) -> None:
    rows, notes = tune("hopper forward", "dq", "dkdv", "forward", names=names)
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == expected
    assert (notes[-1] == "interrupted; what was found is kept") == (names != ("hopper",))
    if "forward" in expected:
        (start,) = [row for row in rows if row["kernel"] == "forward"]
        assert start["median_ms"]
        assert start["is_start"]


def test_an_interruption_before_anything_was_measured_is_one(tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSearch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune("dq")


def test_the_first_kernel_has_its_turn_and_those_without_time_are_named(tune) -> None:
    rows, notes = tune("hopper forward", "dq", "dkdv", seconds=1e-9)
    assert {row["kernel"] for row in rows} == {"hopper forward"}
    assert notes[-1] == "no time was left for dq, dkdv: raise `--max-seconds`, which is 1e-09"


@pytest.mark.parametrize(("options", "seconds"), [([], TUNING_SECONDS), (["max_seconds=10.0"], 10.0)])
def test_the_time_limit_is_the_users_or_one_for_tuning(
    options: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(attention, "refuse_without_gpu", lambda _: None)
    monkeypatch.setattr(attention, "_tune_all", lambda shapes, names, seed, seconds, bench: asked.append(seconds))
    settings = load_config(BenchConfig, None, ["benchmark=attention", "attention.tune=true", *options])
    attention.bench_attention(settings, Bench(CPU))
    assert asked == [seconds]


def test_time_passes() -> None:
    assert 0 < countdown(1e3)() < 1e3
    assert countdown(0.0)() <= 0


class Warnings(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


ENVIRONMENT = {
    "hardware": "A GPU",
    "versions": {"torch": "2.11", "triton": "3.6"},
    "date": "2026-11-25",
    "commit": "abc",
}


def test_the_best_is_kept_and_replaces_an_older_one_of_the_same_shape(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "tuned_attention.json"
    for target in ((128, 3), (64, 2)):
        rows = list(FakeKernel(distance_to(*target)).rows().values())
        assert _keep_tuned(path, rows, ENVIRONMENT, Observer()) == path
    (entry,) = json.loads(path.read_text())
    assert entry["choice"] == {"block": 64, "stages": 2}
    assert (entry["hardware"], entry["kernel"], entry["date"]) == ("A GPU", "forward", "2026-11-25")
    assert entry["versions"] == {"torch": "2.11", "triton": "3.6"}
    assert entry["shape"]["seq"] == 8
    _keep_tuned(path, rows, ENVIRONMENT | {"hardware": "Another"}, Observer())
    assert [entry["hardware"] for entry in json.loads(path.read_text())] == ["A GPU", "Another"]


def test_a_table_that_is_not_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tuned_attention.json"
    path.write_text("[1, 2]")
    observer = Warnings()
    assert _keep_tuned(path, list(FakeKernel(distance_to(32, 1)).rows().values()), ENVIRONMENT, observer) is None
    assert path.read_text() == "[1, 2]"
    assert "is not a table of tuned tiles" in observer.texts[0]


def test_a_folder_that_is_a_file_costs_the_table_only(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").write_text("")
    observer = Warnings()
    assert _keep_tuned(tmp_path / "benchmarks" / "tuned.json", [], ENVIRONMENT, observer) is None
    assert "cannot write" in observer.texts[0]

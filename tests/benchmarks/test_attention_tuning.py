"""The search for tiles: where it goes, what it leaves out, and what it keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lfs_cli.benchmarks import Bench, attention, attention_tuning
from lfs_cli.benchmarks.attention import draw
from lfs_cli.benchmarks.attention_accuracy import TENSORS, Inputs
from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.attention_tuning import Choice, Tunable, refuse_without_gpu, search
from lfs_cli.errors import DeviceError
from lfs_cli.kernels import hopper_attention, triton_attention
from lfs_cli.model import ATTENTION
from lfs_cli.runs.bench import _keep_tuned
from lfs_cli.runs.observer import Observer

SHAPE = Shape(1, 2, 2, 8, 4, torch.float32)
INPUTS = draw(SHAPE, 0, torch.device("cpu"))


def output(inputs: Inputs = INPUTS) -> dict[str, Tensor]:
    return {"output": ATTENTION.get("reference")(*inputs[:3], causal=True).detach()}


class FakeKernel:
    """Takes as long as `seconds` says for a choice of two numbers, and can spill, fail and be wrong."""

    def __init__(self, seconds: Callable[[int, int], float], **faults: set[Choice]) -> None:
        self.seconds, self.faults = seconds, faults
        self.last: Choice = (0, 0)
        self.timed: list[Choice] = []
        self.compiled: list[Choice] = []

    def run(self, choice: Choice) -> dict[str, Tensor]:
        self.last = choice
        self.compiled.append(choice)
        if choice in self.faults.get("fails", ()):
            raise RuntimeError("PassManager::run failed\nmore")
        found = output()
        return {"output": found["output"] * 2} if choice in self.faults.get("wrong", ()) else found

    def spilled(self) -> int | None:
        return 16 if self.last in self.faults.get("spills", ()) else 0

    def timer(self, run: Callable[[], object]) -> float:
        run()
        self.timed.append(self.last)
        return self.seconds(*self.last)

    def rows(self, start: Choice = (32, 1), **bench) -> dict[Choice, dict]:
        tunable = Tunable(
            kernel="forward",
            bucket={"bytes": 4},
            names=("block", "stages"),
            ladders=((16, 32, 64, 128), (1, 2, 3)),
            start=start,
            kind="forward",
            run=self.run,
            spilled_bytes=self.spilled,
        )
        bench = {"warmup": 1, "repeats": 3, **bench}
        found = search(tunable, SHAPE, INPUTS, Bench(torch.device("cpu"), timer=self.timer, **bench))
        return {tuple(row["choice"].values()): row for row in found}


def distance_to(block: int, stages: int) -> Callable[[int, int], float]:
    return lambda b, s: 1.0 + 0.1 * abs(b.bit_length() - block.bit_length()) + 0.05 * abs(s - stages)


def best(rows: dict[Choice, dict]) -> list[Choice]:
    return [choice for choice, row in rows.items() if row["is_best"]]


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
    real = attention_tuning._refusal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tuning, "_refusal", lambda choice, *rest: judged.append(choice) or real(choice, *rest))
        kernel.rows()
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [((), ["hopper forward", "dq", "dkdv"]), (("hopper",), ["hopper forward"]), (("triton",), ["dq", "dkdv"])],
)
def test_what_was_found_before_an_interruption_is_kept(
    names: tuple[str, ...], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(kernel: str, *_: object) -> list[dict]:
        if kernel == "forward":
            raise KeyboardInterrupt
        row = next(row for row in FakeKernel(distance_to(64, 2)).rows().values() if row["is_best"])
        return [row | {"kernel": kernel}]

    kernels = [SimpleNamespace(kernel=kernel) for kernel in ("hopper forward", "dq", "dkdv", "forward")]
    monkeypatch.setattr(attention, "kernels_of", lambda *_: iter(kernels))
    monkeypatch.setattr(attention, "search", lambda tunable, *_: search(tunable.kernel))
    monkeypatch.setattr(attention, "unavailable_reason", lambda *_: None)
    notes: list[str] = []
    bench = Bench(torch.device("cpu"), torch.float32, on_note=notes.append)
    rows = attention._tune_all([SHAPE], names, 0, bench)
    assert [row["kernel"] for row in rows] == expected
    assert (notes[-1] == "interrupted; what was found is kept") == (names != ("hopper",))
    kernels[0].kernel = "forward"
    with pytest.raises(KeyboardInterrupt):
        attention._tune_all([SHAPE], (), 0, bench)


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

"""Measuring: order, medians, ratios, memory, and what happens to a candidate that cannot run."""

import pytest
import torch

from lfs_cli.benchmarks import machine, measure
from lfs_cli.benchmarks.measure import Bench, Candidate, Measurement, Timing, is_out_of_memory

CPU = torch.device("cpu")


class FakeTimer:
    """Plays back seconds instead of measuring them, and remembers the order of the calls."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order: list[str] = []

    def __call__(self, run) -> float:
        name = run()
        self.order.append(name)
        return next(self.seconds[name])


def named(name: str, **rest) -> Candidate:
    return Candidate(name, lambda: name, **rest)


def test_warm_up_runs_do_not_count_and_candidates_take_turns() -> None:
    timer = FakeTimer({"a": [9.0, 1.0, 2.0], "b": [9.0, 4.0, 6.0]})
    bench = Bench(CPU, warmup=2, repeats=2, timer=timer)  # the first warm-up measures memory and not time
    result = bench.measure("x", [named("a"), named("b")])
    assert timer.order == ["b", "a", "a", "b", "b", "a"]
    assert result["a"].timing == Timing((1.0, 2.0))
    assert result["b"].timing == Timing((4.0, 6.0))


def test_every_run_is_prepared_and_finished() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("prepare", "run", "finish")}
    Bench(CPU, warmup=1, repeats=2).measure("x", [Candidate("a", **steps)])
    assert calls == ["prepare", "run", "finish"] * 3


def test_a_row_has_median_spread_and_ratio() -> None:
    slow, fast = Measurement(Timing((1.0, 2.0, 3.0, 4.0, 10.0))), Measurement(Timing((1.5,)), peak_bytes=7)
    row = fast.row(slow, "slow")
    assert row["speed_ratio"] == 2.0
    assert row["baseline"] == "slow"
    assert row["peak_bytes"] == 7
    assert (row["q1_ms"], row["std_ms"], row["runs"]) == (1500.0, 0.0, 1)
    row = slow.row(slow, "slow")
    assert [row[f"{name}_ms"] for name in ("min", "q1", "median", "q3", "max", "mean")] == [
        1000.0,
        2000.0,
        3000.0,
        4000.0,
        10000.0,
        4000.0,
    ]
    assert row["speed_ratio"] == 1.0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_running_out_of_memory_is_a_row_and_the_others_go_on(error: Exception) -> None:
    def fail() -> None:
        raise error

    timer = FakeTimer({"b": [1.0, 1.0]})
    result = Bench(CPU, warmup=0, repeats=2, timer=timer).measure("x", [Candidate("a", fail), named("b")])
    row = result["a"].row(result["b"], "b")
    assert row["status"] == "out of memory"
    assert row["median_ms"] is None
    assert row["speed_ratio"] is None
    assert set(row) == set(result["b"].row())
    assert result["b"].timing == Timing((1.0, 1.0))


def test_the_refused_amount_is_told() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total of ...")

    result = Bench(CPU, repeats=1).measure("x", [Candidate("a", fail)])
    assert result["a"].note == "64.00 GiB were refused"


def test_a_real_refusal_of_the_system_is_recognized() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Bench(CPU, repeats=1).measure("x", [Candidate("a", fail)])


def test_an_absurd_size_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10_000_000_000)
    result = Bench(CPU, repeats=1).measure("x", [named("a", needs_bytes=9_000_000_000)])
    assert (result["a"].status, result["a"].timing) == ("out of memory", None)
    assert result["a"].note == "needs about 9.0 GB, and 10.0 GB are free"


def test_an_unavailable_candidate_says_why() -> None:
    row = Bench(CPU, repeats=1).measure("x", [named("a", unavailable="needs a GPU")])["a"].row()
    assert (row["status"], row["note"]) == ("unavailable", "needs a GPU")


def test_a_slow_comparison_stops_early_but_is_measured() -> None:
    bench = Bench(CPU, warmup=3, repeats=10, max_seconds=0.0, timer=FakeTimer({"a": [1.0]}))
    assert bench.measure("x", [named("a")])["a"].timing == Timing((1.0,))


def test_progress_reaches_its_end() -> None:
    seen = []
    bench = Bench(CPU, warmup=1, repeats=2, on_progress=lambda label, done, total: seen.append((label, done, total)))
    bench.measure("x", [Candidate("a"), Candidate("b")])
    assert seen[-1] == ("x", 6, 6)


def test_peak_memory_sees_a_temporary_tensor() -> None:
    def run() -> float:
        return torch.ones(8_000_000).sum().item()

    peak = Bench(CPU, warmup=0, repeats=1).measure("x", [Candidate("a", run)])["a"].peak_bytes
    method = machine.PeakMemory(CPU).method
    assert (peak is None) == (method is None) or peak is None
    assert peak is None or 30_000_000 < peak < 60_000_000


def test_the_environment_names_hardware_and_versions() -> None:
    found = machine.environment(CPU)
    assert {"date", "hardware", "cores", "memory_bytes", "versions", "commit"} <= set(found)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1


def test_the_machines_name_can_be_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_name", lambda: "Intel(R) Xeon(R) @ 2.0/3.0 GHz")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.machine_name(CPU) == "intel-xeon-2-0-3-0-ghz-2-cores"

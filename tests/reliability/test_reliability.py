"""The short versions of the long tests: some cases of the fuzz, all hostile files, a few rounds of the soak."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reliability import __main__ as reliability
from tests.reliability import soak
from tests.reliability.formats import FORMATS
from tests.reliability.fuzz import ROOT, Tally, fuzz
from tests.reliability.hostile import CASES, Case, prepare, run_case
from tests.reliability.worker import Desk

FUZZ_CASES = 12


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    return dict(fuzz(FORMATS, range(FUZZ_CASES), seed=1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_loads_or_is_refused(name: str, tallies: dict[str, Tally]) -> None:
    tally = tallies[name]
    assert tally.broken == []
    assert tally.tried == FUZZ_CASES
    assert tally.loaded + tally.refused > 0


def test_the_worker_sees_another_exception_too_much_memory_and_a_wait(tmp_path: Path) -> None:
    """What it looks for is found where it is: in a reader that fails in other ways than it may."""
    script = """
import time
from dataclasses import replace
from tests.reliability import formats, worker

def fails():
    raise KeyError("x")

ways = iter([lambda: None, fails, lambda: bytearray(1 << 40), lambda: time.sleep(60)])
broken = replace(formats.FORMATS["weights"], read=lambda folder: next(ways)())
formats.FORMATS["weights"] = broken
worker.SECONDS = 1
worker.work([("weights", case) for case in range(5)], 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    outcomes = done.stdout.splitlines()
    assert [outcome.partition(":")[0] for outcome in outcomes] == [
        '["weights", 0, "KeyError',
        '["weights", 1, "MemoryError',
    ]
    assert done.returncode == 1
    assert "most recent call first" in done.stderr  # where it waited


def test_a_worker_that_ends_is_started_again_behind_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def work(todo, seed):
        started.append(todo[0])
        for name, case in todo:
            if (name, case) in (("config", 1), ("weights", 2)):
                return
            yield name, case, "loaded"

    monkeypatch.setattr("tests.reliability.fuzz._work", work)
    tallies = dict(fuzz(["config", "weights"], range(3)))
    assert started == [("config", 0), ("config", 2)]
    assert [(tally.loaded, [case for case, _ in tally.broken]) for tally in tallies.values()] == [(2, [1]), (2, [2])]


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    format = FORMATS["config"]
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        desk = Desk(format, tmp_path / name)
        for case in range(20):
            desk.damage(7, case)
            contents.append((tmp_path / name / "config.json").read_bytes())
            desk.restore()
        assert (tmp_path / name / "config.json").read_bytes() not in contents
    assert contents[:20] == contents[20:]
    assert len(set(contents)) == 20


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LFS_DATA", raising=False)
        prepare(folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and devices are those of POSIX")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_file_does_no_harm(
    case: Case, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LFS_DATA", raising=False)
    run_case(case, template, tmp_path)


def test_a_case_that_writes_beside_its_folder_is_noticed(template: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="outside"):
        run_case(Case("escapes", lambda: Path("../outside.txt").touch()), template, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="handles, threads and memory are counted in /proc")
def test_a_short_soak_leaves_nothing_behind(tmp_path: Path) -> None:
    samples = soak.soak(0, tmp_path)
    assert soak.complaints(samples, allowed=50e6) == []  # three rounds are still warming up
    assert len(samples) == 3


def test_the_soak_complains_of_what_grows() -> None:
    flat = [soak.Sample(float(round), 400_000_000 + round % 3, 6, 1, ()) for round in range(40)]
    assert soak.complaints(flat) == []
    assert soak.growth(flat) == pytest.approx(0, abs=10)
    growing = [replace(sample, resident=400_000_000 + int(sample.seconds) * 1_000_000) for sample in flat]
    assert soak.growth(growing) == pytest.approx(29e6)
    reading = [replace(sample, tensors=1000 * round) for round, sample in enumerate(growing)]
    assert soak.growth(soak.without(reading, 900.0)) == pytest.approx(2.9e6)
    last = replace(growing[-1], handles=7, threads=2, strangers=("runs/x",))
    assert [complaint.split()[0] for complaint in soak.complaints([*growing[:-1], last])] == [
        "memory",
        "open",
        "threads",
        "left",
    ]


def test_the_commands_are_found_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"fuzz", "hostile", "soak", "round_trips"} <= reliability.commands().keys()
    assert reliability.main([]) == 0
    assert reliability.main(["unknown"]) == 2
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in reliability.commands())

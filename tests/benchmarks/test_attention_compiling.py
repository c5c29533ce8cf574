"""Compiling ahead: workers do what they are told, and nothing that happens to them happens to the search."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfs_cli.benchmarks import attention_compiling
from lfs_cli.benchmarks.attention_compiling import MOST_CRASHES, Compilers, compiling_ahead, run_once
from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.attention_tuning import Choice, Tunable, nothing_ahead

CPU = torch.device("cpu")
SHAPE = Shape(4, 4, 2, 8, 16, torch.bfloat16)
CRASHING = (0, 0)


def write(shape: Shape, device: torch.device, kernel: str, choice: Choice) -> None:
    """What the workers of these tests do: `kernel` is a folder."""
    if choice == CRASHING:
        os._exit(3)
    is_deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (Path(kernel) / f"{choice}").write_text(f"{shape.dtype} {device} {is_deaf}")


def sleep(*_) -> None:
    time.sleep(600)


@pytest.mark.slow
def test_every_choice_is_compiled_and_a_crash_costs_no_more_than_what_was_not_done(tmp_path: Path) -> None:
    told: list[int] = []
    compilers = Compilers(CPU, 2, write)
    try:
        compilers(SHAPE, str(tmp_path), [(1, 2), (3, 4), (5, 6)], 500, told.append)
        assert told == [0, 1, 2, 3]
        assert {file.name for file in tmp_path.iterdir()} == {"(1, 2)", "(3, 4)", "(5, 6)"}
        assert {file.read_text() for file in tmp_path.iterdir()} == {"torch.bfloat16 cpu True"}
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

        compilers(SHAPE, str(tmp_path), [CRASHING], 500, told.append)
        compilers(SHAPE, str(tmp_path), [(7, 8)], 500, told.append)
        assert (tmp_path / "(7, 8)").exists()
        assert compilers.crashes == 1
    finally:
        compilers.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_are_killed_when_the_time_is_over() -> None:
    told: list[int] = []
    compilers = Compilers(CPU, 2, sleep)
    began = time.monotonic()
    assert compilers(SHAPE, "forward", [(1,), (2,), (3,)], 0.5, told.append) == [(1,), (2,)]
    assert time.monotonic() - began < 60
    assert told == [0]
    assert compilers.crashes == 0
    assert not multiprocessing.active_children()
    compilers.close()


def sleep_or_write(shape: Shape, device: torch.device, kernel: str, choice: Choice) -> None:
    if choice < (3,):
        time.sleep(600)
    write(shape, device, kernel, choice)


@pytest.mark.slow
def test_what_does_not_end_is_given_up_and_named_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attention_compiling, "PATIENCE", 20.0)
    told: list[int] = []
    compilers = Compilers(CPU, 2, sleep_or_write)  # as many workers as there are choices that do not end
    began = time.monotonic()
    assert compilers(SHAPE, str(tmp_path), [(1,), (2,), (3,), (4,), (5,)], 500, told.append) == [(1,), (2,)]
    assert time.monotonic() - began < 100
    assert told == [0, 1, 2, 3]
    assert {file.name for file in tmp_path.iterdir()} == {"(3,)", "(4,)", "(5,)"}
    compilers.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("crashes", "seconds"), [(MOST_CRASHES, 10.0), (0, 0.0)])
def test_nothing_is_started_for_nothing(crashes: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_compiling, "ProcessPoolExecutor", None)
    compilers = Compilers(CPU, 2, sleep)
    compilers.crashes = crashes
    assert not compilers(SHAPE, "forward", [(1,)], seconds, lambda done: pytest.fail("there is nothing to tell"))
    compilers.close()


def test_where_no_worker_can_be_started_the_search_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(attention_compiling, "ProcessPoolExecutor", refuse)
    compilers = Compilers(CPU, 2, sleep)
    for _ in range(2):
        compilers(SHAPE, "forward", [(1,)], 10.0, lambda done: None)
    assert compilers.crashes == MOST_CRASHES
    compilers.close()


def test_without_a_gpu_nothing_is_compiled_ahead() -> None:
    with compiling_ahead(CPU) as ahead:
        assert ahead is nothing_ahead
        assert not ahead(SHAPE, "forward", [(1, 2)], 1.0, print)


def test_a_gpu_gets_half_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 2, 9, 64):
        monkeypatch.setattr(attention_compiling, "cores", lambda cores=cores: cores)
        with compiling_ahead(torch.device("cuda")) as ahead:
            found.append(ahead.workers)
            assert ahead.work is run_once
    assert found == [1, 1, 4, 12]


def test_a_worker_runs_the_kernel_on_one_sequence_and_keeps_errors_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, drawn = [], []

    def run(choice: Choice) -> dict[str, Tensor]:
        ran.append(choice)
        if choice == CRASHING:
            raise RuntimeError("out of resource: shared memory")
        return {}

    def kernels_of(shape: Shape, inputs: tuple[Tensor, ...]) -> list[Tunable]:
        drawn.append((shape, [tuple(x.shape) for x in inputs], {x.dtype for x in inputs}))
        return [Tunable("dq", {}, ("a", "b"), ((1,), (2,)), (1, 2), "backward", run)]

    monkeypatch.setattr(attention_compiling, "kernels_of", kernels_of)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ran.append(device))
    attention_compiling._tunables.cache_clear()
    for choice in ((1, 2), CRASHING, (3, 4)):
        run_once(SHAPE, CPU, "dq", choice)
    assert ran == [(1, 2), CPU, CRASHING, (3, 4), CPU]
    heads = [(1, 8, 4, 16), (1, 8, 2, 16), (1, 8, 2, 16), (1, 8, 4, 16)]
    assert drawn == [(replace(SHAPE, batch=1), heads, {torch.bfloat16})]
    attention_compiling._tunables.cache_clear()


SCRIPT = """
import sys, torch
from contextlib import suppress
from lfs_cli.benchmarks.attention import draw
from lfs_cli.benchmarks.attention_compiling import run_once
from lfs_cli.benchmarks.attention_shapes import Shape
from lfs_cli.benchmarks.attention_tuning import kernels_of

device, shape = torch.device("cuda"), Shape(4, 4, 2, 256, 64, torch.bfloat16)
for tunable in kernels_of(shape, draw(shape, 0, device)):
    for choice in (tunable.start, tunable.neighbours(tunable.start)[-1]):
        if sys.argv[1] == "worker":
            run_once(shape, device, tunable.kernel, choice)
            continue
        with suppress(Exception):  # a tile may be too large to run; it is compiled all the same
            tunable.run(choice)
"""


@pytest.mark.gpu
def test_what_a_worker_has_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    def compiled_by(who: str) -> set[str]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", SCRIPT, who], env=environment, check=True)
        return {path.name for path in tmp_path.iterdir()}

    by_worker = compiled_by("worker")
    assert by_worker
    assert compiled_by("search") == by_worker

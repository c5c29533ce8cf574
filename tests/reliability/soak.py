"""Soak: train, evaluate, checkpoint, stop, resume, write and report, again and again, and watch what is left behind.

One process does it all. Its memory after each round is fitted by a line from the first quarter on, when caches are
full; the promise is that the line is flat, that no file handle or thread is left, and that the disk holds what the runs
are said to leave and nothing else.

One thing is taken off first: safetensors 0.8 loses some 60 bytes with each tensor that it reads from a file, which is
10 kB a round here, and 5 MB in ten minutes. A program that resumes once never sees them. How much it is, is measured
when the rounds are over, by reading a file of many tensors again and again, and it is shown.
"""

import argparse
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lfs_cli.config import GenerateConfig, ReportConfig, TrainConfig
from lfs_cli.memory import release_free_memory, resident_bytes
from lfs_cli.model import weights
from lfs_cli.runs.changes import resumed_config
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.generate import generate
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.report import report
from lfs_cli.runs.train import train

NAME = "soak"
HELP = "train, evaluate, checkpoint, stop, resume, generate and report for 10 minutes: memory, handles, files stay flat"

GROWTH_ALLOWED = 4e6
"""Bytes that memory may grow after the warm-up: noise of the allocator, far from one leaked checkpoint a round."""

STEPS = 24
STOPS = (5, 14)
"""Steps after which a run is asked to stop, and is resumed."""


@dataclass(frozen=True)
class Sample:
    """What one round has left behind.

    Args:
        seconds: Since the start.
        resident: Bytes held.
        handles: Open files.
        threads: Of this process.
        strangers: Files that should not be there.
        tensors: Read from files so far.
    """

    seconds: float
    resident: int
    handles: int
    threads: int
    strangers: tuple[str, ...]
    tensors: int = 0


class Readings:
    """Counts the tensors that lfs reads from files while the block runs."""

    def __init__(self) -> None:
        self.tensors = 0
        self._read = weights.load_file

    def __enter__(self) -> "Readings":
        weights.load_file = self._count
        return self

    def __exit__(self, *_: object) -> None:
        weights.load_file = self._read

    def _count(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        found = self._read(*arguments, **named)
        self.tensors += len(found)
        return found


class StopsAt(Observer):
    """Sends this process a SIGTERM after a step, as a scheduler does before it takes the machine away."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, record) -> None:
        if record.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def config(seed: int) -> TrainConfig:
    """A model of a few thousand weights, of which every part is used."""
    return TrainConfig.model_validate_json(
        f"""{{
            "name": "soak", "seed": {seed}, "steps": {STEPS}, "batch_size": 4, "device": "cpu",
            "data": {{"dataset": "sample", "sample_bytes": 60000}},
            "model": {{"vocab_size": 300, "context_length": 32, "width": 32, "layers": 2, "heads": 2}},
            "eval_every": 6, "eval_batches": 2, "checkpoint_every": 4, "keep_checkpoints": 2,
            "sample_tokens": 8, "sample_prompt": "Once"
        }}"""
    )


def one_round(data: DataFolder, seed: int) -> None:
    """Train with two stops to the end, write a text with the result, report, and remove the run."""
    settings = config(seed)
    result = train(settings, data=data, observer=StopsAt(STOPS[0]))
    for stop in (*STOPS[1:], STEPS + 1):
        assert result.status == "stopped", result.status
        run = RunFolder(result.directory)
        result = train(resumed_config(run)[0], data=data, observer=StopsAt(stop), resume=run)
    assert (result.status, result.steps) == ("finished", STEPS)
    generate(GenerateConfig(prompts=("Once",), run=str(result.directory), max_tokens=8, device="cpu"), data)
    report(ReportConfig(runs=(str(result.directory),)), data)
    shutil.rmtree(result.directory)
    data.table.unlink()  # it keeps the rows of runs that are gone: what all its readers hold would grow with it


def soak(minutes: float, folder: Path, *, fewest: int = 3) -> list[Sample]:
    """Repeat `one_round` for so many minutes, and at least ``fewest`` times, and return a sample after each."""
    data = DataFolder(folder)
    began, samples = time.monotonic(), []
    known: set[str] | None = None
    with Readings() as readings:
        while len(samples) < fewest or time.monotonic() - began < 60 * minutes:
            one_round(data, seed=len(samples))
            files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
            known = known if known is not None else {name for name in files if not _is_left_over(name)}
            strangers, seconds = tuple(sorted(files - known)), time.monotonic() - began
            samples.append(Sample(seconds, _settled_bytes(), _handles(), _threads(), strangers, readings.tensors))
    return samples


def lost_a_tensor(folder: Path, tensors: int = 1000, times: int = 200) -> float:
    """Return the bytes that safetensors loses with each tensor that it reads from a file."""
    path = folder / "many.safetensors"
    save_file({f"{number}": torch.zeros(8) for number in range(tensors)}, path)
    for _ in range(times // 10):
        load_file(path)
    before = _settled_bytes()
    for _ in range(times):
        load_file(path)
    path.unlink()
    return max(0.0, (_settled_bytes() - before) / times / tensors)


def without(samples: Sequence[Sample], lost: float) -> list[Sample]:
    """Return ``samples`` without ``lost`` bytes of memory for each tensor that was read."""
    return [replace(sample, resident=round(sample.resident - lost * sample.tensors)) for sample in samples]


def growth(samples: Sequence[Sample]) -> float:
    """Return the bytes that memory grows from the first quarter to the end, by the line of least squares."""
    warm = samples[len(samples) // 4 :]
    mean_time = sum(sample.seconds for sample in warm) / len(warm)
    mean_size = sum(sample.resident for sample in warm) / len(warm)
    spread = sum((sample.seconds - mean_time) ** 2 for sample in warm)
    together = sum((sample.seconds - mean_time) * (sample.resident - mean_size) for sample in warm)
    return together / spread * (warm[-1].seconds - warm[0].seconds) if spread else 0.0


def complaints(samples: Sequence[Sample], allowed: float = GROWTH_ALLOWED) -> list[str]:
    """Return which promises were broken, in words."""
    first, last = samples[len(samples) // 4], samples[-1]
    found = []
    if growth(samples) > allowed:
        found.append(f"memory grew by {growth(samples) / 1e6:.1f} MB after the warm-up")
    if last.handles > first.handles:
        found.append(f"open files went from {first.handles} to {last.handles}")
    if last.threads > first.threads:
        found.append(f"threads went from {first.threads} to {last.threads}")
    strangers = sorted({name for sample in samples for name in sample.strangers})
    if strangers:
        found.append(f"left on the disk: {', '.join(strangers[:5])}")
    return found


def _is_left_over(name: str) -> bool:
    """Whether a file is a draft or a run: of those a round leaves none. Locks stay, for the next who takes them."""
    path = Path(name)
    is_draft = path.name.startswith(".") and not path.name.endswith(".lock")
    return is_draft or path.suffix == ".tmp" or (path.parts[0] == "runs" and len(path.parts) > 1)


def _settled_bytes() -> int:
    gc.collect()
    release_free_memory()
    return resident_bytes() or 0


def _handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 0


def main(arguments: list[str]) -> int:
    """Run for `--minutes`, print what was seen and return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.reliability {NAME}", description=HELP)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--short", action="store_true", help="half a minute")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(0.5 if options.short else options.minutes, Path(folder))
        lost = lost_a_tensor(Path(folder))
    raw, samples = samples, without(samples, lost)
    warm, last = samples[len(samples) // 4], samples[-1]
    print(f"rounds\t{len(samples)} (each {STEPS} steps, {len(STOPS)} stops, {len(STOPS)} resumes)")
    print(f"seconds\t{last.seconds:.0f}")
    warm_bytes, last_bytes = raw[len(raw) // 4].resident, raw[-1].resident
    print(f"memory\t{warm_bytes / 1e6:.1f} MB after the warm-up, {last_bytes / 1e6:.1f} MB at the end")
    print(f"growth\t{growth(raw) / 1e6:+.2f} MB by the line of least squares")
    print(
        f"lost\tby safetensors: {lost:.0f} bytes with each of {last.tensors - warm.tensors:,} tensors read from files"
    )
    print(f"without\t{growth(samples) / 1e6:+.2f} MB, {GROWTH_ALLOWED / 1e6:.0f} MB allowed")
    print(f"handles\t{warm.handles} -> {last.handles}")
    print(f"threads\t{warm.threads} -> {last.threads}")
    found = complaints(samples)
    for complaint in found:
        print(f"broken\t{complaint}")
    return 1 if found else 0

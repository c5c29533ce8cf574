"""How lfs measures: implementations take turns, round by round, and each is told by its median and spread.

One measurement is one call, timed on its own. What must not count happens in `Candidate.prepare`. A round calls every
candidate once, each round beginning with the next one, so that a machine that warms up or is busy for a moment treats
all alike; a ratio to the baseline is then a ratio of medians from the same minutes. The first run of a candidate warms
it up and measures its memory. A candidate that runs out of memory, fails or cannot run here stays in the result with
the reason.

Times on CUDA come from events, after 256 MiB of other memory were written: that empties the L2 cache, and it keeps the
GPU busy while the processor launches what is timed. Elsewhere they come from the wall clock.
"""

import gc
import logging
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lfs_cli.benchmarks.machine import PeakMemory, free_bytes
from lfs_cli.config import BenchConfig
from lfs_cli.model.device import is_out_of_memory, release_memory
from lfs_cli.registry import Registry

_log = logging.getLogger(__name__)

Row = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]
"""Calls a function once and returns the seconds it took."""

FLUSH_BYTES = 256 * 2**20
"""Memory written before a timed run on CUDA, several times any L2 cache: a kernel that finds its inputs there looks
faster than it is in a model."""

FLUSHES = 16
"""How often: some 1.5 ms on an H100. Meanwhile the host prepares the run and is ahead of the GPU, as in a training
loop; else short kernels would be timed by how long they take to launch."""

SAFE_SHARE = 0.8
"""Share of the free memory that a candidate may need without a GPU, where asking for more can stall the machine."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing.

    Args:
        seconds: One entry a run; at least one.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Bounds of the middle half of the runs, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def row(self) -> Row:
        """Return the numbers that go into a record, in milliseconds."""
        low, high = self.quartiles
        spread = statistics.stdev(self.seconds) if len(self.seconds) > 1 else 0.0
        milliseconds = {
            "median_ms": self.median,
            "q1_ms": low,
            "q3_ms": high,
            "min_ms": min(self.seconds),
            "max_ms": max(self.seconds),
            "mean_ms": statistics.fmean(self.seconds),
            "std_ms": spread,
        }
        return {**{name: 1e3 * value for name, value in milliseconds.items()}, "runs": len(self.seconds)}


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Candidate:
    """One implementation to be timed.

    Args:
        name: What it is called in the rows.
        run: The call that is timed.
        prepare: Called before each run, not timed.
        finish: Called after each run, not timed: drops what the run left.
        needs_bytes: Estimated memory of one run; refused beforehand where it would not fit in the memory of a CPU.
        unavailable: Why it cannot run here; None when it can.
        may_fail: Whether an error is a result to be told, as for software of others, and no reason to stop.
    """

    name: str
    run: Callable[[], Any] = _nothing
    prepare: Callable[[], Any] = _nothing
    finish: Callable[[], Any] = _nothing
    needs_bytes: int = 0
    unavailable: str | None = None
    may_fail: bool = False


@dataclass(frozen=True)
class Measurement:
    """What became of a candidate.

    Args:
        timing: Its runs; None when there are none.
        peak_bytes: Most memory held at once in one run, beyond what was held before `prepare`; None when not known.
        status: ``ok``, ``out of memory``, ``failed`` or ``unavailable``.
        note: Why it is not ``ok``, or what to know about it if it is.
    """

    timing: Timing | None = None
    peak_bytes: int | None = None
    status: str = "ok"
    note: str = ""

    def row(self, baseline: "Measurement | None" = None, baseline_name: str = "") -> Row:
        """Return the numbers that go into a record. `speed_ratio` 2.0 means half the time of the baseline."""
        timing = self.timing.row() if self.timing else dict.fromkeys(Timing((0.0,)).row())
        ratio = None
        if self.timing and baseline and baseline.timing and self.timing.median > 0:
            ratio = baseline.timing.median / self.timing.median
        return {
            **timing,
            "baseline": baseline_name,
            "speed_ratio": ratio,
            "peak_bytes": self.peak_bytes,
            "status": self.status,
            "note": self.note,
        }


@dataclass(frozen=True)
class Bench:
    """Where parts are put to be measured: a device, a clock, and how often.

    Args:
        device: Where to compute.
        dtype: Type of the numbers.
        warmup: Runs of each candidate that are not counted.
        repeats: Runs of each candidate that are counted.
        max_seconds: Time after which a comparison stops early, but never before one counted round.
        timer: Times one call; by default the right one for ``device``.
        on_progress: Told the label of the work, how many runs are done and how many there will be.
        on_note: Told in a sentence what a reader of the rows must know.
        on_table: Given the name and rows of a table that stands beside the rows; several of one name are one table.
        text: Training text for the tokenizer; None for the built-in stories.
        checkpoint: Folder of a trained model; None for random weights.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    warmup: int = 3
    repeats: int = 10
    max_seconds: float = 10.0
    timer: Timer | None = None
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None
    on_note: Callable[[str], None] = lambda text: None
    on_table: Callable[[str, list[Row]], None] = lambda name, rows: None
    text: Path | None = None
    checkpoint: Path | None = None

    def measure(self, label: str, candidates: Sequence[Candidate]) -> dict[str, Measurement]:
        """Return what became of each of ``candidates``, by name and in their order.

        Args:
            label: What is compared, for whoever watches.
            candidates: Names must differ. None of them may keep memory from one run to the next.
        """
        gc.collect()  # what is garbage now must not be freed in the middle of a run
        trials = {candidate.name: _Trial(candidate, self.device) for candidate in candidates}
        timer = self.timer or timer_for(self.device)
        rounds = self.warmup + self.repeats
        began = time.perf_counter()
        late = False
        for number in range(rounds):
            is_counted = number >= self.warmup or late
            for turn in range(len(candidates)):
                candidate = candidates[(number + turn) % len(candidates)]
                trials[candidate.name].run(timer, is_counted=is_counted)
                self.on_progress(label, number * len(candidates) + turn + 1, rounds * len(candidates))
            late = time.perf_counter() - began > self.max_seconds
            if late and is_counted:
                break
        return {name: trial.result() for name, trial in trials.items()}


@dataclass
class _Trial:
    """One candidate on its way through the rounds."""

    candidate: Candidate
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    has_run: bool = False
    status: str = "ok"
    note: str = ""

    def __post_init__(self) -> None:
        if self.candidate.unavailable is not None:
            self.status, self.note = "unavailable", self.candidate.unavailable
            return
        refusal = memory_refusal(self.candidate.needs_bytes, self.device)
        if refusal is not None:
            self.status, self.note = "out of memory", refusal

    def run(self, timer: Timer, *, is_counted: bool) -> None:
        if self.status != "ok":
            return
        try:
            if not self.has_run:
                self.has_run = True
                self._measure_memory()
                if not is_counted:
                    return
            self.candidate.prepare()
            seconds = timer(self.candidate.run)
            self.candidate.finish()
        except Exception as error:
            if not (is_out_of_memory(error) or self.candidate.may_fail):
                raise
            self.status, self.note = describe_failure(error)
            self.seconds.clear()
            self.peak_bytes = None
        else:
            if is_counted:
                self.seconds.append(seconds)
            return
        release_memory(self.device)  # after the handler, whose traceback still held the tensors

    def _measure_memory(self) -> None:
        """Run once, uncounted, with the memory meter on: reading it would disturb a run that is timed."""
        memory = PeakMemory(self.device)
        memory.start()
        self.candidate.prepare()
        memory.reset()
        self.candidate.run()
        self.peak_bytes = memory.peak_bytes()
        self.candidate.finish()

    def result(self) -> Measurement:
        timing = Timing(tuple(self.seconds)) if self.seconds else None
        return Measurement(timing, self.peak_bytes, self.status, self.note)


def timer_for(device: torch.device) -> Timer:
    """Return the timer that is right for ``device``: CUDA events, or a clock around finished work."""
    if device.type == "cuda":
        return _cuda_timer(device)
    wait = torch.mps.synchronize if device.type == "mps" else _nothing

    def by_clock(run: Callable[[], Any]) -> float:
        wait()
        began = time.perf_counter()
        result = run()
        wait()
        seconds = time.perf_counter() - began
        del result  # freeing it is not part of the work
        return seconds

    return by_clock


def _cuda_timer(device: torch.device) -> Timer:
    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def by_events(run: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        for _ in range(FLUSHES):
            other.zero_()
        start.record()
        result = run()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop) / 1e3

    return by_events


def memory_refusal(needs_bytes: int, device: torch.device) -> str | None:
    """Return why ``needs_bytes`` should not be asked for, or None. CUDA refuses by itself, without harm to anybody."""
    free = None if device.type == "cuda" else free_bytes(device)
    if free is None or needs_bytes <= SAFE_SHARE * free:
        return None
    return f"needs about {needs_bytes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"


def describe_failure(error: BaseException) -> tuple[str, str]:
    """Return the status and the note of a row for what raised ``error``."""
    if is_out_of_memory(error):
        return "out of memory", _amount_asked(error)
    _log.info("a candidate failed", exc_info=error)
    message = next(iter(str(error).strip().splitlines()), "")
    return "failed", f"{type(error).__name__}: {message[:200]}".removesuffix(": ")


def _amount_asked(error: BaseException) -> str:
    """Return the amount that was refused, as far as the message tells."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", str(error))
    return f"{found[1]} were refused" if found else ""


class Benchmark(Protocol):
    """Measures one part of lfs beside a baseline."""

    def __call__(self, settings: BenchConfig, bench: Bench) -> list[Row]:
        """Return one row for each thing measured."""
        ...


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", room="lfs_cli.benchmarks")

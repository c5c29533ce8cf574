"""`lfs bench attention --tune`: look for faster tiles of our kernels, on this GPU and these shapes.

A kernel is offered as a `Tunable`: where it starts, which values each of its numbers may take, and how to run it with a
choice of them. From the start the search tries all neighbours, which differ in one number by one step, and goes to the
fastest, until none saves more than `GAIN`. A neighbour must compile without spills and compute the right numbers before
it is timed; after two runs those far behind are dropped, and the rest takes turns with the best so far. (Spills of the
Hopper kernels are not looked at: ptxas counts those before and after the loops too, which cost next to nothing.)

Compiling takes most of the time. So the neighbours of a step are compiled together first, in other processes
(`attention_compiling.py`), and nothing is timed meanwhile. All kernels of a shape share one time limit,
`--max-seconds`, or `TUNING_SECONDS` where that is not given. When it is over, what has been checked is timed, the best
of it is told with a note that there was no more time, and kernels that have not begun are left out. What cannot be
stopped passes the limit: the compilation at hand, a race of `RACE_SECONDS`, and the start of the first kernel, which is
always tried.

What is timed is the pass that the kernel belongs to, as that is what a user waits for: a backward pass is several
kernels, of which one changes.

Rows say for every choice what became of it: `ok`, `slow` (dropped early), `spills`, `wrong`, `failed`, `out of memory`.
The row of each kernel that `is_best` is kept in `data/benchmarks/tuned_attention.json`, with GPU, versions and date.
Kernels do not read that file: to make a choice everybody's, copy it into the table of the kernel's file.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.attention_accuracy import TENSORS, Inputs, Judge
from lfs_cli.benchmarks.attention_shapes import PASSES, Shape, describe
from lfs_cli.benchmarks.measure import Bench, Candidate, Measurement, Row, describe_failure
from lfs_cli.errors import DeviceError
from lfs_cli.kernels import hopper_attention, triton_attention
from lfs_cli.kernels.compatibility import INTERPRETED

Choice = tuple[int, ...]

GAIN = 0.01
"""Share of the time that a neighbour must save to be gone to: less than that is noise."""

HOPELESS = 1.15
"""Times the best of a quick look above which a choice is dropped."""

QUICK_RUNS = 2
"""Runs after which that is decided."""

MOST_STEPS = 6
"""Steps from the start at most; each of them is a handful of compilations."""

TUNING_SECONDS = 120.0
"""Time for all kernels of a shape, where nobody sets another."""

RACE_SECONDS = 1.0
"""What a race may take when no time is left: a best of a single run would be chance."""

HOPPER_LADDERS = {"forward": ((2, 3), (64, 128), (2, 3, 4)), "backward": ((1, 2, 3, 4), (0, 1), (1, 2))}
"""Values of the numbers of `ForwardTile` and `BackwardTile`, in order. No choice of them may wait for ever."""

ENDLESS = "it did not end in a process of its own"

CUT = "best so far, as there was no time to go on"


@dataclass(frozen=True)
class Tunable:
    """A kernel that can be run with one configuration or another.

    Args:
        kernel: Its name in the table of its file.
        bucket: Which problems share a configuration, as fields for the table.
        names: Of the numbers of a choice.
        ladders: The values each number may take, in order.
        start: The choice of the table now.
        kind: The pass it belongs to, `forward` or `backward`.
        run: Computes the pass with a choice; returns tensors (B, T, heads, D) by the names of `TENSORS`.
        spilled_bytes: Bytes that the kernel launched since `forget` keeps outside of registers; None when not known.
        forget: Makes the next launch look for its kernel on disk, as those of other shapes may be in memory.
    """

    kernel: str
    bucket: Mapping[str, Any]
    names: tuple[str, ...]
    ladders: tuple[tuple[int, ...], ...]
    start: Choice
    kind: str
    run: Callable[[Choice], dict[str, Tensor]]
    spilled_bytes: Callable[[], int | None] = lambda: None
    forget: Callable[[], None] = lambda: None

    def neighbours(self, choice: Choice) -> list[Choice]:
        """Return the choices that differ from ``choice`` in one number by one step of its ladder."""
        found = []
        for place, (value, ladder) in enumerate(zip(choice, self.ladders, strict=True)):
            steps = [other for other in ladder if other < value][-1:] + [other for other in ladder if other > value][:1]
            found += [(*choice[:place], step, *choice[place + 1 :]) for step in steps]
        return found


def refuse_without_gpu(device: torch.device) -> None:
    """Raise DeviceError where kernels are not compiled: times of Triton's interpreter say nothing about tiles."""
    if device.type != "cuda" or INTERPRETED:
        what = "Triton interprets kernels here" if INTERPRETED else f"this is {device.type}"
        raise DeviceError(
            f"tiles can only be tuned on a CUDA GPU, and {what}",
            hint="leave out `--tune`, or run it on the machine whose table is to be filled",
        )


Ahead = Callable[[Shape, str, Sequence[Choice], float, Callable[[int], None]], Sequence[Choice]]
"""Compiles choices of a kernel for a shape, within so many seconds, tells how many are done, and returns those that did
not end."""


def nothing_ahead(*_: Any) -> Sequence[Choice]:
    """Leave all compiling to the search."""
    return ()


def countdown(seconds: float) -> Callable[[], float]:
    """Return what tells how many of ``seconds`` from now on are left."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


@dataclass
class Search:
    """A walk from the start to a choice that no neighbour beats. What it has found can be asked for at any time.

    Args:
        tunable: The kernel.
        judge: Knows the shape, and what is right.
        bench: Where it runs, and how often.
        left: Seconds that it may still take.
        ahead: Compiles what will be tried.
        results: Not given: what became of each choice that was tried.
        best: Not given: where the walk is.
        is_done: Not given: whether it has come to its end.
    """

    tunable: Tunable
    judge: Judge
    bench: Bench
    left: Callable[[], float] = lambda: math.inf
    ahead: Ahead = nothing_ahead
    results: dict[Choice, Measurement] = field(default_factory=dict, init=False)
    best: Choice = field(init=False)
    is_done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.best = self.tunable.start

    def run(self) -> None:
        """Walk, until nothing is faster or no time is left."""
        is_whole = True
        for step in range(1, MOST_STEPS + 1):
            fresh = [
                choice for choice in (self.best, *self.tunable.neighbours(self.best)) if choice not in self.results
            ]
            if not fresh:
                break
            if step > 1 and self.left() <= 0:
                return
            label = f"{self.tunable.kernel}, step {step}"
            checked, fit = self._check(fresh, label)
            is_whole = checked == len(fresh)
            racing = list(dict.fromkeys((self.best, *fit))) if self.best not in fresh else fit
            self._race(racing, label)
            times = {choice: _median(self.results[choice]) for choice in racing if self.results[choice].status == "ok"}
            if not times:
                break
            leader = min(times, key=lambda choice: times[choice])
            if self.best in times and times[leader] > (1 - GAIN) * times[self.best]:
                break
            self.best = leader
            milliseconds = f"{1e3 * times[leader]:.4g} ms"
            self.bench.on_note(f"{label}: {len(self.results)} tried, {self._text(leader)} is best, {milliseconds}")
        self.is_done = is_whole

    def _check(self, choices: Sequence[Choice], label: str) -> tuple[int, list[Choice]]:
        """Return how many of ``choices`` there was time to compile and judge, and those that may be timed."""

        def compiled(done: int) -> None:
            self.bench.on_progress(f"compiling {label}", done, len(choices))

        endless = self.ahead(self.judge.shape, self.tunable.kernel, choices, self.left(), compiled)
        fit = []
        for done, choice in enumerate(choices):
            if self.left() <= 0 and choice != self.tunable.start:
                return done, fit
            self.bench.on_progress(f"checking {label}", done, len(choices))
            is_endless = choice in endless and choice != self.tunable.start
            refusal = Measurement(status="failed", note=ENDLESS) if is_endless else self._refusal(choice)
            if refusal is None:
                fit.append(choice)
            else:
                self.results[choice] = refusal
        return len(choices), fit

    def _refusal(self, choice: Choice) -> Measurement | None:
        """Return why ``choice`` is not to be timed: it does not run, spills or is wrong. None when it may be."""
        self.tunable.forget()
        try:
            verdict = self.judge.compare(lambda: self.tunable.run(choice))
        except Exception as error:  # a compiler may raise anything
            status, note = describe_failure(error)
            return Measurement(status=status, note=note)
        spilled = self.tunable.spilled_bytes()
        if spilled:
            return Measurement(status="spills", note=f"{spilled} bytes do not fit into registers")
        complaint = verdict.complaint(self.judge.shape.dtype)
        return Measurement(status="wrong", note=complaint) if complaint else None

    def _race(self, choices: Sequence[Choice], label: str) -> None:
        """Time ``choices`` in turns, most of them only as long as they are not hopeless."""
        quick = self._measure(choices, label, replace(self.bench, warmup=1, repeats=QUICK_RUNS))
        limit = HOPELESS * min(map(_median, quick.values()), default=0.0)
        note = f"over {HOPELESS} times the best after {QUICK_RUNS} runs"
        for choice, result in quick.items():
            if result.timing and result.timing.median > limit:
                self.results[choice] = replace(result, status="slow", note=note)
            else:
                self.results.setdefault(choice, result)  # what has run longer is known better
        rest = [choice for choice, result in quick.items() if result.timing and result.timing.median <= limit]
        for choice, result in self._measure(rest, label, self.bench).items():
            if result.timing:
                self.results[choice] = result

    def _measure(self, choices: Sequence[Choice], label: str, bench: Bench) -> dict[Choice, Measurement]:
        if not choices:
            return {}
        seconds = max(RACE_SECONDS, min(self.bench.max_seconds, self.left()))
        names = {self._text(choice): choice for choice in choices}
        candidates = [
            Candidate(name, run=lambda choice=choice: self.tunable.run(choice), may_fail=True)
            for name, choice in names.items()
        ]
        bench = replace(bench, max_seconds=seconds)
        return {names[name]: result for name, result in bench.measure(f"timing {label}", candidates).items()}

    def _text(self, choice: Choice) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(self.tunable.names, choice, strict=True))

    def rows(self) -> list[Row]:
        """Return a row for every choice that was tried so far."""
        return [self._row(choice, result) for choice, result in self.results.items()]

    def _row(self, choice: Choice, result: Measurement) -> Row:
        tunable, shape = self.tunable, self.judge.shape
        flops = PASSES[tunable.kind] * shape.forward_flops
        is_best = choice == self.best and result.status == "ok"
        if is_best and not self.is_done:
            result = replace(result, note=CUT)
        return {
            **describe(shape, tunable.kind),
            "kernel": tunable.kernel,
            "bucket": dict(tunable.bucket),
            "choice": dict(zip(tunable.names, choice, strict=True)),
            "is_start": choice == tunable.start,
            "is_best": is_best,
            "tflops": flops / result.timing.median / 1e12 if result.timing else None,
            **result.row(self.results.get(tunable.start), "the table now"),
        }

    def summary(self) -> str:
        """Return what was found, in a sentence."""
        best = next((row for row in self.rows() if row["is_best"]), None)
        found = f"{self.tunable.kernel}: {len(self.results)} tried, "
        if best is None:
            found += "and none of them can be taken"
        else:
            ratio = best["speed_ratio"]
            found += self._text(self.best)
            found += f", {ratio:.3f} times the table now" if ratio else ", and the table now cannot be timed"
        return found if self.is_done else f"{found}; {CUT}"


def _median(result: Measurement) -> float:
    return result.timing.median if result.timing else math.inf


def kernels_of(shape: Shape, inputs: Inputs) -> Iterator[Tunable]:
    """Yield the kernels of ours that compute ``shape``, each ready to run with any tile."""
    q, k, v, do = (x.detach() for x in inputs)
    how = {"causal": shape.causal, "scale": shape.head_dim**-0.5}
    kept = triton_attention.forward(q, k, v, **how)
    if hopper_attention.unavailable_reason(q, k, v, causal=shape.causal) is None:
        yield from _hopper_kernels(shape, (q, k, v, *kept, do), how)
    yield from _triton_kernels(shape, (q, k, v, *kept, do), how)


def _hopper_kernels(shape: Shape, tensors: Sequence[Tensor], how: dict[str, Any]) -> Iterator[Tunable]:
    """Yield the two kernels for Hopper GPUs. Their registers follow from the warpgroups, and cannot be chosen."""

    def forward(choice: Choice) -> dict[str, Tensor]:
        tile = hopper_attention.ForwardTile(*choice)
        return {"output": hopper_attention.forward(*tensors[:3], **how, tile=tile)[0]}

    def backward(choice: Choice) -> dict[str, Tensor]:
        stages, in_registers, at_once = choice
        tile = hopper_attention.BackwardTile(stages, bool(in_registers), at_once)
        return dict(zip(TENSORS[1:], hopper_attention.backward(*tensors, **how, tile=tile), strict=True))

    start = hopper_attention.forward_tile(shape.seq, shape.head_dim, causal=shape.causal)
    yield Tunable(
        kernel="hopper forward",
        bucket={"head_dim": shape.head_dim, "causal": shape.causal, "is_long": shape.seq >= hopper_attention.LONG_FROM},
        names=start._fields,
        ladders=HOPPER_LADDERS["forward"],
        start=tuple(start),
        kind="forward",
        run=forward,
    )
    start = hopper_attention.BACKWARD[shape.head_dim]
    yield Tunable(
        kernel="hopper backward",
        bucket={"head_dim": shape.head_dim},
        names=start._fields,
        ladders=HOPPER_LADDERS["backward"],
        start=tuple(map(int, start)),
        kind="backward",
        run=backward,
    )


def _triton_kernels(shape: Shape, tensors: Sequence[Tensor], how: dict[str, Any]) -> Iterator[Tunable]:
    """Yield the three portable kernels."""
    q = tensors[0]
    is_hopper = torch.cuda.get_device_capability(q.device)[0] == 9

    def forward(kernel: str, choice: Choice) -> dict[str, Tensor]:
        tiles = {kernel: triton_attention.Tile(*choice)}
        return {"output": triton_attention.forward(*tensors[:3], **how, tiles=tiles)[0]}

    def backward(kernel: str, choice: Choice) -> dict[str, Tensor]:
        tiles = {kernel: triton_attention.Tile(*choice)}
        return dict(zip(TENSORS[1:], triton_attention.backward(*tensors, **how, tiles=tiles), strict=True))

    for kernel, function, kind, run in (
        ("forward", triton_attention._forward, "forward", forward),
        ("dq", triton_attention._backward_dq, "backward", backward),
        ("dkdv", triton_attention._backward_dkdv, "backward", backward),
    ):
        key = (kernel, q.element_size(), max(32, triton_attention._padded(shape.head_dim)))
        yield Tunable(
            kernel=kernel,
            bucket={"bytes": key[1], "block_d": key[2], "is_hopper": is_hopper},
            names=triton_attention.Tile._fields,
            ladders=((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (4, 8, 16), (1, 2, 3, 4, 5)),
            start=tuple(triton_attention.TILES[key][is_hopper]),
            kind=kind,
            run=partial(run, kernel),
            spilled_bytes=partial(_spilled_bytes, function),
            forget=partial(_forget, function),
        )


def _forget(function: Any) -> None:
    """Empty Triton's cache in memory, in which a kernel keeps its place when it is launched again."""
    function.device_caches.clear()


def _spilled_bytes(function: Any) -> int | None:
    """Return what the kernel that Triton compiled last keeps in local memory; None when Triton does not tell."""
    compiled = [kernel for caches in function.device_caches.values() for kernel in caches[0].values()]
    return getattr(compiled[-1], "n_spills", None) if compiled else None

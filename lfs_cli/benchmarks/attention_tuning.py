"""`lfs bench attention --tune`: look for faster tiles of our kernels, on this GPU and these shapes.

A kernel is offered as a `Tunable`: where it starts, which values each of its numbers may take, and how to run it with a
choice of them. From the start the search tries all neighbours, which differ in one number by one step, and goes to the
fastest, until none saves more than `GAIN`. A neighbour must compile without spills and compute the right numbers before
it is timed; after two runs those far behind are dropped, and the rest takes turns with the best so far. (Spills of the
Hopper kernels are not looked at: ptxas counts those before and after the loops too, which cost next to nothing.)

What is timed is the pass that the kernel belongs to, as that is what a user waits for: a backward pass is several
kernels, of which one changes.

Rows say for every choice what became of it: `ok`, `slow` (dropped early), `spills`, `wrong`, `failed`, `out of memory`.
The row of each kernel that `is_best` is kept in `data/benchmarks/tuned_attention.json`, with GPU, versions and date.
Kernels do not read that file: to make a choice everybody's, copy it into the table of the kernel's file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
        spilled_bytes: Bytes that the kernel compiled last keeps outside of registers; None when not known.
    """

    kernel: str
    bucket: Mapping[str, Any]
    names: tuple[str, ...]
    ladders: tuple[tuple[int, ...], ...]
    start: Choice
    kind: str
    run: Callable[[Choice], dict[str, Tensor]]
    spilled_bytes: Callable[[], int | None] = lambda: None

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


def search(tunable: Tunable, shape: Shape, inputs: Inputs, bench: Bench) -> list[Row]:
    """Walk from the start to a choice that no neighbour beats; return a row for every choice that was tried."""
    judge = Judge(shape, inputs)
    results: dict[Choice, Measurement] = {}
    best = tunable.start
    for _ in range(MOST_STEPS):
        fresh = [choice for choice in (best, *tunable.neighbours(best)) if choice not in results]
        if not fresh:
            break
        checked = {choice: _refusal(choice, tunable, judge, shape, bench) for choice in fresh}
        results |= {choice: refusal for choice, refusal in checked.items() if refusal is not None}
        fit = [choice for choice in dict.fromkeys((best, *fresh)) if checked.get(choice) is None]
        results |= _race(fit, tunable, bench)
        times = {choice: _median(results[choice]) for choice in fit if results[choice].status == "ok"}
        if not times:
            break
        leader = min(times, key=lambda choice: times[choice])
        if best in times and times[leader] > (1 - GAIN) * times[best]:
            break
        best = leader
    return [_row(tunable, shape, choice, results, is_best=choice == best) for choice in results]


def _refusal(choice: Choice, tunable: Tunable, judge: Judge, shape: Shape, bench: Bench) -> Measurement | None:
    """Return why ``choice`` is not to be timed: it does not run, spills or is wrong. None when it may be."""
    bench.on_progress(f"compiling {tunable.kernel} {_text(tunable, choice)}", 0, 1)
    try:
        verdict = judge.compare(lambda: tunable.run(choice))
    except Exception as error:  # a compiler may raise anything
        status, note = describe_failure(error)
        return Measurement(status=status, note=note)
    spilled = tunable.spilled_bytes()
    if spilled:
        return Measurement(status="spills", note=f"{spilled} bytes do not fit into registers")
    complaint = verdict.complaint(shape.dtype)
    return Measurement(status="wrong", note=complaint) if complaint else None


def _race(choices: Sequence[Choice], tunable: Tunable, bench: Bench) -> dict[Choice, Measurement]:
    """Time ``choices`` in turns, most of them only as long as they are not hopeless."""

    def measure(some: Sequence[Choice], bench: Bench) -> dict[Choice, Measurement]:
        names = {_text(tunable, choice): choice for choice in some}
        candidates = [
            Candidate(name, run=lambda choice=choice: tunable.run(choice), may_fail=True)
            for name, choice in names.items()
        ]
        return {names[name]: result for name, result in bench.measure(f"tuning {tunable.kernel}", candidates).items()}

    quick = measure(choices, replace(bench, warmup=1, repeats=QUICK_RUNS))
    limit = HOPELESS * min(map(_median, quick.values()), default=0.0)
    slow = {
        choice: replace(result, status="slow", note=f"over {HOPELESS} times the best after {QUICK_RUNS} runs")
        for choice, result in quick.items()
        if result.timing and result.timing.median > limit
    }
    failed = {choice: result for choice, result in quick.items() if not result.timing}
    rest = [choice for choice in choices if choice not in slow | failed]
    return slow | failed | (measure(rest, bench) if rest else {})


def _median(result: Measurement) -> float:
    return result.timing.median if result.timing else float("inf")


def _text(tunable: Tunable, choice: Choice) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(tunable.names, choice, strict=True))


def _row(
    tunable: Tunable, shape: Shape, choice: Choice, results: Mapping[Choice, Measurement], *, is_best: bool
) -> Row:
    result = results[choice]
    flops = PASSES[tunable.kind] * shape.forward_flops
    return {
        **describe(shape, tunable.kind),
        "kernel": tunable.kernel,
        "bucket": dict(tunable.bucket),
        "choice": dict(zip(tunable.names, choice, strict=True)),
        "is_start": choice == tunable.start,
        "is_best": is_best and result.status == "ok",
        "tflops": flops / result.timing.median / 1e12 if result.timing else None,
        **result.row(results[tunable.start], "the table now"),
    }


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
        ladders=((2, 3), (64, 128), (1, 2, 3, 4)),
        start=tuple(start),
        kind="forward",
        run=forward,
    )
    start = hopper_attention.BACKWARD[shape.head_dim]
    yield Tunable(
        kernel="hopper backward",
        bucket={"head_dim": shape.head_dim},
        names=start._fields,
        ladders=((1, 2, 3, 4), (0, 1), (1, 2)),
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
        )


def _spilled_bytes(function: Any) -> int | None:
    """Return what the kernel that Triton compiled last keeps in local memory; None when Triton does not tell."""
    compiled = [kernel for caches in function.device_caches.values() for kernel in caches[0].values()]
    return getattr(compiled[-1], "n_spills", None) if compiled else None

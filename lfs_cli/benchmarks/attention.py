"""Implementations of attention side by side: time, TFLOP/s, memory, and accuracy against float64.

For each shape (`attention_shapes.py`) everybody who takes part (`attention_implementations.py`) is judged once
(`attention_accuracy.py`), which also warms it up, and then timed in turns with the others: forward, backward, and both.
Inputs and the gradient of the output are drawn from N(0, 1): numbers with few bits set make a GPU faster.

What the fields of a row mean:

    kernel                  what ran, and why it was chosen
    tflops, ceiling_share   by the FLOPs of the problem; share of what a large matrix product of the same type reaches
                            here, measured in the same run
    baseline, speed_ratio   the fastest implementation of others in this shape and pass, and its time over this time
    peak_bytes              most memory held during a pass beyond the inputs, for `backward` with what forward saved
    saved_bytes             memory held between forward and backward: the output and what is needed of it
    error                   worst relative error of the tensors that the pass computes: the output, the gradients
    output_error, dq_error, ...     relative error of each, in the Euclidean norm; `..._max_error` of its worst number
    status                  `ok`; `wrong` when the error is no rounding; `out of memory`, `failed`, `unavailable`, with
                            the reason in `note`; `published` for a time that others have measured elsewhere

A result that is wrong is shown, but it is no baseline and has no ratio.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lfs_cli.benchmarks.attention_accuracy import TENSORS, Inputs, Judge, Verdict
from lfs_cli.benchmarks.attention_compiling import compiling_ahead
from lfs_cli.benchmarks.attention_implementations import EVERYWHERE, FASTEST, Ready, UnavailableError, prepare
from lfs_cli.benchmarks.attention_shapes import MOST_WITHOUT_GPU, PASSES, RECORDS, Job, Shape, describe, jobs_of
from lfs_cli.benchmarks.attention_tuning import (
    TUNING_SECONDS,
    Ahead,
    Search,
    countdown,
    kernels_of,
    refuse_without_gpu,
)
from lfs_cli.benchmarks.measure import (
    BENCHMARKS,
    Bench,
    Candidate,
    Measurement,
    Row,
    describe_failure,
    is_out_of_memory,
    memory_refusal,
    release_memory,
)
from lfs_cli.config import BenchConfig
from lfs_cli.kernels.flash_attention import unavailable_reason

COMPUTED = {"forward": TENSORS[:1], "backward": TENSORS[1:], "both": TENSORS}
"""Which tensors each pass computes."""

CEILING_SIZE = {"cuda": 8_192}
"""Rows and columns of the matrix product that is taken for the ceiling; 1,024 on other devices."""

_SCORE_TENSORS = {"forward": 3, "backward": 4, "both": 4}
"""Tensors of the size of all scores that an implementation which stores them holds at once, rounded up: `standard` was
seen to hold 1.3 and 2.4."""


@BENCHMARKS.register("attention")
def bench_attention(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every implementation on every shape, or tune our own on them."""
    asked = settings.attention
    jobs = jobs_of(asked, bench.dtype, bench.device, is_named=settings.dtype != "auto")
    if asked.preset != "none" and bench.device.type != "cuda":
        cut = ", ".join(f"{name} {most}" for name, most in MOST_WITHOUT_GPU.items())
        bench.on_note(f"no GPU: the shapes of `{asked.preset}` are cut to at most {cut}")
    if asked.tune:
        refuse_without_gpu(bench.device)
        seconds = settings.max_seconds if "max_seconds" in settings.model_fields_set else TUNING_SECONDS
        return _tune_all([job.shape for job in jobs], asked.implementations, settings.seed, seconds, bench)
    default = FASTEST if bench.device.type == "cuda" else EVERYWHERE
    ceilings = {dtype: _ceiling(dtype, bench) for dtype in dict.fromkeys(job.shape.dtype for job in jobs)}
    rows: list[Row] = []
    for job in jobs:
        names = tuple(dict.fromkeys(asked.implementations or job.implementations or default))
        try:
            rows += _bench_shape(job, names, asked.passes, ceilings[job.shape.dtype], settings.seed, bench)
        except RuntimeError as error:
            if not rows or "CUDA error" not in str(error):
                raise
            # A kernel wrote where it must not: the GPU answers nothing more, but what was measured before stands
            bench.on_note(f"stopped at T={job.shape.seq:,}, D={job.shape.head_dim}: {describe_failure(error)[1]}")
            break
    return rows


def _tune_all(
    shapes: Sequence[Shape], implementations: tuple[str, ...], seed: int, seconds: float, bench: Bench
) -> list[Row]:
    """Return the rows of all searches, each of ``seconds`` a shape, or what was measured when the user interrupted."""
    rows: list[Row] = []
    try:
        with compiling_ahead(bench.device) as ahead:
            for shape in shapes:
                for search in _searches(shape, implementations, seed, seconds, bench, ahead):
                    try:
                        search.run()
                    finally:
                        rows += search.rows()
                    bench.on_note(search.summary())
    except KeyboardInterrupt:
        if not rows:
            raise
        bench.on_note("interrupted; what was found is kept")
    except RuntimeError as error:
        if not rows or "CUDA error" not in str(error):
            raise
        bench.on_note(f"stopped: {describe_failure(error)[1]}; what was found is kept")
    return rows


def _searches(
    shape: Shape, implementations: tuple[str, ...], seed: int, seconds: float, bench: Bench, ahead: Ahead
) -> Iterator[Search]:
    """Yield a search for each kernel, as long as time is left."""
    reason = unavailable_reason(bench.device.type, shape.dtype, shape.head_dim)
    if reason is not None or shape.window:
        why = reason or "windows use the tiles of whole sequences"
        bench.on_note(f"nothing to tune for T={shape.seq:,}, D={shape.head_dim}: {why}")
        return
    left = countdown(seconds)
    inputs = draw(shape, seed, bench.device)
    judge = Judge(shape, inputs)
    owners = implementations or ("hopper", "triton")
    tunables = [
        tunable
        for tunable in kernels_of(shape, inputs)
        if ("hopper" if tunable.kernel.startswith("hopper") else "triton") in owners
    ]
    for number, tunable in enumerate(tunables):
        if number and left() <= 0:
            names = ", ".join(other.kernel for other in tunables[number:])
            bench.on_note(f"no time was left for {names}: raise `--max-seconds`, which is {seconds:g}")
            return
        yield Search(tunable, judge, bench, left, ahead)


def _bench_shape(
    job: Job, names: tuple[str, ...], passes: tuple[str, ...], ceiling: float | None, seed: int, bench: Bench
) -> list[Row]:
    shape = job.shape
    release_memory(bench.device)  # of the last shape
    cases: dict[str, _Case] = {}
    try:
        inputs = draw(shape, seed, bench.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refused = Measurement(status="out of memory", note="queries, keys, values and their gradients alone do not fit")
        measured = {kind: dict.fromkeys(names, refused) for kind in passes}
    else:
        judge = Judge(shape, inputs)
        layouts = {"BTHD": inputs}
        cases = {name: _Case.begin(name, shape, layouts, judge, bench) for name in names}
        label = f"attention T={shape.seq:,} D={shape.head_dim}"
        measured = {
            kind: bench.measure(f"{label} {kind}", [case.candidate(kind) for case in cases.values()]) for kind in passes
        }
    rows = []
    for kind, results in measured.items():
        results = {name: cases[name].judged(kind, result) if cases else result for name, result in results.items()}
        baseline = best_other(results, {name for name, case in cases.items() if case.is_ours})
        for name, result in results.items():
            case = cases.get(name)
            tflops = PASSES[kind] * shape.forward_flops / result.timing.median / 1e12 if result.timing else None
            row = result.row(results.get(baseline), baseline)
            rows.append(
                {
                    **describe(shape, kind),
                    "implementation": name,
                    "kernel": case.kernel if case else "",
                    "tflops": tflops,
                    "ceiling_tflops": ceiling,
                    "ceiling_share": tflops / ceiling if tflops and ceiling else None,
                    "saved_bytes": case.saved_bytes if case else None,
                    **_errors(case.verdict if case and result.timing else None, kind),
                    **row,
                    "speed_ratio": None if result.status == "wrong" else row["speed_ratio"],
                }
            )
    return [*rows, *_published(rows, shape, passes, ceiling)]


def best_other(results: Mapping[str, Measurement], ours: set[str]) -> str:
    """Return the name of the fastest correct implementation that is not ours; "" when there is none."""
    others = {
        name: result.timing.median
        for name, result in results.items()
        if result.timing and result.status == "ok" and name not in ours
    }
    return min(others, key=lambda name: others[name], default="")


def _errors(verdict: Verdict | None, kind: str) -> Row:
    """Return the columns of accuracy: all tensors that the pass computes, and the worst of them."""
    row: Row = {"error": verdict.worst(COMPUTED[kind]) if verdict else None}
    for name in TENSORS:
        found = verdict.errors.get(name) if verdict and name in COMPUTED[kind] else None
        row[f"{name}_error"] = found.relative if found else None
        row[f"{name}_max_error"] = found.largest if found else None
    return {name: value if value is None or value == value else None for name, value in row.items()}


def _published(rows: list[Row], shape: Shape, passes: tuple[str, ...], ceiling: float | None) -> list[Row]:
    """Return the row of a time that others have published for this shape, if there is one."""
    record = RECORDS.get(shape)
    if record is None or "both" not in passes or not rows:
        return []
    seconds = record.milliseconds / 1e3
    tflops = PASSES["both"] * shape.forward_flops / seconds / 1e12
    return [
        {
            **dict.fromkeys(rows[0]),
            **describe(shape, "both"),
            "implementation": record.name,
            "kernel": "measured elsewhere",
            "tflops": tflops,
            "ceiling_tflops": ceiling,
            "median_ms": record.milliseconds,
            "runs": 0,
            "baseline": "",
            "status": "published",
            "note": record.note,
        }
    ]


def draw(shape: Shape, seed: int, device: torch.device) -> Inputs:
    """Return normally distributed inputs, of which the first three ask for gradients.

    Raises:
        MemoryError: Where they and their gradients would not fit in the memory of a CPU, which else swaps or kills.
    """
    numbers = 2 * shape.input_numbers  # output and gradients are as large
    refusal = memory_refusal(numbers * shape.dtype.itemsize, device)
    if refusal is not None:
        raise MemoryError(refusal)
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v, do = (
        torch.randn(
            (shape.batch, shape.seq, heads, shape.head_dim), generator=generator, device=device, dtype=shape.dtype
        )
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do)


@dataclass
class _Case:
    """One implementation on one shape.

    Args:
        name: Of the implementation.
        shape: The problem.
        ready: How to compute it; None when that is not possible.
        inputs: In the layout of ``ready``.
        failure: Status and note of all its rows when it cannot even be judged; None when it can.
        verdict: What the judge found.
        saved_bytes: Held between forward and backward; None when not known.
    """

    name: str
    shape: Shape
    ready: Ready | None = None
    inputs: Inputs | None = None
    failure: tuple[str, str] | None = None
    verdict: Verdict | None = None
    saved_bytes: int | None = None
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, name: str, shape: Shape, layouts: dict[str, Inputs], judge: Judge, bench: Bench) -> "_Case":
        """Prepare and judge an implementation. Whatever goes wrong is kept as its result."""
        case = cls(name, shape)
        try:
            case.ready = prepare(name, shape, bench.device)
            if case.ready.layout not in layouts:
                layouts[case.ready.layout] = _transposed(layouts["BTHD"])
            case.inputs = layouts[case.ready.layout]
        except UnavailableError as error:
            case.failure = ("unavailable", str(error))
        except Exception as error:  # of software that is not ours, or no memory
            case.failure = describe_failure(error)
        if case.failure is None and memory_refusal(case.needs_bytes("both"), bench.device) is None:
            bench.on_progress(f"attention T={shape.seq:,} D={shape.head_dim} {name}: accuracy", 0, 1)
            case.compare(judge, bench.device)
        return case

    @property
    def is_ours(self) -> bool:
        """Whether this is of lfs."""
        return self.ready is not None and self.ready.is_ours

    @property
    def kernel(self) -> str:
        """What runs, and why."""
        return self.ready.kernel if self.ready else ""

    def needs_bytes(self, kind: str) -> int:
        """Return an estimate of the memory of one run."""
        if self.ready is None or not self.ready.stores_scores:
            return 0
        shape = self.shape
        scores = shape.batch * shape.heads * shape.seq**2
        return _SCORE_TENSORS[kind] * scores * shape.dtype.itemsize

    def compare(self, judge: Judge, device: torch.device) -> None:
        """Let the judge see output and gradients, or the output alone where the rest fails or does not fit."""
        failure = None
        for run in (self._all_tensors, self._output_alone):
            try:
                self.verdict = judge.compare(lambda run=run: run(device))
            except Exception as error:
                self.outputs.clear()
                failure = None if is_out_of_memory(error) else describe_failure(error)
            else:
                return
            release_memory(device)  # after the handler, whose traceback still held the tensors
        self.failure = failure  # one that only lacks memory is timed: each pass needs another amount

    def _all_tensors(self, device: torch.device) -> dict[str, Tensor]:
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        self.prepare_backward()
        if before is not None:
            self.saved_bytes = torch.cuda.memory_allocated(device) - before
        output = self.outputs[0].detach()
        return {name: self._in_order(tensor) for name, tensor in zip(TENSORS, (output, *self.backward()), strict=True)}

    def _output_alone(self, device: torch.device) -> dict[str, Tensor]:
        return {"output": self._in_order(self.forward())}

    def _in_order(self, x: Tensor) -> Tensor:
        return x if self.ready is not None and self.ready.layout == "BTHD" else x.transpose(1, 2)

    def candidate(self, kind: str) -> Candidate:
        """Return what the bench measures."""
        if self.failure is not None:
            return Candidate(self.name, unavailable=self.failure[1] or self.failure[0])
        return Candidate(
            self.name,
            run={"forward": self.forward, "backward": self.backward, "both": self.both}[kind],
            prepare=self.prepare_backward if kind == "backward" else self.outputs.clear,
            needs_bytes=self.needs_bytes(kind),
            may_fail=True,
        )

    def judged(self, kind: str, result: Measurement) -> Measurement:
        """Return ``result`` with what is known beyond its time: that it could not begin, or that it is wrong."""
        if self.failure is not None:
            return replace(result, status=self.failure[0], note=self.failure[1])
        if self.verdict is None or result.status != "ok":
            return result
        errors = {name: self.verdict.errors[name] for name in COMPUTED[kind] if name in self.verdict.errors}
        complaint = Verdict(errors).complaint(self.shape.dtype)
        return result if complaint is None else replace(result, status="wrong", note=complaint)

    def attend(self) -> Tensor:
        """Run it forward."""
        assert self.ready is not None and self.inputs is not None  # noqa: PT018  a case that failed is never run
        return self.ready.attend(*self.inputs[:3])

    def forward(self) -> Tensor:
        """Run it forward, with nothing kept for a backward pass."""
        with torch.no_grad():
            return self.attend()

    def prepare_backward(self) -> None:
        """Run it forward and keep the output."""
        self.outputs.clear()
        self.outputs.append(self.attend())

    def backward(self) -> tuple[Tensor, ...]:
        """Run it backward from the output that was kept."""
        assert self.inputs is not None
        return torch.autograd.grad(self.outputs.pop(), self.inputs[:3], self.inputs.do)

    def both(self) -> tuple[Tensor, ...]:
        """Run it forward and backward."""
        self.prepare_backward()
        return self.backward()


def _transposed(inputs: Inputs) -> Inputs:
    """Return the same numbers as (B, H, T, D), contiguous, as leaves of their own."""
    copies = (x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in inputs)
    return Inputs(*copies)


def _ceiling(dtype: torch.dtype, bench: Bench) -> float | None:
    """Return the TFLOP/s of a large square matrix product of random numbers here; None when it does not fit."""
    size = CEILING_SIZE.get(bench.device.type, 1_024)
    generator = torch.Generator(bench.device).manual_seed(0)
    left, right = (torch.randn((size, size), generator=generator, device=bench.device, dtype=dtype) for _ in range(2))
    name = f"matrix product of {size:,} x {size:,}"
    timing = bench.measure(name, [Candidate(name, run=lambda: left @ right)])[name].timing
    return 2 * size**3 / timing.median / 1e12 if timing else None

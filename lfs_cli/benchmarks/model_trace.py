"""Reading the trace of one training step: which module took the time, and what lay in memory when.

The trace is the one that torch.profiler writes for Chrome: a list of events, of which these matter:

    user_annotation    a range that has a name: a phase of `PHASES`, or `module blocks.3.attention`
    cpu_op             an operation of PyTorch on the host, with the number of the autograd node it makes or runs
    cuda_runtime       a call that starts something on the GPU, with a number
    kernel             what the GPU did, with the number of the call that started it
    [memory]           an allocation or, with negative bytes, its end

Forward, an operation belongs to the innermost module around it. Backward there is no module around it, so it belongs
to the module whose forward made the autograd node that runs: both have the same number. A node without one puts a
gradient where it stays, and runs at once after the node that computed it. A kernel belongs where its launch does.

On the host the time of an operation is its own, without those inside it. What a range has left is `(no operation)`,
mostly Python's; so the rows add up to the step.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lfs_cli.benchmarks.measure import Row

Event = Mapping[str, Any]
"""An event of a Chrome trace. Times are in microseconds."""

PHASES = {"forward": "model", "loss": "head+loss", "backward": "model", "optimizer": "optimizer"}
"""Ranges that follow each other in a step, and to what belongs what is in no module."""

MODULE = "module "
"""Begins the name of a module's range."""

BETWEEN = "(no operation)"

_NODE = "autograd::engine::evaluate_function: "
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_DEVICES = {"cpu": 0, "cuda": 1}
"""Device types as `[memory]` events have them."""


def _grouped(path: str) -> str:
    """Return the path of a module without its layer: ``blocks.3.attention`` is ``blocks.*.attention``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


@dataclass
class _Span:
    """A stretch of the host's time."""

    name: str
    category: str
    start: int
    end: int
    sequence: int | None
    correlation: int | None
    module: str = ""
    own: int = 0


def sees_gpu(events: Iterable[Event]) -> bool:
    """Return whether the trace has what a GPU did; under another profiler, such as Nsight Systems, it has not."""
    return any(event.get("cat") in _ON_GPU for event in events)


def kernel_rows(events: Sequence[Event]) -> list[Row]:
    """Return where the time of a step went, largest first.

    Args:
        events: Of a trace with the ranges of `PHASES`.

    Returns:
        Rows with `module`, `phase` (forward, backward or optimizer), `kernel`, `calls`, `total_ms` and `share` of the
        sum of all rows. On a GPU that sum is the time of all kernels, elsewhere that of the step.
    """
    phases = _phases(events)
    launched: dict[int, _Span] = {}
    sums: dict[tuple[str, str, str], list[int]] = {}
    on_host, on_gpu = [], [event for event in events if event.get("cat") in _ON_GPU]
    for span in _placed(events, phases):
        if span.category in _LAUNCHES and span.correlation is not None:
            launched[span.correlation] = span
        on_host.append(span)
    pieces: Iterable[tuple[_Span | None, str, int]] = (
        ((launched.get(event["args"]["correlation"]), event["name"], _nanoseconds(event["dur"])) for event in on_gpu)
        if on_gpu
        else ((span, _shown_name(span), span.own) for span in on_host)
    )
    for span, name, own in pieces:
        phase = "" if span is None else _phase_at(span.start, phases)
        if span is not None and not phase:  # before or after the step
            continue
        key = (span.module if span else "unknown", "forward" if phase == "loss" else phase, name)
        known = sums.setdefault(key, [0, 0])
        known[0] += 1
        known[1] += own
    total = sum(own for _, own in sums.values())
    rows = [
        {"module": module, "phase": phase, "kernel": name, "calls": calls, "total_ms": own / 1e6, "share": own / total}
        for (module, phase, name), (calls, own) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["total_ms"])


def _placed(events: Sequence[Event], phases: Mapping[str, tuple[int, int]]) -> Iterator[_Span]:
    """Return the spans of the host's threads with their modules and their own times."""
    made_in: dict[int, str] = {}  # the module that an autograd node comes from, by its number
    for spans in _threads(events):
        around: list[_Span] = []
        latest = PHASES["backward"]
        for span in spans:
            while around and around[-1].end <= span.start:
                around.pop()
            span.own = span.end - span.start
            own_module = _module_of(span, made_in)
            if span.name.startswith(_NODE):
                own_module = latest = own_module or latest
            span.module = own_module or (around[-1].module if around else latest)
            if span.sequence is not None and _phase_at(span.start, phases) in ("forward", "loss"):
                made_in[span.sequence] = span.module  # of all with this number the last one made the node
            if around:
                around[-1].own -= min(span.end, around[-1].end) - span.start
            around.append(span)
        yield from spans


def _threads(events: Sequence[Event]) -> list[list[_Span]]:
    """Return the spans of each thread in the order of their begins, those of forward first."""
    threads: dict[Any, list[_Span]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op", *_LAUNCHES):
            start, more = _nanoseconds(event["ts"]), event.get("args", {})
            end = start + _nanoseconds(event["dur"])
            numbers = more.get("Sequence number"), more.get("correlation")
            threads.setdefault(event["tid"], []).append(_Span(event["name"], event["cat"], start, end, *numbers))
    for spans in threads.values():
        spans.sort(key=lambda span: (span.start, -span.end))
    return sorted(threads.values(), key=lambda spans: not any(span.name == "forward" for span in spans))


def _module_of(span: _Span, made_in: Mapping[int, str]) -> str | None:
    """Return the module that a span says of itself that it belongs to, or None."""
    if span.category == "user_annotation":
        path = span.name.removeprefix(MODULE)
        return _grouped(path) if path != span.name else PHASES.get(span.name)
    if span.name.startswith(_NODE) and span.sequence is not None:
        return made_in.get(span.sequence)
    return None


def _shown_name(span: _Span) -> str:
    return BETWEEN if span.category == "user_annotation" else span.name.removeprefix(_NODE)


def _phases(events: Sequence[Event]) -> dict[str, tuple[int, int]]:
    """Return begin and end of each phase, in nanoseconds."""
    found = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in PHASES:
            start = _nanoseconds(event["ts"])
            found[event["name"]] = (start, start + _nanoseconds(event["dur"]))
    return found


def _phase_at(moment: int, phases: Mapping[str, tuple[int, int]]) -> str:
    return next((name for name, (start, end) in phases.items() if start <= moment < end), "")


def _nanoseconds(microseconds: float) -> int:
    return round(1e3 * microseconds)


@dataclass
class _Block:
    """Memory between its allocation and its end; what is there before the step has no begin."""

    address: int
    size: int
    start: int = -1
    end: int | None = None
    kind: str = "other"

    def lives_at(self, moment: int) -> bool:
        return self.start < moment and (self.end is None or self.end >= moment)


KINDS = ("weights", "state", "gradients", "activations", "other")
"""What memory is for."""


def memory_rows(
    events: Sequence[Event], held: Mapping[int, tuple[str, int]], gradients: Iterable[int], device_type: str
) -> list[Row]:
    """Return what was in memory after every change of it in one step.

    Activations are what forward and loss made and backward finds; gradients are those of weights, from the moment that
    memory is taken for them. `other` is what is passing through: temporary results, gradients of activations, and
    activations that are computed again. What was there before the step, beside ``held``, is not counted.

    Args:
        events: Of a trace with the ranges of `PHASES`, made with ``profile_memory=True``.
        held: What is there before the step: by address, what it is for, of `KINDS`, and its bytes.
        gradients: Addresses of the weights' gradients after backward.
        device_type: Such as "cuda": memory of which device is meant.

    Returns:
        Rows with `ms` since the step began, `phase`, the bytes of each of `KINDS` such as `weights_bytes`, and
        `total_bytes`. The first row of a phase is the moment when it begins.
    """
    phases = _phases(events)
    began, ended = min(start for start, _ in phases.values()), max(end for _, end in phases.values())
    blocks = [_Block(address, size, kind=kind) for address, (kind, size) in held.items()]
    living = {block.address: block for block in blocks}
    changes: list[tuple[int, _Block | None, int]] = [(start, None, 0) for start, _ in phases.values()]
    # A trace lists one thread after the other, and on a GPU backward has a thread of its own
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        if event["args"]["Device Type"] != _DEVICES[device_type]:
            continue
        moment, size, address = _nanoseconds(event["ts"]), event["args"]["Bytes"], event["args"]["Addr"]
        if not began <= moment <= ended:
            continue
        if size > 0:
            living[address] = _Block(address, size, moment)
            blocks.append(living[address])
            changes.append((moment, living[address], size))
        elif address in living:
            block = living.pop(address)
            block.end = moment
            changes.append((moment, block, -block.size))
    _sort_out(blocks, phases, set(gradients))

    bytes_of = dict.fromkeys(KINDS, 0)
    for kind, size in held.values():
        bytes_of[kind] += size
    rows = []
    for moment, block, size in sorted(changes, key=lambda change: change[0]):
        if block is not None:
            bytes_of[block.kind] += size
        rows.append(
            {
                "ms": (moment - began) / 1e6,
                "phase": _phase_at(moment, phases) or rows[-1]["phase"],
                **{f"{kind}_bytes": bytes_of[kind] for kind in KINDS},
                "total_bytes": sum(bytes_of.values()),
            }
        )
    return rows


def _sort_out(blocks: Iterable[_Block], phases: Mapping[str, tuple[int, int]], gradients: set[int]) -> None:
    """Say what each block is for that the step made."""
    begin, end = phases["backward"]
    for block in blocks:
        if block.start < 0:
            continue
        if block.address in gradients and block.lives_at(end):
            block.kind = "gradients"
        elif block.lives_at(begin):
            block.kind = "activations"


def thinned(rows: Sequence[Row], most: int = 1_000) -> list[Row]:
    """Return about ``most`` of the rows: of neighbours the one with the most bytes, and the first of each phase."""
    size = -(-len(rows) // most)
    kept = [rows[start + _largest(rows[start : start + size])] for start in range(0, len(rows), size)]
    borders = [row for before, row in pairwise(rows) if before["phase"] != row["phase"]]
    chosen = {id(row) for row in (*rows[:1], *kept, *borders, *rows[-1:])}
    return [row for row in rows if id(row) in chosen]


def _largest(rows: Sequence[Row]) -> int:
    return max(range(len(rows)), key=lambda index: rows[index]["total_bytes"])

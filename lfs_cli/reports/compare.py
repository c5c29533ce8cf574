"""Runs side by side: best first, settings that differ, losses at equal steps, tokens, time, and these at an equal loss.

Losses are compared where all runs have been: on a grid of at most `POINTS` values up to where the shortest run ended.
Between two evaluations a run's loss lies on the straight line that joins them; before its first one it has none.

A loss is in nats a token. Where tokens are not the same in all runs that says nothing: then it is in bits per byte.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from lfs_cli.reports.records import Record, Run, flatten, number

POINTS = 8
"""Most rows of a comparison along one axis."""

AXES = ("step", "tokens", "seconds")
"""What runs can be lined up by: fields of a step's record."""

LOSS, BITS_PER_BYTE = "loss", "bits_per_byte"
"""What runs can be compared in: fields of an evaluation's record."""

LARGEST = 1e100
"""Loss, step or time beyond which a record is nonsense: differences of such numbers may not be finite."""

UNITS = {LOSS: "nats per token", BITS_PER_BYTE: "bits per byte"}
_TOKENS_DEPEND_ON = ("data.dataset", "data.tokenizer", "model.vocab_size")


def best_first(runs: Sequence[Run]) -> list[Run]:
    """Return ``runs`` by their best validation, the lowest first, and those without any at the end.

    Bits per byte count when every validated run has them, because they compare different tokenizers; else the loss.
    """
    rows = {run.name: run.row() for run in runs}
    validated = [row for row in rows.values() if number(row, "best_val_loss") is not None]
    key = (
        "val_bits_per_byte"
        if all(number(row, "val_bits_per_byte") is not None for row in validated)
        else "best_val_loss"
    )

    def rank(run: Run) -> tuple[bool, float, str]:
        value = number(rows[run.name], key)
        is_known = value is not None and math.isfinite(value)
        return not is_known, value if is_known and value is not None else 0.0, run.name

    return sorted(runs, key=rank)


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return a short name for each run: without its date where that stays unique."""
    short = {run.name: _without_date(run.name) for run in runs}
    names = list(short.values())
    return {name: label if names.count(label) == 1 else name for name, label in short.items()}


def _without_date(name: str) -> str:
    head, rest = name[:10], name[11:]
    is_date = len(head) == 10 and head[4:5] == head[7:8] == "-" and head.replace("-", "").isdigit()
    return rest if is_date and rest else name


def differing_settings(runs: Sequence[Run]) -> list[Record]:
    """Return one row for each setting that is not the same in all ``runs``, with its value in each."""
    flat = {run.name: flatten(run.config) for run in runs}
    short = labels(runs)
    settings = dict.fromkeys(name for values in flat.values() for name in values)
    rows = []
    for setting in settings:
        values = {short[name]: found.get(setting) for name, found in flat.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            rows.append({"setting": setting, **values})
    return rows


def measure_of(runs: Sequence[Run]) -> str:
    """Return the field of an evaluation in which ``runs`` compare: their loss, or bits per byte where tokens differ."""
    tokens = [[run.setting(name) for name in _TOKENS_DEPEND_ON] for run in runs]
    has_bits = all(number(record, BITS_PER_BYTE) is not None for run in runs for record in run.evaluations)
    return BITS_PER_BYTE if has_bits and any(other != tokens[0] for other in tokens) else LOSS


def equal_losses(runs: Sequence[Run]) -> list[Record]:
    """Return validation losses at equal steps, tokens and seconds: a row for each axis and point of its grid."""
    short, measure = labels(runs), measure_of(runs)
    rows = []
    for axis in AXES:
        curves = {run.name: validation_curve(run, axis, measure) for run in runs}
        for point in _grid([curve for curve in curves.values() if curve]):
            losses = {short[name]: _on_line(curve, point) for name, curve in curves.items()}
            rows.append({"axis": axis, "at": point, **losses})
    return rows


def costs_of_equal_loss(runs: Sequence[Run]) -> list[Record]:
    """Return what each run took to the lowest loss that all of them reach: a row for each axis.

    The row has the axis, the loss, and for each run its place where its curve first meets that loss.
    """
    short, measure = labels(runs), measure_of(runs)
    rows = []
    for axis in AXES:
        curves = {run.name: validation_curve(run, axis, measure) for run in runs}
        if not all(curves.values()):
            continue
        target = max(min(loss for _, loss in curve) for curve in curves.values())
        places = {short[name]: _first_at(curve, target) for name, curve in curves.items()}
        rows.append({"axis": axis, "loss": target, **places})
    return rows


def validation_curve(run: Run, axis: str, measure: str = LOSS) -> list[tuple[float, float]]:
    """Return the run's evaluations as (position along ``axis``, loss), with increasing positions and finite losses.

    Args:
        run: The run.
        axis: One of `AXES`.
        measure: Field of an evaluation that holds the loss.
    """
    places = {record["step"]: number(record, axis) for record in run.steps}
    line = [(0, 0.0), *sorted((step, place) for step, place in places.items() if step > 0 and place is not None)]
    curve: list[tuple[float, float]] = []
    for record in run.evaluations:
        step, loss = record["step"], number(record, measure)
        place = step if axis == "step" else _on_line(line, step)
        if place is None or loss is None or not (abs(loss) < LARGEST and abs(place) < LARGEST):
            continue
        if not curve or place > curve[-1][0]:
            curve.append((place, loss))
    return curve


def _first_at(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Return where ``curve``, which reaches ``loss``, first does so."""
    after = next(index for index, (_, height) in enumerate(curve) if height <= loss)
    if after == 0:
        return curve[0][0]
    (left, high), (right, low) = curve[after - 1], curve[after]
    return left + (right - left) * (high - loss) / (high - low)


def _grid(curves: Sequence[list[tuple[float, float]]]) -> list[float]:
    """Return points at which to compare: evaluations of the run with the fewest, where every run has a loss."""
    if not curves:
        return []
    first = max(curve[0][0] for curve in curves)
    last = min(curve[-1][0] for curve in curves)
    sparse = min(curves, key=len)
    points = [place for place, _ in sparse if first <= place <= last]
    if not points or points[-1] < last:
        points.append(last)
    if first > last:
        return []
    stride = -(-len(points) // POINTS)
    return points[::-1][::stride][::-1]


def _on_line(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return the height at ``at`` of the line through the points of ``curve``, or None outside of it.

    Args:
        curve: Points with increasing first numbers.
        at: Where on that axis.
    """
    after = bisect_left(curve, at, key=itemgetter(0))
    if after < len(curve) and curve[after][0] == at:
        return curve[after][1]
    if not 0 < after < len(curve):
        return None
    (left, low), (right, high) = curve[after - 1], curve[after]
    return low + (high - low) * (at - left) / (right - left)


def thin(points: Sequence[Any], most: int) -> list[Any]:
    """Return at most ``most`` of ``points``, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]

"""Runs as one picture: their validation losses over the time, and over the tokens, that they took."""

from collections.abc import Sequence
from pathlib import Path

from lfs_cli.reports.compare import UNITS, best_first, labels, measure_of, thin, validation_curve
from lfs_cli.reports.plot import Panel, Series, draw
from lfs_cli.reports.records import Run, number

MOST_POINTS = 40
"""Of one curve: each has a mark, by which the curves are told apart without color."""

_AXES = {"seconds": ("over time", "minutes of training", 60.0), "tokens": ("over tokens", "million tokens", 1e6)}


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw the validation curves of ``runs`` into the file ``path``, the best run with the strongest line.

    The time is that of training: evaluations and checkpoints are left out.

    Args:
        runs: One at least.
        path: One of `lfs_cli.reports.plot.SUFFIXES`.

    Raises:
        ConfigError: For another kind of file, or when matplotlib is not installed.
        DataError: When the file cannot be written.
    """
    ranked = best_first(runs)
    short, measure = labels(ranked), measure_of(ranked)
    panels = []
    for axis, (title, name, scale) in _AXES.items():
        series = []
        for run in ranked:
            curve = thin(validation_curve(run, axis, measure), MOST_POINTS)
            places, losses = [place / scale for place, _ in curve], [loss for _, loss in curve]
            series.append(Series(short[run.name], places, losses, is_emphasized=run is ranked[0]))
        panels.append(Panel(title, name, UNITS[measure], series, is_log_y=True))
    draw(panels, path, title="Validation loss", caption=_caption(ranked), columns=2)


def _caption(runs: Sequence[Run]) -> str:
    """Return on what and when the runs were made, and how long they were."""
    devices = dict.fromkeys(str(run.environment.get("device") or "unknown hardware") for run in runs)
    rates = [number(run.row(), "tokens_per_second") for run in runs]
    speeds = [f"{labels(runs)[run.name]}:\u00a0{rate:,.0f}" for run, rate in zip(runs, rates, strict=True) if rate]
    days = sorted({run.started[:10] for run in runs if run.started})
    period = " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))
    return "\n".join(
        ["; ".join(filter(None, [", ".join(devices), period])), *(["tokens/s: " + "; ".join(speeds)] if speeds else [])]
    )

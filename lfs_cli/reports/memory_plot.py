"""The picture of what is in memory over one training step, from the rows of `lfs bench model --memory`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfs_cli.errors import DataError
from lfs_cli.reports.plot import Panel, Series, draw

Row = Mapping[str, Any]

KINDS = {
    "weights": "weights",
    "state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "other": "other",
}
"""What lies on what, from the bottom: the beginnings of the fields' names, and what they are called."""


def draw_memory(rows: Sequence[Row], environment: Mapping[str, Any], path: Path) -> None:
    """Draw the memory of each profiled step into ``path`` (see `plot.draw`).

    Raises:
        DataError: When there are no rows, or the file cannot be written.
    """
    if not rows:
        raise DataError("no step could be profiled, so there is no picture", hint="choose a size that fits")
    versions, device = environment["versions"], environment["device"]
    caption = f"{environment['hardware']}, torch {versions['torch']}, {environment['date'][:10]}. "
    caption += "Activations are what forward and loss leave to backward; other is what is passing through. "
    caption += "Time is that of the host, with the profiler's own work in it."
    draw(memory_panels(rows), path, title=f"Memory of a training step ({device})", caption=caption, columns=1)


def memory_panels(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each step that was profiled."""
    steps: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        steps.setdefault(tuple(row[name] for name in ("size", "seq", "batch", "dtype")), []).append(row)
    panels = []
    for (size, seq, batch, dtype), some in steps.items():
        peak = max(row["total_bytes"] for row in some)
        unit, scale = ("GiB", 2**30) if peak >= 2**30 else ("MiB", 2**20)
        times = [row["ms"] for row in some]
        series = [
            Series(name, times, [row[f"{kind}_bytes"] / scale for row in some], is_emphasized=kind == "activations")
            for kind, name in KINDS.items()
        ]
        begins = {row["phase"]: row["ms"] for row in reversed(some)}
        panels.append(
            Panel(
                f"{size}, T = {seq:,}, B = {batch:,}, {dtype}",
                "ms since the step began",
                unit,
                series,
                is_stacked=True,
                levels=[(peak / scale, f"peak {peak / scale:,.4g} {unit}")],
                borders=[(ms, phase) for phase, ms in sorted(begins.items(), key=lambda item: item[1])],
            )
        )
    return panels

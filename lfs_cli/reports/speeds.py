"""Speeds of tokenizers as a picture: a panel for each task and number of threads, a pair of bars for each library.

An `.html` is drawn by plotly and shows numbers where the mouse points; it holds all that it needs. `.svg` and `.png`
are drawn by matplotlib: for these, plotly would have to start a browser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.files import replace_bytes, replacing
from lfs_cli.reports.plot import check_place

TASKS = {"learn": "learning a vocabulary", "encode": "encoding", "shard": "file to file of ids"}
STATES = {"cold": "first call", "warm": "further calls", "process": "whole process, from its start"}
PAIRS = {"learn": ("cold", "process"), "encode": ("cold", "warm"), "shard": ("cold", "process")}
"""The two bars of each task."""

OURS = {"cold": "#c2410c", "warm": "#fb923c", "process": "#fed7aa"}
OTHERS = {"cold": "#475569", "warm": "#94a3b8", "process": "#cbd5e1"}


@dataclass(frozen=True)
class Panel:
    """One task with one number of threads.

    Args:
        title: What is compared.
        libraries: Names, the fastest first by its faster bar.
        labels: The names, with the most memory that their processes held where that is what the task is about.
        speeds: State -> MB/s of each library, None where it was not measured.
    """

    title: str
    libraries: tuple[str, ...]
    labels: tuple[str, ...]
    speeds: Mapping[str, tuple[float | None, ...]]


def panels_of(rows: Sequence[Mapping[str, Any]]) -> list[list[Panel]]:
    """Return the panels of a benchmark's rows: a list for each task, with a panel for each number of threads.

    Of several calls of one library the fastest counts.
    """
    best: dict[tuple[str, int, str, str], float] = {}
    for row in rows:
        if row["megabytes_per_second"] is not None:
            key = row["task"], row["threads"], row["state"], row["implementation"]
            best[key] = max(best.get(key, 0.0), row["megabytes_per_second"])
    memory = {
        (row["task"], row["threads"], row["implementation"]): row["process_peak_bytes"]
        for row in rows
        if row["task"] == "shard" and row["state"] == "cold"
    }
    grid = []
    for task, (first, second) in PAIRS.items():
        panels = []
        for threads in sorted({key[1] for key in best if key[0] == task}):
            names = dict.fromkeys(key[3] for key in best if key[:2] == (task, threads))

            def fastest(name: str, where: tuple[str, int] = (task, threads), states: tuple = (first, second)) -> float:
                return max(best.get((*where, state, name), 0.0) for state in states)

            ranked = tuple(sorted(names, key=fastest, reverse=True))
            speeds = {
                state: tuple(best.get((task, threads, state, name)) for name in ranked) for state in (first, second)
            }
            labels = tuple(_with_memory(name, memory.get((task, threads, name))) for name in ranked)
            panels.append(Panel(f"{TASKS[task]}, {threads} thread{'s' * (threads > 1)}", ranked, labels, speeds))
        if panels:
            grid.append(panels)
    return grid


def _with_memory(name: str, peak_bytes: int | None) -> str:
    return name if peak_bytes is None else f"{name}, {peak_bytes / 1e6:,.0f} MB"


def check_can_draw(path: Path) -> None:
    """Raise unless a picture can be drawn to ``path``: to be asked before the measuring.

    Raises:
        ConfigError: When the library that draws a file of this kind is not installed.
        DataError: When no file can be written there.
    """
    library = _library(path)
    if find_spec(library) is None:
        raise ConfigError(f"drawing `{path}` needs {library}", hint="install it: `pip install 'lfs-cli[bench]'`")
    check_place(path)


def draw_speeds(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw a benchmark's rows into the file ``path``, in the kind that its name ends in.

    Raises:
        ConfigError: When the library that draws it is not installed.
        DataError: When there is nothing to draw, or the file cannot be written.
    """
    check_can_draw(path)
    grid = panels_of(rows)
    if not grid:
        raise DataError("nothing was measured that could be drawn", hint="see the notes on why")
    try:
        if _library(path) == "plotly":
            replace_bytes(path, _plotly(grid, title).encode())
        else:
            with replacing(path) as draft:
                _matplotlib(grid, title, draft, path.suffix.lower().removeprefix("."))
    except OSError as error:
        raise DataError(f"cannot write `{path}`: {error.strerror}", hint="name another file with `--plot`") from None


def _library(path: Path) -> str:
    return "plotly" if path.suffix.lower() == ".html" else "matplotlib"


def _colors(panel: Panel, state: str) -> list[str]:
    return [(OURS if name == "lfs" else OTHERS)[state] for name in panel.libraries]


def _label(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _matplotlib(grid: Sequence[Sequence[Panel]], title: str, path: Path, format: str) -> None:
    figure_of: Any = import_module(
        "matplotlib.figure"
    ).Figure  # without pyplot, which keeps figures and asks for a screen
    handle_of: Any = import_module("matplotlib.patches").Patch
    columns = max(map(len, grid))
    heights = [max(len(panel.libraries) for panel in panels) + 0.8 for panels in grid]
    figure = figure_of(figsize=(5.2 * columns + 0.8, 0.62 * sum(heights) + 1.3), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False, height_ratios=heights)
    for panels, line in zip(grid, axes, strict=True):
        for panel, axis in zip(panels, line, strict=False):
            _draw_panel(axis, panel, _range(panels))
        for axis in line[len(panels) :]:
            axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    used = {state for panels in grid for panel in panels for state in panel.speeds}
    shown = [state for state in STATES if state in used]
    handles = [handle_of(color=OTHERS[state], label=STATES[state]) for state in shown]
    handles.append(handle_of(color=OURS["cold"], label="lfs"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, format=format, dpi=150)


def _range(panels: Sequence[Panel]) -> tuple[float, float]:
    """Return the ends of the axis that all panels of one task have."""
    known = [speed for panel in panels for speeds in panel.speeds.values() for speed in speeds if speed]
    return min(known) / 3, max(known) * 3


def _draw_panel(axis: Any, panel: Panel, ends: tuple[float, float]) -> None:
    for offset, (state, speeds) in zip((0.0, 0.38), panel.speeds.items(), strict=True):
        places = [index + offset for index in range(len(speeds))]
        axis.barh(places, [speed or 0.0 for speed in speeds], height=0.36, color=_colors(panel, state))
        for place, speed in zip(places, speeds, strict=True):
            if speed:
                axis.text(speed * 1.06, place, _label(speed), va="center", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(*ends)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_yticks([index + 0.19 for index in range(len(panel.libraries))], panel.labels)
    axis.invert_yaxis()
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set_xlabel("MB/s, each line ten times the one before", fontsize=8)
    axis.grid(axis="x", color="#e2e8f0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9, length=0)
    axis.minorticks_off()
    axis.spines[["top", "right", "left"]].set_visible(False)


def _plotly(grid: Sequence[Sequence[Panel]], title: str) -> str:
    graphs: Any = import_module("plotly.graph_objects")
    subplots: Any = import_module("plotly.subplots")
    columns = max(map(len, grid))
    padded = [[*panels, *[None] * (columns - len(panels))] for panels in grid]
    figure = subplots.make_subplots(
        rows=len(grid),
        cols=columns,
        subplot_titles=[panel.title if panel else "" for panels in padded for panel in panels],
        horizontal_spacing=0.12,
    )
    for row, panels in enumerate(padded, start=1):
        for column, panel in enumerate(panels, start=1):
            if panel is None:
                continue
            for state, speeds in panel.speeds.items():
                bars = graphs.Bar(
                    y=list(panel.labels),
                    x=list(speeds),
                    orientation="h",
                    name=STATES[state],
                    text=[_label(speed) if speed else "" for speed in speeds],
                    textposition="outside",
                    cliponaxis=False,
                    marker_color=_colors(panel, state),
                    hovertemplate=f"%{{y}}, {STATES[state]}: %{{x:.4g}} MB/s<extra></extra>",
                    showlegend=False,
                )
                figure.add_trace(bars, row=row, col=column)
            figure.update_xaxes(type="log", title_text="MB/s", row=row, col=column)
            figure.update_yaxes(autorange="reversed", row=row, col=column)
    figure.update_layout(title=title, template="plotly_white", barmode="group", height=170 + 330 * len(grid))
    return figure.to_html(include_plotlyjs=True, full_html=True)

"""Pictures of measurements: curves over a number or bars over names, as SVG, PNG, PDF or an HTML page.

What is drawn is plain data: a picture is panels, a panel is series. A series has a spread, which is shown, and says
where it ends and why, so that what ran out of memory is seen and not just missing. Emphasized series, ours, have strong
colors and thick lines; the colors can be told apart by color-blind eyes, and no series is known by its color alone.

Needs matplotlib, which is imported when something is drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from textwrap import wrap
from typing import Any

from lfs_cli.errors import ConfigError, DataError
from lfs_cli.files import replace_bytes

SUFFIXES = (".svg", ".png", ".pdf", ".html")
"""What can be written."""

STRONG = ("#d1495b", "#8338ec", "#e07a1f", "#7a1f2b")
"""Colors of emphasized series."""

QUIET = ("#2a6f97", "#3a8f6e", "#6c757d", "#a98467", "#5fa8d3", "#94a861")
"""Colors of the others."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
INK, PALE, FAINT = "#22272e", "#5b636e", "#d7dbe0"

LONGEST_LABEL = 48
"""Characters of a name in the legend: more would not fit the narrowest picture."""

_FONT_SIZE, _COLUMN_SPACE = 9.5, 1.4


@dataclass(frozen=True)
class Series:
    """One line, or one bar of each group.

    Args:
        label: Its name in the legend; the same label has the same color in all panels.
        x: Numbers, or names for bars.
        y: A value for each of ``x``.
        low: Lower ends of the spread; empty when not known.
        high: Upper ends of it.
        is_emphasized: Whether it is what the picture is about.
        ending: Why there is no value after the last one, such as "out of memory"; "" when there is nothing to say.
    """

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_emphasized: bool = False
    ending: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: Above it.
        x: Label of the horizontal axis, with the unit.
        y: Label of the vertical axis, with the unit.
        series: What is drawn; curves when their x are numbers, else bars.
        is_log_x: Whether each doubling has the same width.
        is_log_y: Whether each factor has the same height; else the axis begins at zero.
        levels: Horizontal lines with names, such as what the hardware can do.
        is_stacked: Whether the curves lie on each other, as areas that hold until the next x. They share their x.
        borders: Vertical lines, each with the name of what begins there.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    is_log_x: bool = False
    is_log_y: bool = False
    levels: Sequence[tuple[float, str]] = ()
    is_stacked: bool = False
    borders: Sequence[tuple[float, str]] = ()


def check_plot(path: Path) -> None:
    """Raise unless a picture can be drawn to ``path``: to be asked before the measuring.

    Raises:
        ConfigError: For an unknown kind of file, a folder, or when matplotlib is not installed.
        DataError: When no file can be written there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"no picture can be written as `{path.name}`",
            hint=f"end its name in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, such as `{path.stem or 'plot'}.svg`",
        )
    if path.is_dir():
        raise ConfigError(f"`{path}` is a folder", hint=f"name a file, such as `{path / 'plot.svg'}`")
    try:
        import matplotlib  # noqa: F401  only asked for
    except ImportError:
        raise ConfigError("pictures need matplotlib", hint="install it: `pip install 'lfs-cli[bench]'`") from None
    check_place(path)


def check_place(path: Path) -> None:
    """Raise DataError unless a file can be written to ``path``, whose folders need not be there yet."""
    folder = path.resolve().parent  # where it is written: a link stays a link
    try:
        while not folder.exists():
            folder = folder.parent
        TemporaryFile(dir=folder).close()  # the rights of a folder do not say it all: root has any, even in /proc
    except OSError as error:
        hint = f"name a file in a folder that you can write, such as `{Path(gettempdir()) / path.name}`"
        raise DataError(f"cannot write {path}: {error.strerror}", hint=hint) from None


def draw(panels: Sequence[Panel | None], path: Path, *, title: str, caption: str = "", columns: int = 3) -> None:
    """Draw ``panels`` into the file ``path``, whose suffix says how.

    Args:
        panels: Row by row; None leaves a place empty.
        path: One of `SUFFIXES`. It appears when it is complete.
        title: Above all panels.
        caption: Below all panels: hardware, versions, date, what the spread is.
        columns: Panels side by side.

    Raises:
        ConfigError: As `check_plot` does.
        DataError: When the file cannot be written.
    """
    check_plot(path)
    suffix = path.suffix.lower()
    kind = "svg" if suffix == ".html" else suffix[1:]
    image = _image(panels, kind, title, caption, columns)
    if suffix == ".html":
        svg = image.decode()
        image = (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            "<style>svg { max-width: 100%; height: auto; }</style>\n</head>\n<body>\n"
            f"{svg[svg.index('<svg') :]}\n</body>\n</html>\n"
        ).encode()
    try:
        replace_bytes(path, image)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", hint="name a file that can be written") from None


def _image(panels: Sequence[Panel | None], kind: str, title: str, caption: str, columns: int) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = max(1, min(columns, len(panels)))
    lines = math.ceil(len(panels) / columns)
    look = {
        "font.family": "sans-serif",
        "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
        "font.size": _FONT_SIZE,
        "svg.fonttype": "path",
        "svg.hashsalt": "lfs",  # the same numbers give the same file
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    drawn = [panel for panel in panels if panel is not None]
    styles = _styles(drawn)
    with rc_context(look):
        wide = any(panel.is_stacked or not _is_curve(panel) for panel in drawn)
        width, height = max(5.6, (7.6 if wide else 3.7) * columns), 3.1 * lines
        labels = list(styles)
        # 0.06: behind the last column there is no gap, which is wider than the border
        entries = max(1, min(len(labels), int((width + 0.06) / _entry_width(labels))))
        words = [line for part in caption.splitlines() for line in wrap(part, int(width * 16), break_on_hyphens=False)]
        above, below = 0.53 + 0.206 * math.ceil(len(labels) / entries), 0.2 + 0.14 * len(words)
        height += above + below
        between = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - (above + below) / height))
        figure = Figure(figsize=(width, height), facecolor="white", layout=between)
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, panel in zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_axis_off()
            else:
                _draw_panel(axes, panel, styles)
        figure.text(0.1 / width, 1 - 0.12 / height, title, va="top", fontsize=13, fontweight="bold")
        figure.text(0.1 / width, 0.08 / height, "\n".join(words), va="bottom", fontsize=8, color=PALE)
        handles = _handles(grid)
        legend = figure.legend(
            [handles[label] for label in labels if label in handles],
            [_shortened(label) for label in labels if label in handles],
            loc="upper left",
            bbox_to_anchor=(0, 1 - 0.36 / height),
            ncols=entries,
            frameon=False,
            columnspacing=_COLUMN_SPACE,
        )
        legend.set_in_layout(False)
        stream = BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    return stream.getvalue()


def _entry_width(labels: Sequence[str]) -> float:
    """Return the inches that a column of the legend takes: its widest name, the line before it and the gap behind."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties()
    names = [TextPath((0, 0), _shortened(label), size=_FONT_SIZE, prop=font).get_extents().width for label in labels]
    line, gap = 2.0, 0.8  # matplotlib's own, in widths of the font like the space between columns
    return (max(names, default=0.0) + (line + gap + _COLUMN_SPACE) * _FONT_SIZE) / 72


def _shortened(label: str) -> str:
    """Return ``label`` without its middle where it is too long: names of runs differ at the end."""
    if len(label) <= LONGEST_LABEL:
        return label
    half = LONGEST_LABEL // 2
    return f"{label[:half]}…{label[1 - half :]}"


def _is_curve(panel: Panel) -> bool:
    return all(isinstance(x, int | float) for series in panel.series for x in series.x)


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Return color, marker and weight of each label."""
    emphasized = {series.label: series.is_emphasized for panel in panels for series in panel.series}
    strong = [label for label, is_strong in emphasized.items() if is_strong]
    quiet = [label for label, is_strong in emphasized.items() if not is_strong]
    styles = {}
    for labels, colors, width, depth in ((strong, STRONG, 2.4, 5), (quiet, QUIET, 1.5, 3)):
        for index, label in enumerate(labels):
            styles[label] = {
                "color": colors[index % len(colors)],
                "linewidth": width,
                "zorder": depth,
                "marker": MARKERS[len(styles) % len(MARKERS)],
            }
    return styles


def _draw_panel(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.is_stacked:
        _draw_areas(axes, panel, styles)
    elif _is_curve(panel):
        _draw_curves(axes, panel, styles)
    else:
        _draw_bars(axes, panel, styles)
    for value, name in panel.levels:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        axes.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    for x, name in panel.borders:
        axes.axvline(x, color=INK, linewidth=0.7, zorder=7)
        axes.annotate(
            name,
            (x, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            va="bottom",
            rotation=90,
            fontsize=8,
            zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
        )
    if panel.is_log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        least, most = axes.get_ylim()
        # Within a factor of ten there may be no power of ten to read
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:,g}" if most < 10 * least else "")
    else:
        axes.set_ylim(bottom=0)


def _draw_curves(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    for series in panel.series:
        if not series.y:
            continue
        style = styles[series.label]
        axes.plot(series.x, series.y, markersize=4.5, label=series.label, **style)
        if series.low and series.high:
            color, depth = style["color"], style["zorder"] - 1
            axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, linewidth=0, zorder=depth)
        if series.ending:
            axes.annotate(
                series.ending,
                (series.x[-1], series.y[-1]),
                xytext=(3, 6),
                textcoords="offset points",
                color=style["color"],
                fontsize=8,
                ha="right",
            )
    ticks = sorted({x for series in panel.series for x in series.x})
    if panel.is_log_x and ticks:
        axes.set_xscale("log", base=2)
        kept = ticks[:: math.ceil(len(ticks) / 6)]
        axes.set_xticks(kept, [_short(x) for x in kept])
        axes.minorticks_off()


def _draw_areas(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    x, labels = panel.series[0].x, [series.label for series in panel.series]
    colors = [styles[label]["color"] for label in labels]
    axes.stackplot(
        x, *(series.y for series in panel.series), labels=labels, colors=colors, step="post", linewidth=0, zorder=3
    )
    axes.set_xlim(x[0], x[-1])


def _draw_bars(axes: Any, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    groups = list(dict.fromkeys(x for series in panel.series for x in series.x))
    width = 0.84 / max(1, len(panel.series))
    for index, series in enumerate(panel.series):
        offset = (index - (len(panel.series) - 1) / 2) * width
        at = [groups.index(x) + offset for x in series.x]
        style = styles[series.label]
        axes.bar(at, series.y, 0.92 * width, color=style["color"], label=series.label, zorder=style["zorder"])
        if series.low and series.high:
            below = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
            above = [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]
            axes.errorbar(at, series.y, [below, above], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2, zorder=6)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups], fontsize=8.5)


def _handles(grid: Any) -> dict[str, Any]:
    """Return what stands for each label in the legend."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _short(number: float) -> str:
    """Return 16384 as 16k: lengths are multiples of 1,024 as a rule."""
    if number >= 1024 and number % 1024 == 0:
        return f"{number // 1024:g}k"
    return f"{number:g}"

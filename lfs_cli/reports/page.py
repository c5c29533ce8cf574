"""One run as an HTML page that needs nothing else: loss curves as inline SVG, results, settings and samples.

Pure functions from records to text. Whatever a run brings along, such as a name or a sample, is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lfs_cli.reports.compare import LARGEST, LOSS, UNITS, labels, measure_of, thin, validation_curve
from lfs_cli.reports.records import Record, Run, flatten
from lfs_cli.reports.table import COLUMNS, format_cell

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40
MOST_POINTS = 600
"""Points of one curve; more cannot be told apart at this width."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; } td.number { text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding-left: 1rem; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: var(--line); } .curve { fill: none; stroke-width: 1.8; } .faint { stroke-width: 1; opacity: .45; }
.curve { stroke: var(--ink); } tspan, circle.curve { fill: var(--ink); } .note { color: var(--faint); }
.c0 { --ink: #0b7285; } .c1 { --ink: #d9480f; } .c2 { --ink: #5f3dc4; } .c3 { --ink: #2b8a3e; } .c4 { --ink: #c2255c; }
""".strip()
_COLORS = 5
_AXIS_NAMES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page runs nothing and fetches nothing: a second lock on the door that escaping already keeps shut."""


def run_page(run: Run, others: Sequence[Run] = ()) -> str:
    """Return the page of ``run``.

    Args:
        run: Whose results, settings and samples are shown.
        others: Runs whose validation curves are drawn beside its own.
    """
    row = run.row()
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        *(f'<p class="note">warning: {escape(problem)}</p>' for problem in run.problems),
        _table((name, format_cell(name, row.get(name))) for name in COLUMNS if name != "run"),
        "<h2>Loss</h2>",
        loss_curves([run, *others]),
        loss_curves([run, *others], "seconds") if others else "",
        *_section("Settings", _table((name, show(value)) for name, value in flatten(run.config).items())),
        *_section("Evaluations", _evaluations(run.evaluations)),
        *_section("Samples", f"<pre>{escape(run.samples.strip())}</pre>" if run.samples.strip() else ""),
        *_section("Environment", _table((name, show(value)) for name, value in flatten(run.environment).items())),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(run.name)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def loss_curves(runs: Sequence[Run], axis: str = "step") -> str:
    """Return an SVG of validation losses with a legend, the first run's training loss behind them.

    Args:
        runs: One at least.
        axis: One of `lfs_cli.reports.compare.AXES`: what the losses are drawn over. Only over steps is the training
            loss shown.
    """
    measure = measure_of(runs)
    training = _finite(runs[0].steps) if axis == "step" and measure == LOSS else []
    validation = [validation_curve(run, axis, measure) for run in runs]
    everything = [*training, *(point for curve in validation for point in curve)]
    if not everything:
        return '<p class="note">no losses were recorded</p>'
    # The first steps of training fall from log V: what comes after would be a flat line below them.
    heights = sorted(loss for _, loss in everything)
    top = max([loss for curve in validation for _, loss in curve] or [heights[-1]])
    top = max(top, heights[round(0.98 * (len(heights) - 1))])
    frame = _Frame(max(place for place, _ in everything), heights[0], top)
    names = labels(runs)
    shapes = [frame.axes()]
    if len(training) > 1:
        shapes.append(frame.curve(thin(training, MOST_POINTS), "curve faint c0"))
    for index, curve in enumerate(validation):
        if curve:
            shapes.append(frame.curve(thin(curve, MOST_POINTS), f"curve c{index % _COLORS}", has_dots=len(curve) <= 40))
    legend = [f"{names[run.name]}: validation" for run in runs]
    entries = [f'<tspan class="c{index % _COLORS}">&#9632;</tspan> {escape(text)}' for index, text in enumerate(legend)]
    lines = [
        f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 14 + 16 * index}" text-anchor="end">{entry}</text>'
        for index, entry in enumerate(entries)
    ]
    over = f"{UNITS[measure]} over {_AXIS_NAMES[axis]}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over {_AXIS_NAMES[axis]}">\n'
        + "\n".join([*shapes, *lines])
        + f'\n</svg>\n<p class="note">{over}{"; thin: training loss of this run" if training else ""}</p>'
    )


class _Frame:
    """The mapping from steps and losses to the picture, with its axes."""

    def __init__(self, last_step: float, low: float, high: float) -> None:
        self.y_ticks = ticks(low, high if high > low else low + 1, 5)
        self.x_ticks = ticks(0, max(last_step, 1), 6)
        self.low, self.high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        self.last_step = max(last_step, 1)

    def place(self, step: float, loss: float) -> tuple[float, float]:
        """Return x and y in the picture; what is above it is drawn at its edge."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step
        share = (min(loss, self.high) - self.low) / (self.high - self.low)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    def axes(self) -> str:
        lines = []
        for value in self.y_ticks:
            _, y = self.place(0, value)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            lines.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
        for value in self.x_ticks:
            if value <= self.last_step:
                x, _ = self.place(value, self.low)
                lines.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:,.0f}</text>')
        return "\n".join(lines)

    def curve(self, points: Sequence[tuple[float, float]], style: str, *, has_dots: bool = False) -> str:
        places = [self.place(step, loss) for step, loss in points]
        line = f'<polyline class="{style}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
        dots = "".join(f'<circle class="{style}" cx="{x}" cy="{y}" r="2"/>' for x, y in places) if has_dots else ""
        return line + dots


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers around the range, about ``most`` of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def show(value: Any) -> str:
    """Return a setting as text for a person."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _finite(records: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    points = [(record["step"], record["loss"]) for record in records]
    return [(step, loss) for step, loss in points if abs(step) < LARGEST and abs(loss) < LARGEST]


def _evaluations(records: Sequence[Record]) -> str:
    if not records:
        return ""
    rows = [
        f'<tr><td class="number">{record["step"]:,}</td><td class="number">{record["loss"]:.4f}</td>'
        f'<td class="number">{escape(format_cell("val_bits_per_byte", record.get("bits_per_byte")))}</td></tr>'
        for record in thin(records, 40)
    ]
    head = "<tr><th>step</th><th>validation loss</th><th>bits per byte</th></tr>"
    return "<table>\n" + "\n".join([head, *rows]) + "\n</table>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>" if lines else ""


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", content] if content else []

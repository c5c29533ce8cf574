"""The picture of `lfs bench attention`, from its rows: time, speed and memory over the length, or bars for shapes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfs_cli.reports.plot import Panel, Series, draw

Row = Mapping[str, Any]

OURS = ("flash", "hopper", "triton")
"""What the picture is about."""

CONFIGURATION = ("batch", "heads", "kv_heads", "head_dim", "dtype", "causal", "window")
"""Fields that tell shapes of the same length apart."""


def draw_attention(rows: Sequence[Row], environment: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of one run of `lfs bench attention` into ``path`` (see `plot.draw`)."""
    panels, columns = attention_panels(rows)
    draw(panels, path, title=attention_title(rows), caption=attention_caption(rows, environment), columns=columns)


def attention_panels(rows: Sequence[Row]) -> tuple[list[Panel | None], int]:
    """Return what to draw, and how many panels stand side by side.

    One configuration at several lengths: time, TFLOP/s and memory below each other, a column for each pass. Several:
    the same for the last pass alone, a column for each configuration. Single lengths: bars, a panel for each pass, or
    for a single shape one panel with all passes.
    """
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    over_lengths = _over_lengths(rows)
    if not over_lengths:
        if len({_label(row, rows) for row in rows}) == 1:
            return [_bars("", rows, lambda row: row["pass"])], 1
        per_pass = [(kind, [row for row in rows if row["pass"] == kind]) for kind in passes]
        return [_bars(kind, some, lambda row: _label(row, rows)) for kind, some in per_pass], 1
    if len(over_lengths) == 1:
        cells = [(kind, [row for row in over_lengths[0] if row["pass"] == kind]) for kind in passes]
    else:
        cells = [
            (f"{name}, {passes[-1]}", [row for row in group if row["pass"] == passes[-1]])
            for name, group in zip(_names(over_lengths), over_lengths, strict=True)
        ]
    columns = min(4, len(cells))
    panels = []
    for start in range(0, len(cells), columns):
        line = cells[start : start + columns]
        blank = [None] * (columns - len(line))
        for draw_one in (_times, _speeds, _memory):
            if draw_one is not _memory or any(row["peak_bytes"] for row in rows):
                panels += [draw_one(title, group) for title, group in line] + blank
    return panels, columns


def _over_lengths(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each configuration that was measured at several lengths."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in CONFIGURATION), []).append(row)
    return [group for group in groups.values() if len({row["seq"] for row in group}) > 1]


def attention_title(rows: Sequence[Row]) -> str:
    """Return what all rows have in common, as a title."""
    first, parts = rows[0], []
    same = {name: all(row[name] == first[name] for row in rows) for name in (*CONFIGURATION, "seq")}
    letters = {"batch": "B", "heads": "H", "seq": "T", "head_dim": "D"}
    sizes = [f"{letter} = {first[name]:,}" for name, letter in letters.items() if same[name]]
    if same["kv_heads"] and first["kv_heads"] != first["heads"]:
        sizes.append(f"G = {first['kv_heads']}")
    parts += [", ".join(sizes)] if sizes else []
    parts += [first["dtype"]] if same["dtype"] else []
    parts += [("causal" if first["causal"] else "not causal")] if same["causal"] else []
    parts += [f"window {first['window']:,}"] if same["window"] and first["window"] else []
    return "Attention" + (f": {', '.join(parts)}" if parts else "")


def attention_caption(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """Return where and when the numbers were measured, and what the spread is."""
    versions = environment["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name))
    runs = [row["runs"] for row in rows if row["runs"]]
    count = f"{min(runs)}" if runs and min(runs) == max(runs) else f"{min(runs)} to {max(runs)}" if runs else "no"
    what = f"Medians of {count} runs in turns; bands and whiskers hold the middle half. FLOPs: 4BHT²D forward"
    what += ", half when causal, 2.5 times that backward."
    shown = {row["implementation"] for row in rows if row["status"] == "ok"} if _over_lengths(rows) else set()
    missing = dict.fromkeys(
        f"{row['implementation']} ({row['status']})"
        for row in rows
        if row["status"] in ("wrong", "failed", "unavailable")
        or (row["status"] == "out of memory" and row["implementation"] not in shown)
    )
    note = f"\nNot shown: {', '.join(missing)}." if missing else ""
    return f"{environment['hardware']}, {software}, {environment['date'][:10]}. {what}{note}"


def _times(title: str, rows: Sequence[Row]) -> Panel:
    return Panel(title, "T, positions", "ms", _curves(rows, lambda row, ms: ms), is_log_x=True, is_log_y=True)


def _speeds(title: str, rows: Sequence[Row]) -> Panel:
    series = _curves(rows, _tflops)
    return Panel(title, "T, positions", "TFLOP/s", series, is_log_x=True, levels=_ceiling(rows))


def _memory(title: str, rows: Sequence[Row]) -> Panel:
    known = [row for row in rows if row["peak_bytes"] or row["status"] != "ok"]
    series = _curves(known, lambda row, _: row["peak_bytes"] / 2**20)
    return Panel(title, "T, positions", "peak MiB beyond the inputs", series, is_log_x=True, is_log_y=True)


def _tflops(row: Row, milliseconds: float) -> float:
    """Return what the row's TFLOP/s would be if it took ``milliseconds``."""
    return row["tflops"] * row["median_ms"] / milliseconds


def _curves(rows: Sequence[Row], value: Any) -> list[Series]:
    curves = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row["seq"])
        good = [row for row in own if row["status"] == "ok" and row["median_ms"]]
        if not good:
            continue
        ends = [sorted((value(row, row["q1_ms"]), value(row, row["q3_ms"]))) for row in good]
        after = [row["status"] for row in own if row["seq"] > good[-1]["seq"] and row["status"] != "ok"]
        curves.append(
            Series(
                name,
                [row["seq"] for row in good],
                [value(row, row["median_ms"]) for row in good],
                [low for low, _ in ends],
                [high for _, high in ends],
                is_emphasized=name in OURS,
                ending=after[0] if after else "",
            )
        )
    return curves


def _bars(title: str, rows: Sequence[Row], label: Callable[[Row], str]) -> Panel:
    bars = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        own = [row for row in rows if row["implementation"] == name and row["median_ms"]]
        good = [row for row in own if row["status"] in ("ok", "published")]
        is_measured = all(row["status"] == "ok" for row in good)
        if good:
            bars.append(
                Series(
                    name if is_measured else f"{name} (published)",
                    [label(row) for row in good],
                    [row["tflops"] for row in good],
                    [_tflops(row, row["q3_ms"]) for row in good] if is_measured else (),
                    [_tflops(row, row["q1_ms"]) for row in good] if is_measured else (),
                    is_emphasized=name in OURS,
                )
            )
    return Panel(title, "", "TFLOP/s", bars, levels=_ceiling(rows))


def _ceiling(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Return the line of the matrix product, unless rows of several types have several."""
    found = {row["ceiling_tflops"] for row in rows if row["ceiling_tflops"]}
    return [(found.pop(), "matrix product")] if len(found) == 1 else []


def _label(row: Row, rows: Sequence[Row]) -> str:
    sizes = f"B{row['batch']} H{row['heads']}\nT{row['seq']:,} D{row['head_dim']}"
    return sizes if len({other["dtype"] for other in rows}) == 1 else f"{sizes}\n{row['dtype']}"


def _names(groups: Sequence[Sequence[Row]]) -> list[str]:
    """Return what tells each group from the others."""
    letters = {
        "batch": "B",
        "heads": "H",
        "kv_heads": "G",
        "head_dim": "D",
        "dtype": "",
        "causal": "",
        "window": "window",
    }
    differing = [name for name in CONFIGURATION if len({group[0][name] for group in groups}) > 1]

    def show(name: str, value: Any) -> str:
        if name == "causal":
            return "causal" if value else "not causal"
        return f"{letters[name]} {value}".strip() if name in ("window", "dtype") else f"{letters[name]}={value}"

    return [", ".join(show(name, group[0][name]) for name in differing) for group in groups]

"""`lfs report`: show all runs, or compare some of them."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, duration
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose

if TYPE_CHECKING:
    from lfs_cli.runs.report import ReportResult

COLUMNS = (
    Column("run", field("run")),
    Column("optimizer", field("optimizer"), rank=6),
    Column("attention", field("attention_type"), rank=7),
    Column("val loss", field("best_val_loss")),
    Column("bits/byte", field("val_bits_per_byte"), rank=2),
    Column("M params", field("params_M"), rank=3),
    Column("M tokens", field("tokens_M"), rank=1),
    Column("tokens/s", field("tokens_per_second"), rank=4),
    Column("time", lambda row: _time(row), rank=2),
    Column("device", field("device"), rank=8, is_detail=True),
    Column("status", field("status"), is_detail=True),
)

HEADERS = {"step": "steps", "tokens": "tokens", "seconds": "time"}


def command(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Runs to compare; none shows all, best first.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw their losses over time as .svg, .png, .pdf or .html.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show all runs, or compare some; bring data/output.md in step with them."""
    from lfs_cli.config import ReportConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(ReportConfig)
        return
    settings = load_config(ReportConfig, config, overrides or [], {"runs": runs or None, "plot": plot})
    from lfs_cli.runs.report import report

    result = report(settings, observer=console.observer)
    if as_json:
        console.results(
            result.rows,
            settings=result.settings,
            losses=result.losses,
            costs=result.costs,
            unit=result.unit,
            pages=result.pages,
            table=result.table,
            plot=result.plot,
        )
    elif sys.stdout.isatty():
        _show(console, result)
    else:
        for index, rows in enumerate(
            rows for rows in (result.rows, result.settings, result.losses, result.costs) if rows
        ):
            console.text("\n" if index else "")
            console.results(rows)
    console.next(_closing(result))


def _show(console: Console, result: "ReportResult") -> None:
    rows, same = lay_out(result.rows, COLUMNS)
    console.results(rows, title=f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}, best first" + _after(same))
    console.results(result.settings, title="settings that differ")
    for axis, header in HEADERS.items():
        losses = [_loss_row(row, header) for row in result.losses if row["axis"] == axis]
        console.results(losses, title=f"validation loss at equal {header}, {result.unit}")
    if result.costs:
        loss = f"{result.costs[0]['loss']:.3f} {result.unit}"
        console.results(
            [_cost_row(row) for row in result.costs], title=f"what each took to a validation loss of {loss}"
        )


def _loss_row(row: Mapping[str, Any], header: str) -> dict[str, Any]:
    return {header: _place(row["axis"], row["at"]), **_by_run(row)}


def _cost_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"until there": HEADERS[row["axis"]]} | {run: _place(row["axis"], at) for run, at in _by_run(row).items()}


def _by_run(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("axis", "at", "loss")}


def _place(axis: str, at: float) -> str | int:
    return duration(at) if axis == "seconds" else round(at)


def _time(row: Mapping[str, Any]) -> str | None:
    minutes = row.get("minutes")
    return duration(60 * minutes) if isinstance(minutes, int | float) else None


def _after(text: str) -> str:
    return f"; {text}" if text else ""


def _closing(result: "ReportResult") -> str:
    if not result.rows:
        return "no runs yet; next: `lfs train quickstart.json`"
    count = len(result.pages)
    wrote = [
        *([f"{result.table} ({result.table_rows} rows)"] if result.table else []),
        *([str(result.pages[0])] if count == 1 else [f"report.html of {count} runs"] if count else []),
        *([str(result.plot)] if result.plot else []),
    ]
    if result.losses:
        then = f"lfs generate --run {result.trained[0]}" if result.trained else ""
    else:
        then = f"lfs report {' '.join(result.names[:2])}"
    return "; ".join([*([f"wrote {' and '.join(wrote)}"] if wrote else []), *([f"next: `{then}`"] if then else [])])

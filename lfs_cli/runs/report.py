"""The body of `lfs report`: read run folders, compare them, and write the table and the pages that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lfs_cli.config import ReportConfig
from lfs_cli.files import leads_out, replace_bytes
from lfs_cli.reports.compare import (
    UNITS,
    best_first,
    costs_of_equal_loss,
    differing_settings,
    equal_losses,
    measure_of,
)
from lfs_cli.reports.curves import draw_curves
from lfs_cli.reports.page import run_page
from lfs_cli.reports.plot import check_plot
from lfs_cli.reports.records import Record, Run, read_run
from lfs_cli.reports.table import rewrite_table
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.observer import Observer


@dataclass(frozen=True)
class ReportResult:
    """What `lfs report` found and wrote.

    Args:
        rows: One row a run, best first.
        names: What names each of these runs on a command line.
        trained: Those of the names whose run has a checkpoint.
        settings: Settings in which the compared runs differ; empty when nothing is compared.
        losses: Their losses at equal steps, tokens and seconds.
        costs: The steps, tokens and seconds that each took to the lowest loss that all reach.
        unit: Of these losses.
        pages: The HTML pages that were written.
        table: The experiment table, or None when there is no run to tabulate.
        table_rows: Rows that the table has now.
        plot: The picture that was drawn, if one was asked for.
    """

    rows: list[Record]
    names: list[str]
    trained: list[str]
    settings: list[Record]
    losses: list[Record]
    costs: list[Record]
    unit: str
    pages: list[Path]
    table: Path | None
    table_rows: int
    plot: Path | None


def report(config: ReportConfig, data: DataFolder | None = None, observer: Observer | None = None) -> ReportResult:
    """Show runs and bring the experiment table in step with their folders.

    Args:
        config: Which runs to compare.
        data: Data folder; by default the one of this process.
        observer: Is told what could not be read or written.

    Raises:
        CheckpointError: When a named run does not exist.
        ConfigError: When no picture can be drawn as it was asked for.
        DataError: When the table or the picture cannot be written.
    """
    plot = None if config.plot is None else Path(config.plot)
    if plot is not None:
        check_plot(plot)
    data, observer = data or DataFolder.here(), observer or Observer()
    chosen = list(dict.fromkeys(data.find_run(name) for name in config.runs))
    folders = data.all_runs()
    for path in _not_runs(data, folders):
        observer.warning(f"{path} has no config.json, so it is not a run; skipped")

    runs = {folder: _read(folder) for folder in dict.fromkeys([*folders, *chosen])}
    compared = [runs[folder] for folder in chosen]
    shown = best_first(compared or list(runs.values()))
    for run in shown:
        for problem in run.problems:
            observer.warning(problem)

    table_rows = (
        rewrite_table(data.table, (_latest(folder, runs[folder]).row() for folder in folders)) if folders else 0
    )
    pages = []
    for folder, run in runs.items():
        others = [other for other in compared if other is not run]
        if folder in chosen or (not chosen and _is_stale(folder)):
            pages += _write_page(folder, run_page(run, others), observer)
    if plot is not None and shown:
        draw_curves(shown, plot)
    shown_folders = [next(folder for folder in runs if runs[folder] is run) for run in shown]
    return ReportResult(
        rows=[run.row() for run in shown],
        names=[data.name_of(folder) for folder in shown_folders],
        trained=[data.name_of(folder) for folder in shown_folders if folder.checkpoint_steps()],
        settings=differing_settings(compared) if len(compared) > 1 else [],
        losses=equal_losses(compared) if compared else [],
        costs=costs_of_equal_loss(compared) if len(compared) > 1 else [],
        unit=UNITS[measure_of(compared)] if compared else "",
        pages=pages,
        table=data.table if folders else None,
        table_rows=table_rows,
        plot=plot if shown else None,
    )


def _read(folder: RunFolder) -> Run:
    return read_run(
        folder.name,
        config=folder.config,
        environment=folder.environment,
        metrics=folder.metrics,
        samples=folder.samples,
        result=folder.result,
    )


def _latest(folder: RunFolder, run: Run) -> Run:
    """Return ``run``, read again when it has ended meanwhile.

    Called while the table is locked: a run writes its result before its row, so that no row of a finished run is
    replaced by one of a running one.
    """
    return _read(folder) if run.result is None and folder.result.exists() else run


def _not_runs(data: DataFolder, folders: Sequence[RunFolder]) -> list[Path]:
    if not data.runs.is_dir():
        return []
    known = {folder.path for folder in folders}
    return sorted(path for path in data.runs.iterdir() if path.is_dir() and path not in known)


def _is_stale(folder: RunFolder) -> bool:
    """Return whether the run has gone on since its page was written."""
    page = folder.report
    sources = [path for path in (folder.config, folder.metrics, folder.samples, folder.result) if path.exists()]
    return not page.exists() or any(path.stat().st_mtime > page.stat().st_mtime for path in sources)


def _write_page(folder: RunFolder, text: str, observer: Observer) -> list[Path]:
    if leads_out(folder.report, folder.path):  # somebody else's run must not choose where we write
        observer.warning(f"{folder.report} is a link that leads out of the run; it is not written")
        return []
    try:
        replace_bytes(folder.report, text.encode("utf-8", "replace"))
    except OSError as error:  # a run of somebody else, or a full disk: the report itself is still worth seeing
        observer.warning(f"cannot write {folder.report}: {error.strerror}")
        return []
    return [folder.report]

"""The body of `lfs bench`: run one benchmark on this machine and keep its records with those of earlier days."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfs_cli.benchmarks import BENCHMARKS, Bench
from lfs_cli.benchmarks.machine import environment, machine_name
from lfs_cli.config import BenchConfig
from lfs_cli.errors import LfsError
from lfs_cli.files import append_lines, locked, read_json, replace_text
from lfs_cli.model.device import choose_device, choose_dtype
from lfs_cli.reports.attention_plot import draw_attention
from lfs_cli.reports.memory_plot import draw_memory
from lfs_cli.reports.plot import check_plot
from lfs_cli.reports.speeds import check_can_draw, draw_speeds
from lfs_cli.runs.bench_text import find_text
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.plugins import import_plugins

Rows = Sequence[Mapping[str, Any]]
Check = Callable[[Path], None]
Draw = Callable[[Rows, Mapping[str, Any], Path], None]


def _draw_tokenizers(rows: Rows, environment: Mapping[str, Any], plot: Path) -> None:
    size = f"{rows[0]['text_bytes'] / 1e6:,.3g} MB of text"
    draw_speeds(rows, f"{environment['hardware']}, {environment['cores']} cores, {size}", plot)


PLOTS: dict[str, tuple[Check, Draw, str]] = {
    "attention": (check_plot, draw_attention, ""),
    "tokenizer": (check_can_draw, _draw_tokenizers, ""),
    "model": (check_plot, draw_memory, "memory"),
}
"""How a benchmark becomes a picture: what refuses a file before anything is measured, what draws rows into it, and the
table that they are of; "" for the rows themselves."""


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Args:
        rows: One for each thing measured; times in milliseconds, memory in bytes.
        environment: Hardware, versions and date.
        path: The file that the records were added to, or None when it could not be written.
        others: What else was written: a picture, a table of tuned tiles.
        tables: Rows of other kinds, by the name of their table. They are not kept in a file.
    """

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    path: Path | None
    others: tuple[Path, ...] = ()
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def bench(config: BenchConfig, data: DataFolder | None = None, observer: Observer | None = None) -> BenchResult:
    """Measure one part of lfs beside a baseline.

    Args:
        config: What to measure, and how often.
        data: Data folder; by default the one of this process.
        observer: Is told what happens.

    Raises:
        ConfigError: When settings do not fit each other, a plugin cannot be imported, or a picture cannot be drawn.
        DeviceError: When this machine does not have the device.
        DataError: When the text to measure on is missing.
        CheckpointError: When the run to measure with is missing.
    """
    data, observer = data or DataFolder.here(), observer or Observer()
    import_plugins(config.plugins)
    config.check_names()
    plot, text = _plot_of(config), find_text(config, data)
    device = choose_device(config.device)
    described = environment(device)
    observer.stage(
        f"bench {config.benchmark} on {described['hardware']}, {described['cores']} cores: "
        f"up to {config.warmup} runs to warm up, then {config.repeats} that count"
    )
    tables: dict[str, list[dict[str, Any]]] = {}
    rows = BENCHMARKS.get(config.benchmark)(
        config,
        Bench(
            device=device,
            dtype=choose_dtype(config.dtype, device),
            warmup=config.warmup,
            repeats=config.repeats,
            max_seconds=config.max_seconds,
            on_progress=lambda label, done, total: observer.progress(label, done, total, unit="runs"),
            on_note=observer.stage,
            on_table=lambda name, more: tables.setdefault(name, []).extend(more),
            text=text,
            checkpoint=data.find_run(config.generation.run).best() if config.generation.run else None,
        ),
    )
    observer.finish_progress()
    settings = config.model_dump(mode="json", include={config.benchmark, "warmup", "repeats", "max_seconds", "seed"})
    records = [{"benchmark": config.benchmark, **row, "settings": settings, "environment": described} for row in rows]
    path = _append(data.benchmarks / f"{machine_name(device)}.jsonl", records, observer)
    others = []
    if config.benchmark == "attention" and config.attention.tune:
        others.append(_keep_tuned(data.benchmarks / "tuned_attention.json", rows, described, observer))
    if plot is not None:
        _, _, table = PLOTS[config.benchmark]
        drawn = tables.get(table, []) if table else rows
        others.append(_draw(config.benchmark, drawn, described, plot, observer))
    return BenchResult(rows, described, path, tuple(other for other in others if other is not None), tables)


def _plot_of(config: BenchConfig) -> Path | None:
    """Return the file to draw in, if any. Raises ConfigError, before anything is measured, when it cannot be drawn."""
    plot = getattr(getattr(config, config.benchmark, None), "plot", None)
    if plot is None:
        return None
    check, _, _ = PLOTS[config.benchmark]
    check(Path(plot))
    return Path(plot)


def _draw(benchmark: str, rows: Rows, environment: Mapping[str, Any], plot: Path, observer: Observer) -> Path | None:
    try:
        _, draw, _ = PLOTS[benchmark]
        draw(rows, environment, plot)
    except LfsError as error:  # what was measured is worth showing without it
        observer.warning(f"{error}; {error.hint}" if error.hint else str(error))
        return None
    return plot


def _keep_tuned(path: Path, rows: Rows, environment: Mapping[str, Any], observer: Observer) -> Path | None:
    """Put the best choice of each kernel into the table at ``path``, in place of an older one of the same GPU."""

    def place(entry: Mapping[str, Any]) -> str:
        return json.dumps([entry["hardware"], entry["kernel"], entry["bucket"], entry["shape"]], sort_keys=True)

    shape = ("seq", "batch", "heads", "kv_heads", "head_dim", "causal", "dtype", "pass")
    fresh = [
        {
            "hardware": environment["hardware"],
            "kernel": row["kernel"],
            "bucket": row["bucket"],
            "choice": row["choice"],
            "shape": {name: row[name] for name in shape},
            "median_ms": row["median_ms"],
            "tflops": row["tflops"],
            "speed_ratio": row["speed_ratio"],
            "versions": {name: environment["versions"].get(name) for name in ("torch", "triton")},
            "date": environment["date"],
            "commit": environment["commit"],
        }
        for row in rows
        if row["is_best"]
    ]
    try:
        with locked(path):
            kept = read_json(path) if path.exists() else []
            table = {place(entry): entry for entry in [*kept, *fresh]}
            replace_text(path, json.dumps(list(table.values()), indent=2) + "\n")
    except OSError as error:
        observer.warning(f"cannot write {path}: {error.strerror}; copy the best rows from the table shown")
        return None
    except (ValueError, KeyError, TypeError):
        observer.warning(f"{path} is not a table of tuned tiles; it is left as it is")
        return None
    return path


def _append(path: Path, records: list[dict[str, Any]], observer: Observer) -> Path | None:
    """Add ``records`` to the file, one a line; what was measured is worth showing even where it cannot be kept."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    try:
        append_lines(path, lines)
    except OSError as error:
        observer.warning(f"cannot write {path}: {error.strerror}; these records are not kept")
        return None
    return path

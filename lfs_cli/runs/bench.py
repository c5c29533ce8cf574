"""The body of `lfs bench`: run one benchmark on this machine and keep its records with those of earlier days."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfs_cli.benchmarks import BENCHMARKS, Bench
from lfs_cli.benchmarks.machine import environment, machine_name
from lfs_cli.config import BenchConfig
from lfs_cli.errors import DataError
from lfs_cli.model.device import choose_device, choose_dtype
from lfs_cli.runs.folder import DataFolder
from lfs_cli.runs.observer import Observer


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Args:
        rows: One for each thing measured; times in milliseconds, memory in bytes.
        environment: Hardware, versions and date.
        path: The file that the records were added to, or None when it could not be written.
    """

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    path: Path | None


def bench(config: BenchConfig, data: DataFolder | None = None, observer: Observer | None = None) -> BenchResult:
    """Measure one part of lfs beside a baseline.

    Args:
        config: What to measure, and how often.
        data: Data folder; by default the one of this process.
        observer: Is told what happens.

    Raises:
        ConfigError: When settings do not fit each other.
        DeviceError: When this machine does not have the device.
        DataError: When the text to measure on is missing.
        CheckpointError: When the run to measure with is missing.
    """
    data, observer = data or DataFolder.here(), observer or Observer()
    device = choose_device(config.device)
    described = environment(device)
    observer.stage(
        f"bench {config.benchmark} on {described['hardware']}, {described['cores']} cores: "
        f"up to {config.warmup} runs to warm up, then {config.repeats} that count"
    )
    rows = BENCHMARKS.get(config.benchmark)(
        config,
        Bench(
            device=device,
            dtype=choose_dtype(config.dtype, device),
            warmup=config.warmup,
            repeats=config.repeats,
            max_seconds=config.max_seconds,
            on_progress=lambda label, done, total: observer.progress(label, done, total, unit="runs"),
            text=_text(config, data) if config.benchmark == "tokenizer" else None,
            checkpoint=data.find_run(config.generation.run).best() if config.generation.run else None,
        ),
    )
    observer.finish_progress()
    settings = config.model_dump(mode="json", include={config.benchmark, "warmup", "repeats", "max_seconds", "seed"})
    records = [{"benchmark": config.benchmark, **row, "settings": settings, "environment": described} for row in rows]
    return BenchResult(rows, described, _append(data.benchmarks / f"{machine_name(device)}.jsonl", records, observer))


def _text(config: BenchConfig, data: DataFolder) -> Path | None:
    """Return the training text of the dataset, or None for the built-in one, which is made on the spot."""
    name = config.tokenizer.dataset
    if name == "sample":  # of any size, whatever the copy in the data folder has
        return None
    path = data.raw(name) / "train.txt"
    if path.is_file():
        return path
    raise DataError(f"no text for `{name}` in {data.raw(name)}", hint=f"run `lfs download {name}`")


def _append(path: Path, records: list[dict[str, Any]], observer: Observer) -> Path | None:
    """Add ``records`` to the file, one a line; what was measured is worth showing even where it cannot be kept."""
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        observer.warning(f"cannot write {path}: {error.strerror}; these records are not kept")
        return None
    return path

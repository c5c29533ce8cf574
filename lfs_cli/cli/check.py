"""What `lfs train --check-data` shows."""

import sys
from typing import TYPE_CHECKING, Any

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, duration, size
from lfs_cli.errors import DataError

if TYPE_CHECKING:
    from lfs_cli.config import TrainConfig

COLUMNS = (
    Column("what", field("what")),
    Column("where", lambda row: str(row["path"])),
    Column("MB", field("bytes", 1e-6)),
    Column("MB/s", field("MB/s"), rank=1),
    Column("outcome", field("outcome")),
)


def check(console: Console, settings: "TrainConfig") -> None:
    """Check the data of an experiment and show each part. Raises DataError when one is damaged."""
    from lfs_cli.runs.check import check_data
    from lfs_cli.runs.folder import DataFolder

    parts = check_data(settings, DataFolder.here(), console.observer)
    rows: list[dict[str, Any]] = [
        {
            "what": part.what,
            "path": part.path,
            "bytes": part.bytes,
            "seconds": part.seconds,
            "MB/s": part.bytes / part.seconds / 1e6,
            "outcome": part.outcome,
            **({"problem": str(part.problem) if part.problem else None} if console.as_json else {}),
        }
        for part in parts
    ]
    total, seconds = sum(part.bytes for part in parts), sum(part.seconds for part in parts)
    console.results(
        rows if console.as_json or not sys.stdout.isatty() else lay_out(rows, COLUMNS)[0], bytes=total, seconds=seconds
    )
    problems = [part.problem for part in parts if part.problem]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}", hint=problems[0].hint)
    console.next(f"all {size(total)} are whole, read in {duration(seconds)} ({size(total / seconds)}/s)")

"""The experiment table: one Markdown row a run, in a file that people may write in too.

The table is the block of `|` lines whose first two columns are `timestamp` and `experiment_name`. Whatever stands above
and below it belongs to whoever wrote it and is kept to the byte. A run has one row, known by its `run`: `append_row`
adds it at the end, `rewrite_table` brings rows in step with the run folders and keeps every other row.

Both take a lock beside the file, write a temporary file and rename it, so that runs which end in the same moment lose
no row and a reader never meets half a table.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfs_cli.errors import DataError
from lfs_cli.files import locked, replace_text

COLUMNS: dict[str, str] = {
    "timestamp": "",
    "experiment_name": "",
    "optimizer": "",
    "attention_type": "",
    "best_val_loss": ".4f",
    "params_M": ",.2f",
    "tokens_M": ",.2f",
    "val_bits_per_byte": ".4f",
    "tokens_per_second": ",.0f",
    "minutes": ",.1f",
    "device": "",
    "run": "",
    "status": "",
}
"""Columns in order, each with the format of its numbers; one without a format holds text."""

_HEADING = """# Experiments

One row a run, written by `lfs train`; `lfs report` brings the table in step with the run folders. Losses are in nats a
token, on validation text. Text above and below the table is yours.
"""
_BAR = re.compile(r"(?<!\\)\|")  # a bar that no backslash protects


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add ``row`` at the end of the table in ``path``, which is created with a heading when it is absent.

    A run that was stopped and resumed has a row already, which the new one replaces.

    Args:
        path: The Markdown file.
        row: Values by column. A column that ``row`` lacks stays empty; a key without a column is left out.

    Raises:
        DataError: When the file cannot be written; it is then as it was.
    """
    with _alone(path):
        page = _read(path)
        new = _cells(row)
        page.rows = [cells for cells in page.rows if not _same_run(cells, new)] + [new]
        page.columns += [] if "run" in page.columns else ["run"]  # without it no row could be told from another
        _write(path, page)


def rewrite_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Bring the table in ``path`` in step with ``rows`` and sort it by timestamp.

    A row with the same `run` is replaced; columns that others have added keep their cells. Rows of runs that are not
    among ``rows``, such as those whose folder was deleted, are kept as they are.

    Args:
        path: The Markdown file, created when absent.
        rows: One mapping a run, with its name under `run`. Read while the table is locked.

    Returns:
        How many rows the table has now.

    Raises:
        DataError: When the file cannot be written; it is then as it was.
    """
    with _alone(path):
        page = _read(path)
        fresh = {cells["run"]: cells for cells in map(_cells, rows)}
        kept = [{**cells, **fresh.pop(cells.get("run", ""), {})} for cells in page.rows]
        page.columns = [*COLUMNS, *(name for name in page.columns if name not in COLUMNS)]
        page.rows = sorted([*kept, *fresh.values()], key=lambda cells: cells.get("timestamp", ""))
        _write(path, page)
        return len(page.rows)


@dataclass
class _Page:
    """A file cut in three: text above the table, its columns and rows (formatted, unescaped), text below."""

    above: str
    columns: list[str]
    rows: list[dict[str, str]]
    below: str
    newline: str


def _read(path: Path) -> _Page:
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:  # keeps line ends and odd bytes
            text = file.read()
    except FileNotFoundError:
        return _Page(f"{_HEADING}\n", list(COLUMNS), [], "", "\n")
    except OSError as error:
        raise _unwritable(path, error) from None
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if _split(line)[:2] == ["timestamp", "experiment_name"]), None)
    if start is None:
        gap = "" if not text or text.endswith(newline * 2) else newline if text.endswith(newline) else newline * 2
        return _Page(text + gap, list(COLUMNS), [], "", newline)
    end = start
    while end < len(lines) and lines[end].lstrip().startswith("|"):
        end += 1
    columns = _split(lines[start])
    body = [_split(line) for line in lines[start + 1 : end]]
    if body and all(set(cell) <= set(":-") for cell in body[0]):  # the rule under the header
        del body[0]
    rows = [dict(zip(columns, cells, strict=False)) for cells in body]
    return _Page("".join(lines[:start]), columns, rows, "".join(lines[end:]), newline)


def _write(path: Path, page: _Page) -> None:
    rule = ["---:" if COLUMNS.get(name) else "---" for name in page.columns]
    cells = [[_escape(row.get(name, "")) for name in page.columns] for row in page.rows]
    lines = [_join(page.columns), f"|{'|'.join(rule)}|", *map(_join, cells)]
    text = page.above + "".join(line + page.newline for line in lines) + page.below
    try:
        replace_text(path, text)
    except OSError as error:
        raise _unwritable(path, error) from None


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: format_cell(name, row.get(name)) for name in COLUMNS}


def _same_run(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return one.get("run", "-") == other["run"] != "-"


def format_cell(column: str, value: Any) -> str:
    """Return ``value`` as the table shows it: numbers in the format of their column, `-` for what is not known."""
    if value is None or value == "":
        return "-"
    form = COLUMNS.get(column, "")
    if form and isinstance(value, int | float) and not isinstance(value, bool):
        return format(value, ".3g" if 0 < abs(value) < 0.1 else form)  # 1,280 tokens are 0.00128 million and not 0.00
    return " ".join(str(value).split())  # a row is one line


def _split(line: str) -> list[str]:
    """Return the unescaped cells of a Markdown table's line."""
    inner = line.strip().removeprefix("|")
    cells = [cell.strip() for cell in _BAR.split(inner)]
    if len(cells) > 1 and not cells[-1]:
        cells.pop()
    return [cell.replace("\\|", "|").replace("&lt;", "<") for cell in cells]


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")  # what shows Markdown takes a tag for a tag


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the table alone among all processes, from reading it to writing it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise _unwritable(path, error) from None
        yield


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write the experiment table {path}: {error.strerror}",
        hint="make room or check its permissions, then run `lfs report`: it adds what is missing from the run folders",
    )

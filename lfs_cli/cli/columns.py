"""Which columns of a record a person sees: a terminal has 80 characters or 200, a record has thirty fields.

What is the same in all rows moves into the title, and the least important columns go first when the rest would not fit.
Pipes and `--json` are not concerned: they get every field.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfs_cli.cli.console import show

GAP, EDGES = 3, 2
"""Characters between two columns, and at both ends of a line together."""


@dataclass(frozen=True)
class Column:
    """One column of a table on a terminal.

    Args:
        header: Its name, with the unit.
        value: From a record to what stands there: a number, a text or None.
        rank: 0 stays whatever happens; of the others the highest goes first when space is short.
        is_detail: Moves into the title when all rows have the same value.
    """

    header: str
    value: Callable[[Mapping[str, Any]], Any]
    rank: int = 0
    is_detail: bool = False


def field(name: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that takes the field ``name`` of a record, multiplied by ``scale`` when it is a number."""

    def value(record: Mapping[str, Any]) -> Any:
        found = record.get(name)
        return found * scale if scale != 1.0 and isinstance(found, int | float) else found

    return value


def lay_out(
    records: Sequence[Mapping[str, Any]], columns: Sequence[Column], width: int | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows to show and a title that says what is the same in all of them.

    Args:
        records: Complete rows.
        columns: In the order of the table.
        width: Characters of a line; by default those of the terminal.
    """
    width = width or shutil.get_terminal_size().columns
    values = {column: [column.value(record) for record in records] for column in columns}
    shown = [column for column in columns if any(value not in (None, "") for value in values[column])]
    same = [column for column in shown if column.is_detail and len(set(map(show, values[column]))) == 1]
    shown = [column for column in shown if column not in same]
    while _width(shown, values) > width and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    rows = [{column.header: values[column][index] for column in shown} for index in range(len(records))]
    return rows, ", ".join(f"{column.header} {show(values[column][0])}" for column in same)


def _width(columns: Sequence[Column], values: Mapping[Column, Sequence[Any]]) -> int:
    widest = [max(len(column.header), *(len(show(value)) for value in values[column])) for column in columns]
    return sum(widest) + GAP * (len(columns) - 1) + EDGES

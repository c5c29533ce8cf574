"""Tokens as a person sees them: each one above its id, side by side, with marks for what is else invisible.

    Once  ·upon  ·a   ·time  ,   ·there
    7454  2402   257  640    11  612

A blank always separates two tokens, since a space inside one is drawn as a mark. So the picture reads the same without
color, which only makes neighbours easier to tell apart.
"""

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfs_cli.runs.pieces import Piece

MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
"""What stands for white space. Where these characters are in the text themselves, they are written as escapes."""

PLAIN_MARKS = {" ": "_", "\n": "\\n", "\t": "\\t"}
"""The same for a terminal that cannot show them."""

STYLES = ("black on #9fd3e8", "black on #f3d58a")
SPECIAL = "bold white on #8a3a6b"


def escaped(token: bytes, marks: dict[str, str] | None = None) -> str:
    r"""Return ``token`` on one line, with escapes as Python writes them for all that is not printable.

    >>> escaped(b" a\n\xe4")
    ' a\\n\\xe4'

    Args:
        token: UTF-8, or a part of a character.
        marks: Characters to write in place of some, which then are escaped themselves.
    """
    marks = marks or {}
    text = token.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(
        marks[c] if c in marks else c if _is_clear(c) and c not in marks.values() else _escape(c) for c in text
    )


def _is_clear(character: str) -> bool:
    return character == "\\" or character.isprintable()


def _escape(character: str) -> str:
    """Return an escape for one character, also for a printable one."""
    written = character.encode("unicode_escape").decode()
    return written if written != character else f"\\x{ord(character):02x}"


def marked(token: bytes) -> str:
    """Return ``token`` on one line, with marks for white space, in characters that stdout can write."""
    can_mark = _can_write("".join(MARKS.values()))
    label = escaped(token, MARKS if can_mark else PLAIN_MARKS)
    if unicodedata.category(label[0]).startswith("M"):  # it would sit on the token before
        label = "\u25cc" + label
    return label if _can_write(label) else label.encode("ascii", "backslashreplace").decode()


@dataclass(frozen=True)
class _Cell:
    label: str
    id: str
    style: str
    width: int
    ends_line: bool


def draw(pieces: Iterable["Piece"]) -> None:
    """Print ``pieces`` to a terminal."""
    from rich.console import Console as RichConsole
    from rich.text import Text

    console = RichConsole(highlight=False)
    for number, cells in enumerate(_rows(_cells(pieces, console.width), console.width)):
        labels, ids = Text("\n" if number else ""), Text()
        for cell in cells:
            labels.append(cell.label, cell.style)
            labels.append(" " * (cell.width - _width(cell.label) + 1))
            ids.append(cell.id.ljust(cell.width + 1), "dim")
        for line in (labels, ids):
            line.rstrip()
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print()


def _cells(pieces: Iterable["Piece"], width: int) -> Iterator[_Cell]:
    for number, piece in enumerate(pieces):
        label = marked(piece.token)
        style = SPECIAL if piece.is_special else STYLES[number % 2]
        parts = list(_chopped(label, width))
        for i, part in enumerate(parts):  # a token wider than the terminal goes on in the next line, its id only once
            id = str(piece.id) if i == 0 else ""
            is_last = i == len(parts) - 1
            yield _Cell(part, id, style, max(_width(part), len(id)), is_last and piece.token.endswith(b"\n"))


def _rows(cells: Iterable[_Cell], width: int) -> Iterator[list[_Cell]]:
    row: list[_Cell] = []
    used = 0
    for cell in cells:
        if row and used + cell.width > width:
            yield row
            row, used = [], 0
        row.append(cell)
        used += cell.width + 1
        if cell.ends_line:
            yield row
            row, used = [], 0
    if row:
        yield row


def _chopped(label: str, width: int) -> Iterator[str]:
    """Yield ``label`` in parts that are at most ``width`` columns wide."""
    part, used = "", 0
    for character in label:
        columns = _width(character)
        if part and used + columns > width:
            yield part
            part, used = "", 0
        part, used = part + character, used + columns
    yield part


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def piece_row(piece: "Piece") -> dict[str, Any]:
    """Return what a program reads about one token; offsets are those of UTF-8 bytes."""
    return {
        "id": piece.id,
        "text": escaped(piece.token),
        "start": piece.start,
        "stop": piece.stop,
        "special": "yes" if piece.is_special else "",
    }

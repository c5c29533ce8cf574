"""What people see: results on stdout; progress, notes and warnings on stderr.

stdout has three readers: a terminal gets tables, a pipe gets tab-separated lines, `--json` gives one object.
stderr has two: a terminal gets a bar that moves, anything else a line now and then. No color carries meaning alone.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lfs_cli.runs.observer import Observer

if TYPE_CHECKING:
    from lfs_cli.config import Settings

_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # Unicode's overrides of the writing direction

PLAIN_SECONDS = 10
"""Least time between two lines of one bar where there is no terminal."""


class Console:
    """The one door to stdout and stderr.

    Args:
        as_json: Print results as one JSON object.
        quiet: Leave out progress and notes; warnings and errors stay.
        verbose: Show what modules log.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        if verbose:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_PrintableFormatter("%(name)s: %(message)s"))
            logging.basicConfig(handlers=[handler], level=logging.INFO)
        self.observer: Observer = ConsoleObserver(self)

    @property
    def is_live(self) -> bool:
        """Whether stderr is a terminal that can show a moving bar."""
        return sys.stderr.isatty() and not self.quiet and os.environ.get("TERM") != "dumb"

    def results(self, rows: Sequence[Mapping[str, Any]], title: str = "", **extra: Any) -> None:
        """Print ``rows``: a table, tab-separated lines, or with `--json` one object that also holds ``extra``."""
        if self.as_json:
            whole = _finite(json.loads(json.dumps({"rows": list(rows), **extra}, default=_plain)))
            is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
            text = json.dumps(whole, ensure_ascii=not is_utf8, allow_nan=False)
            print("".join(c if _is_tame(c) else f"\\u{ord(c):04x}" for c in text).encode(errors="replace").decode())
            return
        if not rows:
            return
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not sys.stdout.isatty():
            print("\t".join(names))
            for row in rows:
                print("\t".join(_flat(row.get(name)) for name in names))
            return
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD, title=Text(printable(title)) if title else None, title_justify="left", pad_edge=False
        )
        for name in names:
            numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
            table.add_column(
                Text(printable(name)), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
            )
        for row in rows:
            table.add_row(*(Text(printable(show(row.get(name)))) for name in names))
        RichConsole(highlight=False).print(table)

    def lines(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Print ``rows``, which all have the same names, as tab-separated lines while they come."""
        for number, row in enumerate(rows):
            if number == 0:
                print("\t".join(row))
            print("\t".join(map(_flat, row.values())))

    def explain(self, schema: type["Settings"]) -> None:
        """Print every setting of ``schema`` with its default and meaning."""
        from lfs_cli.config import explain

        self.results(
            [{"setting": name, "default": default, "meaning": text} for name, default, text in explain(schema)]
        )

    def text(self, text: str, end: str = "") -> None:
        """Print generated text to stdout, at once."""
        print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Print a line to stderr, unless quiet."""
        if not self.quiet:
            self.observer.finish_progress()
            print(printable(text), file=sys.stderr, flush=True)

    def next(self, text: str) -> None:
        """Print the closing line: what was made and what to do next."""
        self.note(text)

    def warning(self, text: str) -> None:
        """Print a `warning:` line to stderr, even when quiet."""
        self.observer.finish_progress()
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


class ConsoleObserver(Observer):
    """Shows stages as lines and progress as one bar, with rate and time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._label = ""
        self._bar: Any = None
        self._started = self._shown = 0.0
        self._first = 0

    def stage(self, text: str) -> None:
        self.console.note(text)

    def warning(self, text: str) -> None:
        self.console.warning(text)

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None:
        if self.console.quiet:
            return
        now = time.monotonic()
        if label != self._label:
            self.finish_progress()
            self._label, self._started, self._shown, self._first = label, now, now, done
            if self.console.is_live:
                self._bar = _bar(unit)
                self._bar.add_task(printable(label), total=total or None, completed=done)
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total or None)
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            print(
                _plain_line(printable(label), done, total, unit, done - self._first, now - self._started),
                file=sys.stderr,
            )

    def finish_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._label = None, ""


def show(value: Any) -> str:
    """Return ``value`` for a person: thousands separated, four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if abs(value) >= 1_000:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """Return a time as `0.8s`, `42s`, `3m 05s` or `1h 02m`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def size(count: float) -> str:
    """Return bytes in decimal units, such as `2.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1_000:
            return f"{count:.3g} {unit}"
        count /= 1_000
    return f"{count:.3g} TB"


def printable(text: str) -> str:
    """Return ``text`` without the characters that could steer a terminal or turn its lines around; others stay."""
    return text if text.isascii() and text.isprintable() else "".join(c if _is_tame(c) else "\ufffd" for c in text)


def _is_tame(character: str) -> bool:
    return character in "\n\t" or not (character in _TURNS or category(character) == "Cc")


class _PrintableFormatter(logging.Formatter):
    """Formats a record without what could steer a terminal: modules log what they read in files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _bar(unit: str) -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), TextColumn(unit))
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        *amount,
        TimeRemainingColumn(),
        console=RichConsole(stderr=True, highlight=False),
        transient=True,
    )


def _plain_line(label: str, done: int, total: int, unit: str, moved: int, seconds: float) -> str:
    rate = moved / seconds if seconds > 0 else 0.0
    share = f" {done / total:.0%}" if total else ""
    left = f", {duration((total - done) / rate)} left" if total and rate > 0 else ""
    amount = f"{size(done)}, {size(rate)}/s" if unit == "B" else f"{done:,} {unit}, {rate:,.0f} {unit}/s"
    return f"{label}{share} ({amount}{left})"


def _flat(value: Any) -> str:
    """Return ``value`` for a program: no separators, one line."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ",".join(_flat(item) for item in value)
    return " ".join(str(value).replace("\t", " ").splitlines())


def _finite(value: Any) -> Any:
    """Return ``value`` with null for numbers that JSON does not have: infinity, and what is not a number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")

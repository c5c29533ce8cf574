"""What a run writes down about itself: metrics.jsonl and samples.md as it goes, and environment.json once."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lfs_cli
from lfs_cli.errors import CheckpointError, remedy
from lfs_cli.files import read_text, replace_text
from lfs_cli.reports.records import LARGEST_JOURNAL


class Journal:
    """Appends one JSON object a line to metrics.jsonl, each whole at once, so that the file is safe to tail.

    Args:
        path: The file. It is created when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises CheckpointError when the disk is full or the folder cannot be written."""
        with _explained("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def trim(self, step: int) -> list[dict[str, Any]]:
        """Drop every record after ``step``, so that a resumed run leaves neither gaps nor repeats; return the rest.

        Raises:
            CheckpointError: When the file cannot be read or written.
        """
        with _explained("read or write", self.path):
            if not self.path.exists():
                return []
            text = read_text(self.path, LARGEST_JOURNAL, errors="replace")
            kept = [line for line in text.split("\n") if _step_of(line) <= step]
            trimmed = "".join(f"{line}\n" for line in kept)
            if trimmed != text:
                replace_text(self.path, trimmed)
            return [json.loads(line) for line in kept]


class Samples:
    """Appends what the model wrote to samples.md, a section for each evaluation.

    Args:
        path: The file. It is created when the first text is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, text: str) -> None:
        """Write a section. Raises CheckpointError when the disk is full or the folder cannot be written."""
        quoted = "".join(f"> {line}\n" for line in text.splitlines())
        with _explained("write", self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(f"{_SECTION}{step:,}\n\n{quoted}\n")

    def trim(self, step: int) -> None:
        """Drop every section after ``step``, also half of one that a killed run left.

        Raises:
            CheckpointError: When the file cannot be read or written.
        """
        with _explained("read or write", self.path):
            if not self.path.exists():
                return
            text = read_text(self.path, LARGEST_JOURNAL, errors="replace")
            sections = re.split(f"^{_SECTION}", text, flags=re.MULTILINE)  # the lines of a text are quoted
            kept = [section for section in sections[1:] if _number(section) <= step]
            trimmed = "".join(_SECTION + section for section in kept)
            if trimmed != text:
                replace_text(self.path, trimmed)


_SECTION = "## Step "


def _number(section: str) -> float:
    heading, newline, _ = section.partition("\n")
    digits = heading.replace(",", "")
    return int(digits) if newline and digits.isdecimal() else float("inf")


@contextmanager
def _explained(what: str, path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says how to go on."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot {what} {path}: {error.strerror}",
            hint=f"{remedy(error) or 'check the disk'}, then `lfs train --resume {path.parent}`",
        ) from None


def _step_of(line: str) -> float:
    """Return the step of a record, or infinity for half a line that a killed run left."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def environment(device: str) -> dict[str, Any]:
    """Return what is needed to run the same again: command, git state, versions and hardware.

    Args:
        device: Name of the hardware that computes.
    """
    return {
        "command": sys.argv,
        "git": _git(),
        "device": device,
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "versions": {
            "lfs": lfs_cli.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "triton", "numpy", "numba")},
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Return the commit and the uncommitted changes of the checkout that lfs runs from, or None outside of one."""
    folder = Path(lfs_cli.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "diff": ask("diff", "HEAD", "--", "lfs_cli", "configs")}
    except (OSError, subprocess.SubprocessError):  # git is not installed, or hangs
        return None

"""What a run writes down about itself: metrics.jsonl line by line, and environment.json once."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lfs_cli
from lfs_cli.errors import CheckpointError
from lfs_cli.files import replace_text


class Journal:
    """Appends one JSON object a line to metrics.jsonl, each whole at once, so that the file is safe to tail.

    Args:
        path: The file. It is created when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. Raises CheckpointError when the disk is full or the folder cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}",
                hint=f"free some space, then `lfs train --resume {self.path.parent}`",
            ) from None

    def trim(self, step: int) -> None:
        """Drop every record after ``step``, so that a resumed run leaves neither gaps nor repeats."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        replace_text(self.path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    """Return the step of a record, or infinity for half a line that a killed run left."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


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

"""The process in which files are damaged and read: `python -m tests.reliability.worker SEED`, cases as JSON on stdin.

It answers each case with a line on stdout, and ends itself, with a traceback on stderr, when one takes too long.
"""

import faulthandler
import json
import logging
import os
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

from lfs_cli.errors import LfsError
from tests.reliability.formats import FORMATS, Format
from tests.reliability.mutations import mutated

SECONDS = 20
"""Longest time for one case, on a machine that is busy with other work."""

SPARE_BYTES = 1 << 30
"""Memory beyond what this process holds after it has read the valid files, none of which has more than 200 kB."""


class Desk:
    """One format at work: its valid files in a folder, and what a read of them gives.

    Args:
        format: The format.
        folder: An empty folder.
    """

    def __init__(self, format: Format, folder: Path) -> None:
        self.format = format
        self.folder = folder
        format.write(folder)
        self._files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.valid = format.read(folder)
        self._is_resealed = False
        self.restore()

    def restore(self) -> None:
        """Make every file what it was, and remove what reading has left."""
        for path in list(self.folder.rglob("*")):
            if path.is_file() and path not in self._files:
                path.unlink()
        for path, content in self._files.items():
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                status = path.stat() if path.exists() else None
                path.write_bytes(content)
                if status is not None:
                    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def damage(self, seed: int, case: int) -> None:
        """Change one of the files, in the same way for the same seed and case."""
        random = Random(f"{self.format.name} {seed} {case}")
        path = self.folder / random.choice(self.format.targets)
        path.write_bytes(mutated(self._files[path], self.format.kind, random))
        self._is_resealed = self.format.reseal is not None and case % 2 == 1
        if self.format.reseal is not None and self._is_resealed:
            self.format.reseal(self.folder)

    def outcome(self) -> str:
        """Read the files and return `loaded`, `refused`, or what went wrong."""
        try:
            found = self.format.read(self.folder)
        except LfsError as error:
            return "refused" if str(error) and (error.hint is None or error.hint) else "an error without a message"
        if self.format.is_checked and not self._is_resealed and found != self.valid:
            return "other content was loaded, in spite of the checksum"
        self.format.check(found, self.valid)
        return "loaded"


def work(todo: list[tuple[str, int]], seed: int) -> None:
    """Try the cases in ``todo``, (format, number), in order, and print a line for each."""
    with tempfile.TemporaryDirectory() as root:
        desks: dict[str, Desk] = {}
        for name in dict.fromkeys(name for name, _ in todo):
            (Path(root) / name).mkdir()
            desks[name] = Desk(FORMATS[name], Path(root) / name)
        _limit_memory()
        for name, case in todo:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            desks[name].damage(seed, case)
            print(json.dumps([name, case, _caught(desks[name])]), flush=True)
            desks[name].restore()
            faulthandler.cancel_dump_traceback_later()


def _caught(desk: Desk) -> str:
    try:
        return desk.outcome()
    except BaseException as error:  # whatever it is, it is what this is looking for
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "lfs_cli" in frame.filename] or where
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


def _limit_memory() -> None:
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(arguments: list[str], stdin: Any = None) -> None:
    """Read the cases and try them."""
    warnings.simplefilter("error")  # what warns of a file should have refused it
    logging.disable(logging.INFO)
    work([(name, case) for name, case in json.load(stdin or sys.stdin)], int(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])

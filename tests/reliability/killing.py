"""Real `lfs` processes that are killed at random moments, with `kill -9`: nothing of theirs runs after that.

A third of the kills come at a random time. The others come at a random step on the file system (a file is opened, made,
renamed or removed in the data folder): just before it, or some microseconds later, when a file may be open and empty.
The moments at which a write could be torn are so short that a clock alone would hardly ever hit them.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lfs_cli.errors import LfsError

_LAUNCHER = """
import atexit, os, signal, sys
last, delay, folder, count, *sys.argv = sys.argv[1:]
last, delay, steps = int(last), float(delay), 0
def step(event, arguments):
    global steps
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(arguments[0]).startswith(folder):
        steps += 1
        if steps == last and delay:
            signal.setitimer(signal.ITIMER_REAL, delay)  # nobody handles its signal, so that it kills like the other
        elif steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
from lfs_cli.corpus.shards import write_shards
write_shards.__kwdefaults__["shard_tokens"] = SHARD_TOKENS  # so that there are several shards
sys.addaudithook(step)
if count:
    atexit.register(lambda: os.write(os.open(count, os.O_CREAT | os.O_WRONLY), str(steps).encode()))
from lfs_cli.cli.app import main
main()
"""
SHARD_TOKENS = 4000
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Lfs:
    """One command, to be run as a process of its own as often as need be.

    Args:
        arguments: What comes after `lfs`.
        data: The data folder.
        environment: Variables to set.
    """

    arguments: Sequence[str]
    data: Path
    environment: Mapping[str, str]

    def finish(self) -> tuple[float, int]:
        """Run it undisturbed. Returns the seconds it took and its steps on the file system."""
        count = self.data.parent / "steps"
        count.unlink(missing_ok=True)
        began = time.perf_counter()
        process = self._start(count=count)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, errors
        return time.perf_counter() - began, int(count.read_text())

    def kill(self, chance: random.Random, seconds: float, steps: int) -> str | None:
        """Run it and kill it somewhere. Returns where, or None when it had ended before.

        Args:
            chance: Where chance comes from.
            seconds: How long it takes.
            steps: How many steps on the file system it has.
        """
        kind = chance.choice(["time", "step", "behind a step"])
        if kind == "time":
            after = chance.uniform(0, seconds)
            process = self._start()
            where = f"after {after:.2f} s"
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.kill()
        else:
            step = chance.randint(1, steps)
            delay = 10 ** chance.uniform(-5, -2.5) if kind == "behind a step" else 0
            process = self._start(step, delay)
            where = f"{delay * 1e6:.0f} us behind step {step} of {steps}" if delay else f"before step {step} of {steps}"
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode in (0, -signal.SIGKILL, -signal.SIGALRM), errors
        return where if process.returncode else None

    def _start(self, last: int = 0, delay: float = 0, count: Path | None = None) -> subprocess.Popen[str]:
        """Start it; it kills itself so many seconds behind the step ``last``, and writes their number to ``count``."""
        launcher = _LAUNCHER.replace("SHARD_TOKENS", str(SHARD_TOKENS))
        command = [sys.executable, "-c", launcher, str(last), str(delay), str(self.data), str(count or ""), "lfs"]
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [*command, *self.arguments],
            env={**os.environ, "PYTHONPATH": paths, "LFS_DATA": str(self.data), **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def run_command(what: str, run: Callable[[int, int, Path], int], arguments: Sequence[str], folder: Path) -> int:
    """Be the command of a module: read ``arguments``, kill as often as they say, report, return the exit code."""
    parser = argparse.ArgumentParser(description=f"Kill {what} at random moments and go on.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same moments")
    parser.add_argument("--short", action="store_true", help="3 kills")
    options = parser.parse_args(arguments)
    kills, began = 3 if options.short else options.kills, time.perf_counter()
    try:
        rounds = run(kills, options.seed, folder)
    except AssertionError as error:
        print(f"{what} did not survive: {error}")
        return 1
    print(
        f"{what}: {kills} of {kills} kills survived, {rounds} results identical to undisturbed ones, "
        f"in {time.perf_counter() - began:.0f} s"
    )
    return 0


@contextmanager
def blamed_on(context: str) -> Iterator[None]:
    """Name the kill, or the round, in which something was lost or cannot be read."""
    try:
        yield
    except (AssertionError, LfsError, ValueError) as error:
        raise AssertionError(f"{context}: {error}") from error


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder``, hidden ones too, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

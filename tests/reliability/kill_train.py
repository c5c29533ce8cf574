"""Kill a real training with SIGKILL at random moments, resume it, and require that nothing is lost and nothing differs.

    python -m tests.reliability kill_train --kills 100

A small model is trained by `python -m lfs_cli train` in processes of their own. Each life of the run is ended at a
moment drawn from a seed, in turn of three kinds: while the process starts and restores, while it trains, and in the
milliseconds around the writing of a checkpoint. After each kill every checkpoint that can be seen must be whole, and
none that was there may be lost. Each run that comes to its end is compared bit by bit with one that was left alone:
weights, optimizer states, losses, evaluations, samples. Then another run begins, until there were enough kills.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lfs_cli.model.checksums import verify_checksums
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.verify import compare_runs

NAME = "kill_train"
HELP = "kill a training at random moments, resume it, and compare the end bit by bit"

CONFIG = {
    "name": "kill",
    "data": {"dataset": "sample", "sample_bytes": 60_000},
    "model": {"vocab_size": 300, "context_length": 16, "width": 16, "layers": 1, "heads": 2},
    "optimizer": [
        {"match": "blocks.*.weight", "name": "muon", "lr": 0.01},
        {"match": "*", "name": "adamw", "lr": 0.01},
    ],
    "steps": 1200,
    "batch_size": 4,
    "eval_every": 60,
    "eval_batches": 2,
    "checkpoint_every": 20,
    "sample_prompt": "Once",
    "sample_tokens": 4,
    "device": "cpu",
}
MOMENTS = ("starting", "training", "saving")


@dataclass
class Tally:
    """What has been seen so far."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    broken: list[str] = field(default_factory=list)
    half_written: int = 0  # kills that left a checkpoint which was not complete: that they hit the writing


class Victim:
    """A run that is killed and resumed in a data folder of its own."""

    def __init__(self, root: Path, config: Path) -> None:
        self.data = DataFolder(root)
        self.config = config
        self.newest = -1  # step of the newest checkpoint that was seen to be whole

    @property
    def run(self) -> RunFolder | None:
        runs = self.data.all_runs()
        return runs[-1] if runs else None

    def start(self) -> subprocess.Popen[str]:
        """Start the run, or go on with it."""
        words = ["--resume", str(self.run.path)] if self.run else [str(self.config)]
        environment = {**os.environ, "LFS_DATA": str(self.data.root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lfs_cli", "train", *words, "--quiet"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    def forget(self) -> None:
        """Let the next start begin another run."""
        self.run.config.unlink()
        self.newest = -1

    def wait_until(self, moment: str, process: subprocess.Popen[str], chance: random.Random) -> None:
        """Return at a random instant of that kind, or when the process has ended."""
        if moment == "starting":
            _sleep(process, chance.uniform(0.0, 4.0))
            return
        lines, folder = self._lines(), self.run.checkpoints if self.run else None
        while process.poll() is None and self._lines() <= lines:
            time.sleep(0.005)
        if moment == "training":
            _sleep(process, chance.uniform(0.0, 0.5))
            return
        passed = chance.randrange(8)  # that many writings are let by
        end = time.monotonic() + 20
        was_writing = False
        while process.poll() is None and time.monotonic() < end:
            folder = folder or (self.run and self.run.checkpoints)
            is_writing = bool(folder and any(folder.glob(".*.tmp")))
            passed -= is_writing and not was_writing
            if is_writing and passed < 0:
                _sleep(process, chance.uniform(0.0, 0.03))
                return
            was_writing = is_writing
            time.sleep(0.0002)

    def check(self) -> list[str]:
        """Return what is broken in the run as it lies there: nothing, if its promises were kept."""
        if self.run is None:
            return []
        broken = []
        steps = self.run.checkpoint_steps()
        for step in steps:
            try:
                verify_checksums(self.run.checkpoint(step))
            except Exception as error:
                broken.append(f"a checkpoint that can be seen is not whole: {error}")
        newest = max(steps, default=-1)
        if newest < self.newest:
            broken.append(f"the checkpoint of step {self.newest} is lost, the newest is {newest}")
        self.newest = newest
        recorded = {record["step"] for record in _records(self.run) if record["kind"] == "step"}
        missing = set(range(1, newest + 1)) - recorded
        if missing:
            broken.append(f"steps that the checkpoint of step {newest} has are not in the journal: {sorted(missing)}")
        return broken

    def _lines(self) -> int:
        return len(self.run.metrics.read_bytes().splitlines()) if self.run and self.run.metrics.exists() else 0


def kill(kills: int, seed: int, folder: Path, tally: Tally) -> None:
    """Kill trainings ``kills`` times and fill ``tally``."""
    config = folder / "kill.json"
    config.write_text(json.dumps(CONFIG))
    alone = Victim(folder / "alone", config)
    _, stderr = (process := alone.start()).communicate()
    if process.returncode:
        raise SystemExit(f"the run that is left alone did not end well:\n{stderr}")
    victim = Victim(folder / "victim", config)
    chance = random.Random(seed)
    while sum(tally.kills.values()) < kills:
        moment = MOMENTS[sum(tally.kills.values()) % len(MOMENTS)]
        process = victim.start()
        victim.wait_until(moment, process, chance)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            tally.kills[moment] += 1
            if victim.run and moment != "starting":  # by then a start has cleared away what was left before
                tally.half_written += any(victim.run.checkpoints.glob(".step-*"))
        else:
            _finish(victim, alone, process, tally)
        tally.broken += victim.check()
        _show(tally, kills)
    process = victim.start()
    _finish(victim, alone, process, tally)


def _finish(victim: Victim, alone: Victim, process: subprocess.Popen[str], tally: Tally) -> None:
    """Compare a run that has come to its end with the one that was left alone."""
    _, stderr = process.communicate()
    if process.returncode:
        tally.broken.append(f"a resumed run ended with code {process.returncode}: {stderr}")
        return
    tally.runs += 1
    tally.broken += victim.check()
    for row in compare_runs(alone.run, victim.run):
        if row["different"]:
            tally.broken.append(f"{row['different']} of {row['compared']} {row['what']} differ, {row}")
    left = [path.name for path in victim.run.checkpoints.glob(".step-*")]
    if left:
        tally.broken.append(f"left behind: {left}")
    victim.forget()


def _records(run: RunFolder) -> list[dict]:
    records = []
    for line in run.metrics.read_text(errors="replace").splitlines() if run.metrics.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # half of the last line
            continue
    return records


def _sleep(process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(min(0.002, seconds))


def _show(tally: Tally, kills: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{sum(tally.kills.values())} of {kills} kills, {len(tally.broken)} broken", end="", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Run the harness with the words of a command line; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(NAME, description=HELP)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--short", action="store_true", help="three kills")
    options = parser.parse_args(arguments)
    tally, began = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lfs-kill-") as folder:
        kill(3 if options.short else options.kills, options.seed, Path(folder), tally)
    moments = ", ".join(f"{count} {moment}" for moment, count in tally.kills.items())
    print(
        f"kills survived: {sum(tally.kills.values())} ({moments}; {tally.half_written} left a half-written checkpoint)"
    )
    print(f"runs that came to their end, all bits compared: {tally.runs}, in {time.monotonic() - began:.0f} s")
    for broken in tally.broken:
        print(f"broken: {broken}")
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

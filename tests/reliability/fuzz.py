"""Fuzz: damage valid files of every format in thousands of seeded ways, and read each as lfs reads it.

A damaged file either loads, equal where the format has a checksum and as a valid object where it has none, or is
refused with an `LfsError`. Another exception, a wait, a crash, or memory beyond a bound is a broken promise. Cases run
in a worker (`worker.py`), which is started again behind a case that ended it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAME = "fuzz"
HELP = "damage files of every format in 2,000 ways each: each loads or is refused, in bounded time and memory"

CASES = 2_000
SHORT_CASES = 50
ROOT = Path(__file__).parents[2]


@dataclass
class Tally:
    """What became of the cases of one format: how many, and of those that broke the promise the number and why."""

    loaded: int = 0
    refused: int = 0
    broken: list[tuple[int, str]] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.loaded + self.refused + len(self.broken)

    def add(self, case: int, outcome: str) -> None:
        if outcome == "loaded":
            self.loaded += 1
        elif outcome == "refused":
            self.refused += 1
        else:
            self.broken.append((case, outcome))


def fuzz(names: Iterable[str], cases: Sequence[int], seed: int = 0) -> Iterator[tuple[str, Tally]]:
    """Try ``cases`` of each of the formats ``names`` in worker processes, and yield a tally for each format."""
    todo = [(name, case) for name in names for case in cases]
    tally = Tally()
    while todo:
        done = 0
        for name, case, outcome in _work(todo, seed):
            tally.add(case, outcome)
            done += 1
            if case == cases[-1]:
                yield name, tally
                tally = Tally()
        if done < len(todo):
            name, case = todo[done]
            tally.add(case, "the worker ended: a crash, or a wait without end; its traceback is above")
            if case == cases[-1]:
                yield name, tally
                tally = Tally()
        todo = todo[done + 1 :]


def _work(todo: Sequence[tuple[str, int]], seed: int) -> Iterator[tuple[str, int, str]]:
    """Yield the outcomes of ``todo`` in order, as far as one worker comes."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.reliability.worker", str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+") as request:
        json.dump(list(todo), request)
        request.seek(0)
        with subprocess.Popen(
            command, stdin=request, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                name, case, outcome = json.loads(line)
                yield name, case, outcome


def main(arguments: list[str]) -> int:
    """Try so many cases of each format, print what became of them and return 1 when a promise was broken."""
    from tests.reliability.formats import FORMATS

    parser = argparse.ArgumentParser(prog=f"python -m tests.reliability {NAME}", description=HELP)
    parser.add_argument("--cases", type=int, default=CASES, help="cases of each format")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_CASES} cases of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=FORMATS, help="only this one; may be repeated")
    parser.add_argument("--case", type=int, help="only the case of that number")
    options = parser.parse_args(arguments)
    count = SHORT_CASES if options.short else options.cases
    cases = range(count) if options.case is None else [options.case]
    print("format\ttried\tloaded\trefused\tbroken")
    total, causes = Tally(), Counter[str]()
    for name, tally in fuzz(options.format or FORMATS, cases, options.seed):
        print(name, tally.tried, tally.loaded, tally.refused, len(tally.broken), sep="\t", flush=True)
        total.loaded, total.refused = total.loaded + tally.loaded, total.refused + tally.refused
        total.broken += tally.broken
        for case, why in tally.broken:
            causes[why] += 1
            if causes[why] == 1:
                print(f"  broken by `--format '{name}' --seed {options.seed} --case {case}`: {why}", flush=True)
    print("all", total.tried, total.loaded, total.refused, len(total.broken), sep="\t")
    return 1 if total.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

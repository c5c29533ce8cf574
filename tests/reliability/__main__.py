"""`python -m tests.reliability`: the long tests of what lfs promises of faults, one command each, or all of them.

    python -m tests.reliability                  what there is
    python -m tests.reliability fuzz             one of them
    python -m tests.reliability all              each in turn; an hour
    python -m tests.reliability all --short      the same with few repetitions; minutes

A command is a module of this folder with `NAME`, `HELP` and `main(arguments) -> int`, zero when all promises were kept.
Each takes `--short` and shows its other options with `--help`.
"""

import ast
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """A module that can be run; known by its source, so that a list of them imports no torch."""

    name: str
    help: str
    module: str

    def run(self, arguments: Sequence[str]) -> int:
        return import_module(self.module).main(list(arguments))


def commands() -> dict[str, Command]:
    """Return the modules of this folder that define `NAME` and `HELP`, by name."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        texts = {
            target.id: node.value.value
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if {"NAME", "HELP"} <= texts.keys():
            found[texts["NAME"]] = Command(texts["NAME"], texts["HELP"], f"tests.reliability.{file.stem}")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit code: 0 when every promise was kept."""
    known = commands()
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name in known:
        return known[name].run(rest)
    if name == "all" and not set(rest) - {"--short"}:
        return _run_all(known, rest)
    for command in known.values():
        print(f"{command.name:<20}{command.help}")
    print(f"{'all':<20}all of these, one after the other; with --short a quick look")
    return 0 if name in ("", "-h", "--help") else 2


def _run_all(known: dict[str, Command], arguments: Sequence[str]) -> int:
    failed = []
    for command in known.values():
        print(f"== {command.name}: {command.help}", flush=True)
        began = time.perf_counter()
        if command.run(arguments):
            failed.append(command.name)
        print(f"== {command.name} took {time.perf_counter() - began:.0f} s\n", flush=True)
    print(f"broken promises in: {', '.join(failed)}" if failed else f"all {len(known)} kept their promises")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

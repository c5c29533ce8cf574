"""What a run left behind, read with care: a file that is missing or damaged costs a warning, never the report.

A run folder holds config.json and environment.json (one object each), metrics.jsonl (one object a line, of kind `step`
or `evaluation`, or `OTHER_KINDS`), samples.md, and result.json, the run's row of the experiment table, written when it
ends. A run without result.json is still running or was killed: its row then comes from its metrics, and its status says
so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lfs_cli.files import parse_json, read_text

Record = dict[str, Any]

LARGEST_JOURNAL = 1 << 28
"""Bytes of metrics or samples beyond which they are not read: those of a million steps."""

OTHER_KINDS = ("anomaly", "microbatch")
"""Kinds of records that a run keeps for itself, to go on by."""

UNFINISHED = "running or killed"
"""Status of a run that has not written a result."""


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it.

    Args:
        name: Name of the folder.
        config: The resolved config; empty when it cannot be read.
        environment: Command, versions, hardware; empty when it cannot be read.
        steps: Records of training steps, in order.
        evaluations: Records of evaluations, in order.
        result: The row that the run wrote at its end; None when it has not ended or was killed.
        samples: What the model wrote, as Markdown.
        started: When the config was written, such as ``2026-11-23 10:02``.
        problems: What could not be read, in words for the user.
    """

    name: str
    config: Record
    environment: Record
    steps: list[Record]
    evaluations: list[Record]
    result: Record | None
    samples: str
    started: str
    problems: tuple[str, ...] = ()

    def row(self) -> Record:
        """Return the run's row of the experiment table, taken from its metrics when it has no result."""
        if self.result is not None:
            return {**self.result, "run": self.name}
        finite = [record for record in self.evaluations if math.isfinite(record["loss"])]
        best = min(finite, key=lambda record: record["loss"], default={})
        last = self.steps[-1] if self.steps else {}
        tokens, seconds = number(last, "tokens"), number(last, "seconds")
        return {
            "timestamp": self.started,
            "experiment_name": self.setting("name") or self.setting("data.dataset") or self.name,
            "optimizer": self._optimizers(),
            "attention_type": self.setting("model.attention"),
            "best_val_loss": number(best, "loss"),
            "params_M": None,
            "tokens_M": None if tokens is None else tokens / 1e6,
            "val_bits_per_byte": number(best, "bits_per_byte"),
            "tokens_per_second": number(last, "tokens_per_second"),
            "minutes": None if seconds is None else seconds / 60,
            "device": self.environment.get("device"),
            "run": self.name,
            "status": UNFINISHED,
        }

    def setting(self, dotted: str) -> Any:
        """Return the setting of the config called ``dotted``, or None."""
        return flatten(self.config).get(dotted)

    def _optimizers(self) -> str | None:
        names = [value for name, value in flatten(self.config).items() if _is_optimizer_name(name)]
        return "+".join(dict.fromkeys(map(str, names))) or None


def _is_optimizer_name(dotted: str) -> bool:
    parts = dotted.split(".")
    return len(parts) == 3 and parts[0] == "optimizer" and parts[2] == "name"


def read_run(name: str, *, config: Path, environment: Path, metrics: Path, samples: Path, result: Path) -> Run:
    """Read one run. Nothing is raised for what is missing or damaged: see `Run.problems`.

    Args:
        name: Name of the run.
        config: Its config.json.
        environment: Its environment.json.
        metrics: Its metrics.jsonl.
        samples: Its samples.md.
        result: Its result.json.
    """
    problems: list[str] = []
    records = _read_lines(metrics, problems)
    ended = _read_object(result, problems) if result.exists() else None
    return Run(
        name=name,
        config=_read_object(config, problems),
        environment=_read_object(environment, problems),
        steps=[record for record in records if record["kind"] == "step"],
        evaluations=[record for record in records if record["kind"] == "evaluation"],
        result=ended or None,
        samples=_read_text(samples, problems) if samples.exists() else "",
        started=_written(config),
        problems=tuple(f"{name}: {problem}" for problem in problems),
    )


def flatten(tree: Any, prefix: str = "") -> Record:
    """Return the single values of nested objects and lists by their dotted names, such as ``optimizer.0.lr``."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, Mapping) for value in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix.removesuffix("."): tree}
    found: Record = {}
    for key, value in items:
        found.update(flatten(value, f"{prefix}{key}."))
    return found


def number(record: Mapping[str, Any], name: str) -> float | None:
    """Return the number that ``record`` has under ``name``, or None when there is none."""
    value = record.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return read_text(path, LARGEST_JOURNAL, errors="replace")
    except OSError as error:
        problems.append(f"cannot read {path.name}: {error.strerror}")
        return ""


def _read_object(path: Path, problems: list[str]) -> Record:
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return {}
    before = len(problems)
    text = _read_text(path, problems)
    try:
        tree = parse_json(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        if len(problems) == before:
            problems.append(f"{path.name} does not hold one JSON object")
        return {}
    return tree


def _read_lines(path: Path, problems: list[str]) -> list[Record]:
    """Return the records that can be used; a line that cannot is named once, with how many there are."""
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return []
    records, bad = [], []
    for line_number, line in enumerate(_read_text(path, problems).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if _is_record(record):
            records.append(record)
        elif not isinstance(record, dict) or record.get("kind") not in OTHER_KINDS:
            bad.append(line_number)
    if bad:
        others = f" and {len(bad) - 1} more are not records" if len(bad) > 1 else " is not a record"
        problems.append(f"{path.name}: line {bad[0]}{others}, skipped")
    return records


def _is_record(record: Any) -> bool:
    """Return whether ``record`` is an object with a kind, a step, and a loss that is a number, if not a finite one."""
    if not isinstance(record, dict) or record.get("kind") not in ("step", "evaluation"):
        return False
    step, loss = number(record, "step"), number(record, "loss")
    return step is not None and loss is not None and math.isfinite(step)


def _written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    except OSError:
        return ""

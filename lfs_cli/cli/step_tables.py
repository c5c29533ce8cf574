"""A profiled training step as tables for a person: its time by module and by kernel, its memory by phase."""

from collections.abc import Mapping, Sequence
from typing import Any

from lfs_cli.cli.columns import Column, field, lay_out

Row = Mapping[str, Any]

MOST_KERNELS = 20
"""Kernels that have a line; the others share the last one. Pipes and `--json` get all."""

LONGEST_NAME = 44
"""Characters of a kernel's name that are shown: those of templates have hundreds."""

PHASES = ("forward", "backward", "optimizer")

_MIB = 1 / 2**20
_MEMORY = (
    Column("phase", field("phase")),
    Column("fullest at ms", field("ms"), rank=1),
    Column("weights", field("weights_bytes", _MIB), rank=5),
    Column("optimizer state", field("state_bytes", _MIB), rank=4),
    Column("gradients", field("gradients_bytes", _MIB)),
    Column("activations", field("activations_bytes", _MIB)),
    Column("other", field("other_bytes", _MIB)),
    Column("MiB", field("total_bytes", _MIB)),
)


def step_tables(tables: Mapping[str, Sequence[Row]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return titles and rows of what is to be shown of the tables `kernels` and `memory`, step by step."""
    shown = []
    for step, rows in _by_step(tables.get("kernels", ())).items():
        shown.append((f"time by module, {step}", module_table(rows)))
        shown.append((f"time by kernel, {step}", kernel_table(rows)))
    for step, rows in _by_step(tables.get("memory", ())).items():
        shown.append((f"memory when each phase has most, {step}", lay_out(memory_table(rows), _MEMORY)[0]))
    return shown


def module_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return milliseconds of each module in each phase, and its share of the step; the largest first."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        phases = sums.setdefault(row["module"], {})
        phases[row["phase"]] = phases.get(row["phase"], 0.0) + row["total_ms"]
    total = sum(sum(phases.values()) for phases in sums.values())
    ordered = sorted(sums.items(), key=lambda item: -sum(item[1].values()))
    return [
        {
            "module": module,
            **{f"{phase} ms": phases.get(phase) for phase in PHASES},
            "%": round(100 * sum(phases.values()) / total, 1),
        }
        for module, phases in ordered
    ]


def kernel_table(rows: Sequence[Row], most: int = MOST_KERNELS) -> list[dict[str, Any]]:
    """Return the rows with the most time and one for all others, so that the shares add up to 100."""
    ordered = sorted(rows, key=lambda row: -row["total_ms"])
    rest = ordered[most:]
    shown = [
        {
            "module": row["module"],
            "phase": row["phase"],
            "kernel": _short(row["kernel"]),
            "calls": row["calls"],
            "ms": row["total_ms"],
            "%": round(100 * row["share"], 1),
        }
        for row in ordered[:most]
    ]
    if rest:
        ms, share = sum(row["total_ms"] for row in rest), sum(row["share"] for row in rest)
        name, calls = f"({len(rest):,} others)", sum(row["calls"] for row in rest)
        shown.append({"module": name, "phase": "", "kernel": "", "calls": calls, "ms": ms, "%": round(100 * share, 1)})
    return shown


def memory_table(rows: Sequence[Row]) -> list[Row]:
    """Return the row of each phase in which most was in memory."""
    fullest: dict[str, Row] = {}
    for row in rows:
        if row["phase"] not in fullest or row["total_bytes"] > fullest[row["phase"]]["total_bytes"]:
            fullest[row["phase"]] = row
    return list(fullest.values())


def _by_step(rows: Sequence[Row]) -> dict[str, list[Row]]:
    steps: dict[str, list[Row]] = {}
    for row in rows:
        steps.setdefault(f"{row['size']}, T {row['seq']:,}, B {row['batch']:,}, {row['dtype']}", []).append(row)
    return steps


def _short(name: str) -> str:
    name = name.removeprefix("void ")
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"

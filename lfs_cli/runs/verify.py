"""`lfs train --verify-resume`: proof that a run which was stopped and resumed ends bit for bit like one that was not.

A short run of the config is trained twice from its seed: once without a stop, and once with two, the first of them
where an evaluation is due, the second where none is. At each stop everything is torn down, the random generators are
set to other states, and what goes on is loaded from disk, by the code that any resumed run uses. Then all that the two
runs have written is compared.

On a GPU no two runs are equal unless sums have a fixed order, so the runs are trained with `deterministic`.
"""

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfs_cli.config import TrainConfig
from lfs_cli.errors import CheckpointError
from lfs_cli.model import load_weights
from lfs_cli.model.device import choose_device
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.microbatch import with_microbatch
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.stop import Stop
from lfs_cli.runs.train import train_run
from lfs_cli.training.randomness import seed_everything

TIMES = {
    "seconds",
    "warm_steps",
    "warm_seconds",
    "cold_steps",
    "cold_seconds",
    "recent",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
}
"""What records say of the clock and the machine, which is not the same twice."""


def verify_resume(
    config: TrainConfig, *, data: DataFolder | None = None, observer: Observer | None = None
) -> tuple[list[dict[str, Any]], CheckpointError | None]:
    """Train a short run of ``config`` with and without stops and compare them bit by bit.

    Args:
        config: The experiment. Its `verify_steps` are trained, with evaluations and sums in a fixed order, and none of
            it is kept.
        data: Data folder; by default the one of this process.
        observer: Is told what is prepared.

    Returns:
        Rows that say what was compared (`what`, `compared`, `different`, `first difference`), and an error when
        something differs, else None.

    Raises:
        LfsError: As `train` does.
    """
    data, observer = data or DataFolder.here(), observer or Observer()
    steps = config.verify_steps
    first, second = steps // 3, 2 * steps // 3 + 1
    if choose_device(config.device).type == "cuda" and not config.deterministic:
        observer.stage("with `deterministic=true`: without, a GPU sums in no fixed order")
    config = with_microbatch(config).model_copy(
        update={
            "steps": steps,
            "max_time": None,
            "max_epochs": None,
            "eval_every": first,
            "checkpoint_every": steps,
            "deterministic": True,
        }
    )
    with tempfile.TemporaryDirectory(prefix="lfs-verify-") as folder:
        observer.stage(f"{steps} steps without a stop")
        whole = _train(config, Path(folder, "whole"), data, observer)
        observer.stage(f"the same with stops after steps {first} and {second}")
        parts = _train(config, Path(folder, "parts"), data, observer, first)
        parts = _train(config, Path(folder, "parts"), data, observer, second, parts)
        parts = _train(config, Path(folder, "parts"), data, observer, 0, parts)
        rows = compare_runs(whole, parts)
        different = [row for row in rows if row["different"]]
        if not different:
            return rows, None
        observer.stage("they differ: the same once more without a stop, to see whether it repeats itself")
        again = compare_runs(whole, _train(config, Path(folder, "again"), data, observer))
    found = different[0]
    if any(row["different"] for row in again):
        problem = f"this training does not repeat itself, stopped or not: {found['what']} differ"
        hint = "choose another device or attention backend: one of its parts sums in no fixed order"
    else:
        problem = f"a resumed run ends otherwise: {found['what']} differ, first `{found['first difference']}`"
        hint = "look for a part that keeps something beside its state, such as an optimizer or a plugin"
    return rows, CheckpointError(problem, hint=hint)


def compare_runs(one: RunFolder, other: RunFolder) -> list[dict[str, Any]]:
    """Return one row for each kind of thing that two runs have written, the clock and the machine left out.

    Returns:
        Rows with `what`, the numbers or texts `compared`, how many are `different` and the name of the first.
    """
    folders = [run.checkpoint(run.checkpoint_steps()[-1]) for run in (one, other)]
    weights = [load_weights(folder / "model.safetensors") for folder in folders]
    tensors = [load_weights(folder / "state.safetensors") for folder in folders]
    states = [json.loads((folder / "state.json").read_text(encoding="utf-8")) for folder in folders]
    records = [
        [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()] for run in (one, other)
    ]
    samples = [run.samples.read_text(encoding="utf-8") if run.samples.exists() else "" for run in (one, other)]
    return [
        _row("weights", *weights),
        _row("states of optimizers and random generators", *tensors),
        _row("settings of optimizers and progress", *(dict(_leaves(state)) for state in states)),
        *(
            _row(name, *(dict(_leaves([r for r in lines if r["kind"] == kind])) for lines in records))
            for kind, name in (("step", "losses, norms and rates of each step"), ("evaluation", "evaluations"))
        ),
        _row("samples", *(dict(enumerate(text.splitlines(), start=1)) for text in samples)),
    ]


class _StopAfter(Observer):
    """Asks a run to stop after a step, as a signal would, and passes on only its warnings."""

    def __init__(self, step: int, stop: Stop, observer: Observer) -> None:
        self._step, self._stop = step, stop
        self.warning = observer.warning

    def step(self, record: Any) -> None:
        if record.step == self._step:
            self._stop.number = signal.SIGTERM


def _train(
    config: TrainConfig,
    runs: Path,
    data: DataFolder,
    observer: Observer,
    stop_after: int = 0,
    resume: RunFolder | None = None,
) -> RunFolder:
    """Train until the end, or until a step, in a process whose random generators are anywhere."""
    seed_everything(config.seed + 1)
    stop = Stop()
    watcher = _StopAfter(stop_after, stop, observer)
    result, _ = train_run(config, runs, data=data, observer=watcher, resume=resume, stop=stop)
    return RunFolder(result.directory)


def _row(what: str, one: dict[Any, Any], other: dict[Any, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys([*one, *other]))
    different = [name for name in names if not _is_same(one.get(name), other.get(name))]
    numbers = sum(value.numel() if isinstance(value, Tensor) else 1 for value in one.values())
    first = str(different[0]) if different else None
    return {"what": what, "compared": numbers, "different": len(different), "first difference": first}


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit: -0.0 is not 0.0, and NaN is itself."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))
    return repr(one) == repr(other)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of what is in nested dicts and lists, but for what tells of the clock."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield name, tree
        return
    for key, value in items:
        if key not in TIMES:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))

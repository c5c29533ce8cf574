"""Which settings of a run may change when it goes on, and what that does to it. Imports no torch."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from lfs_cli.config import TrainConfig, load_config
from lfs_cli.errors import ConfigError
from lfs_cli.runs.folder import RunFolder


class Change(Enum):
    """What it does to a run that goes on when a setting is not the one it began with."""

    REFUSED = "cannot change when a run goes on"
    FELT = "the weights will not be those of the run as it began"
    HARMLESS = "the weights do not depend on it"


CHANGES = {
    "name": Change.HARMLESS,
    "data": Change.REFUSED,
    "data.tokenizer": Change.HARMLESS,  # whether it is the one of the checkpoint is told by its hash
    "model": Change.REFUSED,
    "model.attention": Change.FELT,  # another backend rounds in another order
    "model.checkpointing": Change.HARMLESS,
    "model.residual_dtype": Change.FELT,  # as does another type
    "model.z_loss": Change.FELT,  # a part of the loss, not of the model
    "optimizer": Change.REFUSED,
    "optimizer.lr": Change.FELT,
    "optimizer.options": Change.FELT,
    "schedule": Change.FELT,
    "steps": Change.FELT,
    "max_time": Change.FELT,
    "max_epochs": Change.FELT,
    "batch_size": Change.REFUSED,
    "microbatch": Change.FELT,
    "clip": Change.FELT,
    "seed": Change.REFUSED,
    "device": Change.FELT,
    "dtype": Change.FELT,
    "compile": Change.FELT,
    "cuda_graphs": Change.HARMLESS,  # the same kernels in the same order
    "deterministic": Change.FELT,
    "eval_every": Change.HARMLESS,
    "eval_batches": Change.HARMLESS,
    "checkpoint_every": Change.HARMLESS,
    "keep_checkpoints": Change.HARMLESS,
    "log_every": Change.HARMLESS,
    "sample_prompt": Change.HARMLESS,
    "sample_tokens": Change.HARMLESS,
    "sampling": Change.HARMLESS,
    "anomaly": Change.FELT,
    "verify_steps": Change.HARMLESS,
    "plugins": Change.FELT,
}
"""What each setting does, by its dotted name without the numbers of list entries, or by the nearest name above it."""


def resumed_config(
    run: RunFolder, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, list[str]]:
    """Return the config with which ``run`` goes on: its own, with changes, and a note on each of them.

    Args:
        run: The run.
        overrides: Items such as `steps=2000`.
        options: Dotted names with values, None for those that are not given.

    Raises:
        ConfigError: When a change would break the run: the model, the data, the optimizers or what the batches are; or
            when the run names plugins that ``overrides`` do not.
    """
    said = load_config(TrainConfig, run.config).data.model_fields_set
    older = {} if "order" in said else {"data.order": "random"}  # the only one there was when such a run began
    before = load_config(TrainConfig, run.config, options=older)
    after = load_config(TrainConfig, run.config, overrides, {**older, **(options or {})})
    _refuse_plugins(run, after.plugins, overrides)
    old, new = (dict(_leaves(config.model_dump(mode="json"))) for config in (before, after))
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    for name in changed:
        if change_of(name) is Change.REFUSED:
            raise ConfigError(
                f"`{name}` {Change.REFUSED.value}: it was `{_shown(old.get(name))}`",
                hint="leave it out, or start a new run without `--resume`",
            )
    notes = [
        f"`{name}` is `{_shown(new.get(name))}` from here on, and was `{_shown(old.get(name))}`: "
        f"{change_of(name).value}"
        for name in changed
    ]
    return after, notes


def _refuse_plugins(run: RunFolder, named: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise ConfigError when the config of ``run`` names modules: to import is to run, and it may be a stranger's."""
    said = [override for override in overrides if override.partition("=")[0].partition(".")[0] == "plugins"]
    unsaid = [module for module in named if module not in load_config(TrainConfig, None, said).plugins] if named else []
    if unsaid:
        plugins = shlex.quote(f"plugins={json.dumps(list(named))}")
        raise ConfigError(
            f"the run asks to import the module `{unsaid[0]}`, which would run its code",
            hint=f"if you trust it, say so: `lfs train --resume {shlex.quote(str(run.path))} --set {plugins}`",
        )


def change_of(name: str) -> Change:
    """Return what a change of the setting with the dotted ``name`` does, such as that of `optimizer.0.lr`."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    for length in range(len(parts), 0, -1):
        if (above := ".".join(parts[:length])) in CHANGES:
            return CHANGES[above]
    raise KeyError(name)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of everything in nested dicts and lists that is neither, or empty."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))
    if not items:
        yield name, tree


def _shown(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value))

"""Which optimizer moves which weight: patterns of parameter names, in order, first match wins.

    [{"match": ["blocks.*.weight", "!*norm*"], "name": "muon", "lr": 0.02, "options": {"weight_decay": 0.1}},
     {"match": "*",                            "name": "adamw", "lr": 3e-4, "options": {"betas": [0.9, 0.95]}}]

Patterns are those of file names: `*` stands for any text, dots included, and `?` for one character. A list takes what
any of its patterns matches, but nothing that one behind a `!` does; with such alone, it takes everything else.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import Any, Protocol

from torch import nn

from lfs_cli.errors import ConfigError
from lfs_cli.optimizers.base import OPTIMIZERS, Optimizer


class GroupSettings(Protocol):
    """What a group says, as `lfs_cli.config.OptimizerGroup` does."""

    @property
    def match(self) -> str | tuple[str, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


def build_optimizers(model: nn.Module, groups: Sequence[GroupSettings]) -> list[Optimizer]:
    """Return one optimizer for each group; together they move every trainable weight of ``model`` exactly once.

    Their only parameter group keeps `peak_lr`, which a schedule's factor multiplies, and `param_names`.

    Args:
        model: Whose weights are moved. A weight that is used twice counts once, under its first name.
        groups: Patterns and settings, in order.

    Raises:
        ConfigError: When a group takes no weight, a weight is in no group, or an option does not fit its optimizer.
    """
    remaining = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    names = list(remaining)
    optimizers = []
    for index, group in enumerate(groups):
        taken = {name: remaining.pop(name) for name in list(remaining) if matches(name, group.match)}
        if not taken:
            if any(matches(name, group.match) for name in names):
                problem, hint = "matches only weights of earlier groups", "move it up, or remove it"
            else:
                problem, hint = "matches no weight", f"match names such as `{names[0]}`" if names else "remove it"
            written = group.match if isinstance(group.match, str) else json.dumps(group.match)
            raise ConfigError(f"`optimizer.{index}.match` (`{written}`) {problem}", hint=hint)
        _check_kinds(group, f"optimizer.{index}.options")
        try:
            optimizer = OPTIMIZERS.create(group.name, list(taken.items()), lr=group.lr, **group.options)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"optimizer `{group.name}` cannot use its settings: {error}", hint=f"change `optimizer.{index}.options`"
            ) from None
        for parameters in optimizer.param_groups:
            parameters["peak_lr"] = group.lr
        optimizers.append(optimizer)
    if remaining:
        shown = ", ".join(f"`{name}`" for name in list(remaining)[:3]) + (", ..." if len(remaining) > 3 else "")
        raise ConfigError(
            f"no optimizer group matches {shown}", hint='end the list with a group that has `"match": "*"`'
        )
    return optimizers


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Return whether a group with these patterns takes the weight ``name`` when no earlier group does.

    >>> [matches("blocks.0.attention_norm.weight", match) for match in ("blocks.*", ["blocks.*", "!*norm*"])]
    [True, False]
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    if unwanted and not wanted:
        wanted = ["*"]
    return any(fnmatchcase(name, pattern) for pattern in wanted) and not any(
        fnmatchcase(name, pattern) for pattern in unwanted
    )


def _check_kinds(group: GroupSettings, where: str) -> None:
    """Raise ConfigError for an option that is of another kind than its default: `"yes"` is not true."""
    parameters = signature(OPTIMIZERS.get(group.name)).parameters
    for option, value in group.options.items():
        default = parameters[option].default if option in parameters else Parameter.empty
        for kind, kinds in _KINDS.items():
            if type(default) in kinds and type(value) not in kinds:
                raise ConfigError(
                    f"`{where}.{option}` must be {kind}, not `{json.dumps(value)}`",
                    hint=f"the default is `{json.dumps(default)}`",
                )


_KINDS = {"true or false": (bool,), "a number": (int, float), "a list of numbers": (list, tuple), "a text": (str,)}

"""Registries: a name in a config stands for a class or a function.

Adding a part to lfs is one new file in its room with one decorator:

    @OPTIMIZERS.register("lion")
    class Lion(Optimizer): ...

`Registry` imports the modules of its room when a name is first looked up. `catalogue` finds the same names by reading
the sources, so that a misspelled name in a config is answered before torch is imported; what a script or a plugin has
registered is added to them.
"""

import ast
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from lfs_cli.errors import ConfigError, did_you_mean

T = TypeVar("T")

_WITHOUT_NAME = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


class Registry(Generic[T]):
    """A table from name to class or function, filled by the modules of one package.

    Args:
        kind: Singular noun for error messages, such as ``"optimizer"``.
        room: Dotted package whose modules register entries, such as ``"lfs_cli.optimizers"``.
    """

    def __init__(self, kind: str, room: str) -> None:
        self.kind = kind
        self.room = room
        self._entries: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[Any], Any]:
        """Return a decorator that files its target under ``name``."""

        def file(target: Any) -> Any:
            taken = self._entries.get(name)
            if taken is not None:
                raise ValueError(f"{self.kind} `{name}` is already registered by {taken.__module__}")
            self._entries[name] = target
            return target

        return file

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Return the entry called ``name``. Raises ConfigError that suggests the nearest name."""
        self._discover()
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} `{name}`", hint=did_you_mean(name, self._entries))
        return self._entries[name]

    def create(self, name: str, *args: Any, **options: Any) -> Any:
        """Call the entry called ``name``, first checking that it accepts every option."""
        target: Any = self.get(name)
        accepted = list(inspect.signature(target).parameters)
        check_options(self.kind, name, options, accepted[len(args) :])
        return target(*args, **options)

    def options_from_elsewhere(self) -> dict[str, tuple[str, ...]]:
        """Return the entries that are not of the room, such as those of a script, with their parameters."""
        entries: dict[str, Any] = self._entries
        foreign = {
            name: inspect.signature(target).parameters.values()
            for name, target in entries.items()
            if not f"{target.__module__}.".startswith(f"{self.room}.")
        }
        return {
            name: tuple(parameter.name for parameter in parameters if parameter.kind not in _WITHOUT_NAME)
            for name, parameters in foreign.items()
        }

    def _discover(self) -> None:
        if not self._discovered:
            self._discovered = True
            for module in pkgutil.iter_modules(import_module(self.room).__path__):
                import_module(f"{self.room}.{module.name}")


def check_options(kind: str, name: str, options: Iterable[str], accepted: Iterable[str]) -> None:
    """Raise ConfigError for the first of ``options`` that the entry called ``name`` does not accept."""
    accepted = list(accepted)
    for option in options:
        if option not in accepted:
            raise ConfigError(f"{kind} `{name}` has no option `{option}`", hint=did_you_mean(option, accepted))


def catalogue(room: str, table: str) -> dict[str, tuple[str, ...]]:
    """Return what ``table`` has: found by reading the sources of ``room``, and registered in this process elsewhere.

    Nothing is imported but the packages above ``room``, whose `__init__` must be light.

    Args:
        room: Dotted package or module, such as ``"lfs_cli.optimizers"``.
        table: Name of the registry in the sources, such as ``"OPTIMIZERS"``.

    Returns:
        Each registered name with the parameters of the class or function it stands for, in order: for one of the room
        the keyword-only ones.
    """
    registry = getattr(sys.modules.get(room), table, None)  # not there: the room is not imported, nor added to
    return _written(room, table) | (registry.options_from_elsewhere() if registry is not None else {})


@cache
def _written(room: str, table: str) -> dict[str, tuple[str, ...]]:
    """Return what the modules of ``room`` register in ``table``, found by reading their sources."""
    found: dict[str, tuple[str, ...]] = {}
    for path in _sources(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.update({name: _keywords(node) for name in _registered(node, table)})
    return found


def _sources(room: str) -> list[Path]:
    spec = find_spec(room)
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [path for folder in spec.submodule_search_locations for path in sorted(Path(folder).glob("*.py"))]
    return [Path(spec.origin)] if spec.origin else []


def _registered(node: ast.ClassDef | ast.FunctionDef, table: str) -> list[str]:
    """Return the names under which the decorators of ``node`` file it in ``table``."""
    names = []
    for call in node.decorator_list:
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr="register"),
                args=[ast.Constant(value=str(name))],
            ) if owner == table:
                names.append(name)
            case _:
                pass
    return names


def _keywords(node: ast.ClassDef | ast.FunctionDef) -> tuple[str, ...]:
    if isinstance(node, ast.FunctionDef):
        return tuple(argument.arg for argument in node.args.kwonlyargs)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _keywords(item)
    return ()

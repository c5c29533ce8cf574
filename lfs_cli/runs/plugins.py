"""Plugins: modules of the user's that register parts of their own. Importing them, and telling where one fails."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType

from lfs_cli.errors import ConfigError

_PLUGINS: dict[str, list[Path]] = {}
"""The plugins that this process has imported, each with its file or the folders of its package."""


@dataclass(frozen=True)
class Failure:
    """Where code of a plugin failed.

    Args:
        plugin: Its name.
        path: The file.
        line: The line of it.
        traceback: From the first frame in the plugin on.
    """

    plugin: str
    path: Path
    line: int
    traceback: TracebackType


def import_plugins(modules: Sequence[str]) -> None:
    """Import modules of the user's, which may register parts of their own. Raises ConfigError for one that fails.

    They are found in the current folder too, where the `lfs` command, unlike `python -m`, does not look by itself.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.append(here)
    for name in modules:
        try:
            import_module(name)
        except (Exception, SystemExit) as error:
            raise _explain_import(name, error) from error
        top = sys.modules[name.partition(".")[0]]
        places = getattr(top, "__path__", [getattr(top, "__file__", None)])
        _PLUGINS[name] = [Path(place).resolve() for place in places if place]


def imported_plugins() -> list[str]:
    """Return the names of the plugins that this process has imported."""
    return list(_PLUGINS)


def find_plugin_failure(error: BaseException) -> Failure | None:
    """Return where a plugin raised ``error``; None when it was lfs.

    Of both, the one whose code is nearest to where it was raised did: what a plugin calls elsewhere, as in torch, is
    its own doing.
    """
    for traceback in reversed(list(_frames(error))):
        path = _file_of(traceback)
        if path.is_relative_to(Path(__file__).resolve().parents[1]):
            return None
        for name, places in _PLUGINS.items():
            if _is_in(traceback, places):
                first = next(frame for frame in _frames(error) if _is_in(frame, places))
                return Failure(name, path, traceback.tb_lineno, first)
    return None


def _explain_import(name: str, error: BaseException) -> ConfigError:
    """Return what kept the plugin ``name`` from being imported, where it did, and what to do."""
    kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
    inside = [frame for frame in _frames(error) if not _is_machinery(_file_of(frame))]
    places = [frame for frame in inside if _file_of(frame) == _file_of(inside[0])]
    where = f" ({_file_of(places[-1])}, line {places[-1].tb_lineno})" if places else ""
    message = f"plugin `{name}` cannot be imported: {kind}{error}{where}"
    if isinstance(error, ModuleNotFoundError) and places:
        return ConfigError(message, hint=f"install what has `{error.name}`, or leave its import out")
    if places or isinstance(error, SyntaxError):
        return ConfigError(message, hint=f"see where with `python -m {name}`")
    if name.endswith(".py") and not Path(name).is_absolute():
        parts = Path(name.removesuffix(".py")).parts
        return ConfigError(message, hint=f"name the module and not its file: `{'.'.join(parts)}`")
    return ConfigError(message, hint="name a module of the current folder or of the Python path")


def _frames(error: BaseException) -> Iterator[TracebackType]:
    """Yield what the traceback of ``error`` goes through, from the outermost frame to where it was raised."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _file_of(traceback: TracebackType) -> Path:
    return Path(traceback.tb_frame.f_code.co_filename).resolve()


def _is_in(traceback: TracebackType, places: Sequence[Path]) -> bool:
    return any(_file_of(traceback).is_relative_to(place) for place in places)


def _is_machinery(path: Path) -> bool:
    """Whether ``path`` is this file or a part of Python's own import."""
    return path == Path(__file__).resolve() or path.parent.name == "importlib" or path.name.startswith("<frozen ")

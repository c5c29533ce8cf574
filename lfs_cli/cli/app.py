"""The Typer app: six commands, and one way for all of them to fail.

An `LfsError` becomes an `error:` line and a `hint:` line and the error's exit code. A slip on the command line becomes
the same two lines and exit code 2. What a plugin raises is the plugin's, and its part of the traceback is shown, too.
Anything else is a bug in lfs: its traceback stays, with a line that says so.
"""

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lfs_cli import __version__
from lfs_cli.cli import bench, download, generate, report, tokenize, train
from lfs_cli.cli.console import printable
from lfs_cli.errors import LfsError, did_you_mean, remedy

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries click inside itself since 0.20 and exports only this

_GO_ON = {
    "download": "run the same command again: what is complete is kept",
    "tokenize": "run the same command again: what is complete is kept",
    "train": "run the same command again, or go on with a run that `lfs report` lists: `lfs train --resume RUN`",
}
"""How to go on after Ctrl-C or a SIGTERM. The other commands leave nothing behind."""


class Commands(TyperGroup):
    """The group of commands, which turns errors into two lines and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run the command line ``args`` and leave the process with its exit code."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        options["standalone_mode"] = False
        try:
            with _sigterm_raises():
                code = super().main(list(args), *rest, **options)
            sys.stdout.flush()  # now, so that a reader who has left and a full disk are noticed
        except _UsageError as error:
            code = _fail(*_explain(error, self, args), 2)
        except LfsError as error:
            code = _fail(str(error), error.hint, error.exit_code)
        except (KeyboardInterrupt, typer.Abort) as error:
            is_terminated = any(isinstance(one, _Terminated) for one in (error, error.__cause__))
            what, number = ("terminated", signal.SIGTERM) if is_terminated else ("interrupted", signal.SIGINT)
            code = _fail(what, _GO_ON.get(args[0]), 128 + number)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            _forsake_stdout()
            code = 1
        except Exception as error:
            code = _explain_system(error) or _blame(error)
            if code is None:
                raise
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and let Ctrl-C through to `main`, past Typer, which would leave without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise typer.Abort from interrupt


class _Terminated(KeyboardInterrupt):
    """SIGTERM: to be treated like Ctrl-C, save for the exit code."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the command in good order. Training has its own way, and takes over while it runs."""
    if threading.current_thread() is not threading.main_thread():  # only that one may ask for signals
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fail(message: str, hint: str | None, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"\nhint: {printable(hint)}", file=sys.stderr)
    return code


def _explain_system(error: Exception) -> int | None:
    """Tell of an error of the system that the user can mend. Returns the exit code; None for another error."""
    if not isinstance(error, OSError) or (hint := remedy(error)) is None:
        return None
    if error.filename is None:
        _forsake_stdout()
    where = f"cannot use {error.filename}" if error.filename else "cannot write"
    return _fail(f"{where}: {error.strerror}", hint, 1)


def _blame(error: Exception) -> int | None:
    """Tell of what a plugin raised, with its part of the traceback; anything else is a bug in lfs.

    Returns:
        The exit code; None when ``error`` is to be raised again.
    """
    from lfs_cli.runs.plugins import find_plugin_failure, imported_plugins

    failure = find_plugin_failure(error)
    if failure is None:
        plugins = "".join(f", or in the plugin `{name}`" for name in imported_plugins())
        print(f"error: this is a bug in lfs{plugins}; the traceback below tells where\n", file=sys.stderr)
        return None
    what = "".join(traceback.format_exception_only(error)).strip()
    message = f"the plugin `{failure.plugin}` failed in {failure.path}, line {failure.line}: {what}"
    code = _fail(message, "mend it there; the traceback below tells what led to it", 1)
    trace = "".join(traceback.format_exception(type(error), error, failure.traceback))
    print(f"\n{printable(trace)}", file=sys.stderr, end="")
    return code


def _forsake_stdout() -> None:
    """Send what is still to be written nowhere, so that Python does not complain of it at its end."""
    with suppress(OSError):  # a stdout that is no file cannot fail like one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Any, group: Any, args: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong with the command line and what to do about it, in our words and not in click's."""
    name = next((arg for arg in args if arg in group.commands), None)
    command = group.commands[name] if name else group
    here = f"lfs {name}" if name else "lfs"
    option, text = getattr(error, "option_name", ""), error.message
    if type(error).__name__ == "NoSuchOption":
        return f"unknown option `{option}`", _unknown_option_hint(option, group, command, name, args)
    if option and "not take a value" in text:
        return f"`{option}` takes no value", f"write `{option}` alone"
    if option:
        metavar = next((param.metavar for param in command.params if option in param.opts), None)
        return f"`{option}` needs a value", f"write `{option} {metavar or 'VALUE'}`; see `{here} --help`"
    if match := re.match(r"No such command '(.*?)'\.?", text):
        return f"unknown command `{match[1]}`", did_you_mean(match[1], group.commands)
    if match := re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", text, re.DOTALL):
        prompt = f"write `lfs generate --prompt {shlex.quote(match[1])}`"
        hint = prompt if name == "generate" else "quote what has spaces"
        return f"`{match[1]}` is more than `{here}` takes", f"{hint}; see `{here} --help`"
    if text.startswith("Missing command"):
        return "no command is named", f"choose one of: {', '.join(sorted(group.commands))}"
    message = error.format_message().rstrip(".").replace("'", "`")
    return message[:1].lower() + message[1:], f"see `{here} --help`"


def _unknown_option_hint(option: str, group: Any, command: Any, name: str | None, args: Sequence[str]) -> str:
    if command is group or args.index(str(name)) > _place(option, args):
        owner = next((key for key, other in group.commands.items() if option in _options(other)), None)
        if owner is not None:
            return f"write it behind the command: `lfs {name or owner} {option}`"
        return did_you_mean(option, [*_options(group), "--help"])
    settings = _settings(command.name, option)
    near = did_you_mean(option, _options(command))
    if settings and not (near.startswith("did you mean") and settings[0].rpartition(".")[2] != _plain(option)):
        return f"did you mean `--set {settings[0]}={_value(option, args)}`?"
    return near


def _options(command: Any) -> list[str]:
    return [name for param in command.params for name in param.opts if name.startswith("--")]


def _settings(command: str, option: str) -> list[str]:
    """Return the settings of ``command`` that are called like ``option``: `--steps` is no option, `steps` a setting."""
    from lfs_cli import config
    from lfs_cli.config.loader import settings_named

    return settings_named(getattr(config, f"{command.title()}Config"), _plain(option))


def _plain(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _place(option: str, args: Sequence[str]) -> int:
    return next((index for index, arg in enumerate(args) if arg.split("=")[0] == option), len(args))


def _value(option: str, args: Sequence[str]) -> str:
    """Return what the user gave ``option``, to be pasted behind `--set`."""
    place = _place(option, args)
    given = args[place].partition("=")[2] if place < len(args) else ""
    if not given and place + 1 < len(args) and not args[place + 1].startswith("-"):
        given = args[place + 1]
    return shlex.quote(given) if given else "VALUE"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"lfs {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="lfs",
    help="Train a language model from scratch: text to tokens to weights to text.",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


app.command("download")(download.command)
app.command("tokenize")(tokenize.command)
app.command("train")(train.command)
app.command("bench")(bench.command)
app.command("generate")(generate.command)
app.command("report")(report.command)


def main() -> None:
    """Run `lfs` with the arguments of this process."""
    _open_streams()
    app(prog_name="lfs")


def _open_streams() -> None:
    """Give a process that was started without a standard stream, as by `2>&-`, one that is empty and keeps nothing."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  it is open as long as the process runs

"""The Typer app: six commands, and one way for all of them to fail.

An `LfsError` becomes an `error:` line and a `hint:` line and the error's exit code. A slip on the command line becomes
the same two lines and exit code 2. Anything else is a bug in lfs: its traceback stays, with a line that says so.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from lfs_cli.cli import bench, download, generate, report, tokenize, train
from lfs_cli.errors import LfsError, did_you_mean

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries click inside itself since 0.20 and exports only this


class Commands(TyperGroup):
    """The group of commands, which turns errors into two lines and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run the command line ``args`` and leave the process with its exit code."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        options["standalone_mode"] = False
        try:
            code = super().main(args, *rest, **options)
        except _UsageError as error:
            code = _fail(_usage_message(error), _usage_hint(error, self), 2)
        except LfsError as error:
            code = _fail(str(error), error.hint, error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            code = _fail("interrupted", None, 130)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except Exception:
            print("error: this is a bug in lfs; the traceback below tells where\n", file=sys.stderr)
            raise
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, hint: str | None, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"\nhint: {hint}", file=sys.stderr)
    return code


def _usage_message(error: Any) -> str:
    """Return click's complaint in our words: `backticks`, lower case, no final period."""
    if getattr(error, "option_name", None) and type(error).__name__ == "NoSuchOption":
        return f"unknown option `{error.option_name}`"
    message = error.format_message().rstrip(".").replace("'", "`")
    if message.startswith("No such command "):
        return f"unknown command {message.removeprefix('No such command ').split(' ')[0].rstrip('.')}"
    return message[:1].lower() + message[1:]


def _usage_hint(error: Any, group: TyperGroup) -> str:
    context = error.ctx
    here = context.command_path if context is not None else "lfs"
    if type(error).__name__ == "NoSuchOption" and context is not None:
        options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return did_you_mean(error.option_name, options)
    if "No such command" in error.message:
        return did_you_mean(error.message.split("'")[1], group.commands)
    return f"see `{here} --help`"


app = typer.Typer(
    name="lfs",
    help="Train a language model from scratch: text to tokens to weights to text.",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("download")(download.command)
app.command("tokenize")(tokenize.command)
app.command("train")(train.command)
app.command("bench")(bench.command)
app.command("generate")(generate.command)
app.command("report")(report.command)


def main() -> None:
    """Run `lfs` with the arguments of this process."""
    app(prog_name="lfs")

"""`lfs generate`: let a trained model continue a prompt.

stdout carries the text alone: each prompt with its continuation, as it is written. Several texts are separated by a
line `<|endoftext|>`, as in a corpus, so that what one command writes another can read.
"""

import io
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfs_cli.cli.console import Console, duration, printable, show
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose, number, whole_number
from lfs_cli.errors import ConfigError, LfsError

if TYPE_CHECKING:
    from lfs_cli.config import GenerateConfig
    from lfs_cli.runs.generate import GenerateResult, OpenModel, Piece

SEPARATOR = "<|endoftext|>"
DIM, NORMAL = "\x1b[2m", "\x1b[22m"


def command(
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; may be repeated.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="Run, run folder or checkpoint folder; by default the newest run.")
    ] = None,
    max_tokens: Annotated[int | None, whole_number("--max-tokens", 100, help="Tokens to write at most.")] = None,
    temperature: Annotated[
        float | None, number("--temperature", 0.8, help="Below 1 safer, above 1 wilder, 0 the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, whole_number("--top-k", 40, help="Keep the N likeliest tokens.")] = None,
    top_p: Annotated[float | None, number("--top-p", 0.95, help="Keep the likeliest tokens that sum to X.")] = None,
    min_p: Annotated[
        float | None, number("--min-p", 0.05, help="Keep tokens at least X times as likely as the likeliest.")
    ] = None,
    seed: Annotated[int | None, whole_number("--seed", 1, help="The same seed writes the same text.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Read the whole text anew for every token.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Let a trained model continue a prompt.

    Without a prompt, one is read from a pipe; on a terminal you are asked for one after the other.
    """
    from lfs_cli.config import GenerateConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(GenerateConfig)
        return
    options = {
        "prompts": [_checked(prompt) for prompt in prompts] if prompts else None,
        "run": run,
        "max_tokens": max_tokens,
        "sampling.temperature": temperature,
        "sampling.top_k": top_k,
        "sampling.top_p": top_p,
        "sampling.min_p": min_p,
        "seed": seed,
        "cache": False if no_cache else None,
    }
    settings = load_config(GenerateConfig, config, overrides or [], options)
    is_asking = not settings.prompts and sys.stdin is not None and sys.stdin.isatty()
    if is_asking and as_json:
        raise ConfigError(
            "`--json` needs a prompt", hint='give one, such as `lfs generate --json --prompt "Once upon a time"`'
        )
    if not settings.prompts and not is_asking:
        settings = settings.model_copy(update={"prompts": (_piped_prompt(),)})

    from lfs_cli.runs.folder import DataFolder

    data = DataFolder.here()
    if not Path(settings.run or "-").is_dir():
        data.find_run(settings.run)  # before torch: a misspelled run must not cost three seconds
    from lfs_cli.runs.generate import generate, open_model

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows `?`, not a traceback
    if is_asking:
        _ask(console, open_model(settings, data, console.observer), settings)
        return
    view = TextView(console, settings.prompts)
    try:
        result = generate(settings, data, console.observer, None if as_json else view.show)
    except KeyboardInterrupt:
        view.end_line()
        raise
    if as_json:
        rows = [asdict(row) for row in result.rows]
        console.results(rows, run=result.run, checkpoint=result.checkpoint, seconds=round(result.seconds, 3))
    console.next(f"{_speed(result)}; next: `--seed {settings.seed + 1}` writes another text")


class TextView:
    """Shows texts one after the other, though they are written side by side: the later ones wait their turn.

    Args:
        console: Where to.
        prompts: What the texts begin with, dimmed on a terminal.
    """

    def __init__(self, console: Console, prompts: tuple[str, ...]) -> None:
        self.console = console
        self.prompts = prompts
        self.is_terminal = sys.stdout.isatty()
        self._waiting = [""] * len(prompts)
        self._ended = [False] * len(prompts)
        self._turn = 0
        self._has_begun = False
        self._last = "\n"

    def show(self, piece: "Piece") -> None:
        """Take the next piece of a text, and print what is due."""
        self._waiting[piece.row] += piece.text
        self._ended[piece.row] = piece.stopped is not None
        while self._turn < len(self.prompts):
            if not self._has_begun:
                self._has_begun = True
                self._print(self.prompts[self._turn], is_dim=True)
            self._print(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self.end_line()
            self._turn, self._has_begun = self._turn + 1, False
            if self._turn < len(self.prompts):
                self._print(f"{SEPARATOR}\n", is_dim=True)

    def end_line(self) -> None:
        """Move to the beginning of a line, if not there."""
        if self._last != "\n":
            self._print("\n")

    def _print(self, text: str, is_dim: bool = False) -> None:
        if not text:
            return
        self._last = text[-1]
        if self.is_terminal:
            text = printable(text.replace("\r", ""))
            if is_dim and "NO_COLOR" not in os.environ:
                text = f"{DIM}{text}{NORMAL}"
        self.console.text(text)


def _ask(console: Console, opened: "OpenModel", settings: "GenerateConfig") -> None:
    """Read prompts line by line and continue each; the n-th one uses the seed plus n, so that none repeats another."""
    from lfs_cli.runs.generate import write

    with suppress(ImportError):  # absent on Windows; where it is, `input` gets arrow keys and a history
        import readline  # noqa: F401  importing it is all it takes

    console.note("write how a text begins; Ctrl-C stops a text, an empty line or Ctrl-D leaves")
    turn = 0
    while line := _read_line():
        config = settings.model_copy(update={"prompts": (line,), "seed": settings.seed + turn})
        view = TextView(console, config.prompts)
        turn += 1
        try:
            result = write(opened, config, view.show)
        except KeyboardInterrupt:
            view.end_line()
        except LfsError as error:  # such as a line longer than the context: the next one may fit
            console.warning(f"{error}; {error.hint}" if error.hint else str(error))
        else:
            console.note(_speed(result))


def _read_line() -> str:
    """Return the next line of the terminal, or nothing at its end."""
    if not sys.stdout.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        print(file=sys.stderr)
        return ""


def _piped_prompt() -> str:
    """Return stdin without the line break that ends it."""
    raw = sys.stdin.buffer.read() if sys.stdin is not None else b""  # None: closed by `<&-`
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the prompt on stdin is not UTF-8 text (byte {error.start})", hint="convert it with `iconv -t utf-8`"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _checked(prompt: str) -> str:
    """Return ``prompt`` when it is text; the command line hands bytes that are not UTF-8 on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"a prompt is not UTF-8 text (character {error.start})", hint="type it in a UTF-8 terminal, or pipe it in"
        ) from None
    return prompt


def _speed(result: "GenerateResult") -> str:
    return f"{show(result.tokens)} tokens in {duration(result.seconds)}, {show(result.tokens_per_second)} tokens/s"

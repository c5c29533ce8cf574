"""`lfs train`: train a model from a JSON config."""

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, ConsoleObserver, duration, printable, show, size
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose
from lfs_cli.errors import ConfigError

if TYPE_CHECKING:
    from lfs_cli.config import TrainConfig
    from lfs_cli.runs.train import Evaluation, StepRecord

DEFAULT = Path("config.json")
COLUMNS = (
    Column("run", lambda row: row["run"].name),
    Column("steps", field("steps")),
    Column("loss", field("loss"), rank=1),
    Column("val loss", field("best_val_loss")),
    Column("perplexity", field("perplexity"), rank=3),
    Column("bits/byte", field("bits/byte"), rank=2),
    Column("tokens/s", field("tokens/s")),
    Column("time", field("time")),
)


def command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help=f"JSON config, like `--config`; by default {DEFAULT}.")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder that receives the run; by default data/runs.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with this run (`last` for the newest); CONFIG is not read.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
    explain: Explain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model and write the run to one folder."""
    from lfs_cli.config import TrainConfig, load_config

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if explain:
        console.explain(TrainConfig)
        return
    if config is not None and config_file is not None:
        raise ConfigError(f"two configs are named, `{config}` and `--config {config_file}`", hint="name one of them")
    run = None
    if resume is None:  # all of this before torch: a typo must not cost three seconds
        path = config or config_file or DEFAULT
        settings = load_config(TrainConfig, path, overrides or [])
        settings = settings.model_copy(update={"name": settings.name or path.stem})
    else:
        from lfs_cli.runs.folder import DataFolder

        run = DataFolder.here().find_run("" if resume == "last" else resume)
        settings = run.resumed_config(overrides or [])
    from lfs_cli.runs.train import plan, train

    if dry_run:
        _show_plan(console, settings, *plan(settings))
        console.next("nothing was made; next: the same command without `--dry-run`")
        return
    console.observer = TrainView(console, settings)
    try:
        result = train(settings, out, observer=console.observer, resume=run)
    finally:
        console.observer.finish_progress()
    row = {
        "run": result.directory,
        "steps": result.steps,
        "loss": result.loss,
        "best_val_loss": result.best_val_loss,
        "perplexity": result.perplexity,
        "bits/byte": result.bits_per_byte,
        "tokens/s": result.tokens_per_second,
        "time": duration(result.seconds),
    }
    console.results(
        [row] if as_json or not sys.stdout.isatty() else lay_out([row], COLUMNS)[0],
        status=result.status,
        parameters=result.parameters,
        tokens=result.tokens,
        seconds=result.seconds,
        unigram_entropy=result.unigram_entropy,
        sample=result.sample,
    )
    if result.signal:
        console.note(
            f"stopped after step {result.steps:,}, saved in {result.directory}; "
            f"next: `lfs train --resume {_run_name(result.directory)}`"
        )
        raise typer.Exit(128 + result.signal)
    chosen = f"--run {_run_name(result.directory)} " if out or resume else ""  # else it is the newest run
    console.next(f"wrote {result.directory}; next: `lfs generate {chosen}--prompt {_quoted(settings.sample_prompt)}`")


class TrainView(ConsoleObserver):
    """Shows a run as it goes: a panel that moves on a terminal, plain lines elsewhere.

    Args:
        console: Where to.
        config: The experiment.
    """

    def __init__(self, console: Console, config: "TrainConfig") -> None:
        super().__init__(console)
        self.config = config
        self._live: Any = None
        self._record: StepRecord | None = None
        self._evaluation: Evaluation | None = None
        self._text = ""

    def step(self, record: "StepRecord") -> None:
        self._record = record
        if self.console.quiet:
            return
        if self.console.is_live:
            self._refresh()
        elif record.step % self.config.log_every == 0 or record.step in (1, self.config.steps):
            self.console.note(f"step {record.step:,}/{self.config.steps:,}  " + "  ".join(self._facts(record)))

    def evaluation(self, record: "Evaluation") -> None:
        self._evaluation = record
        if self.console.is_live:
            self._refresh()
        else:
            self.console.note(f"step {record.step:,}: {_evaluation_text(record)}")

    def sample(self, step: int, text: str) -> None:
        self._text = text
        if self.console.is_live:
            self._refresh()
        else:
            self.console.note(f"step {step:,} sample: {printable(text)}")

    def finish_progress(self) -> None:
        super().finish_progress()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _facts(self, record: "StepRecord") -> list[str]:
        left = (self.config.steps - record.step) * self.config.batch_tokens / record.tokens_per_second
        return [
            f"loss {record.loss:.4f}",
            f"lr {record.lr:.2e}",
            f"norm {record.gradient_norm:.2f}",
            f"{show(record.tokens_per_second)} tokens/s",
            *([f"MFU {record.mfu:.1%}"] if record.mfu is not None else []),
            size(record.memory_bytes),
            f"{duration(left)} left",
        ]

    def _refresh(self) -> None:
        if self._record is None:
            return
        from rich.console import Console as RichConsole
        from rich.console import Group
        from rich.live import Live
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        record = self._record
        lines: list[Any] = [
            Text(f"step {record.step:,} of {self.config.steps:,}  " + "  ".join(self._facts(record)), overflow="fold"),
            Padding(ProgressBar(total=self.config.steps, completed=record.step), 0),  # which ends the bar's line
        ]
        if self._evaluation is not None:
            lines.append(Text(f"after step {self._evaluation.step:,}: {_evaluation_text(self._evaluation)}"))
        if self._text:
            lines.append(Padding(Text(printable(self._text), style="italic"), (0, 2)))
        if self._live is None:
            self._live = Live(console=RichConsole(stderr=True, highlight=False), refresh_per_second=8)
            self._live.start()
        self._live.update(Group(*lines))


def _evaluation_text(record: "Evaluation") -> str:
    bits = f", {record.bits_per_byte:.3f} bits per byte" if record.bits_per_byte is not None else ""
    return f"validation loss {record.loss:.4f}, perplexity {record.perplexity:.2f}{bits}"


def _show_plan(console: Console, config: "TrainConfig", cost: Any, device: str) -> None:
    """Show what `runs.train.plan` found: rows for a person, one object with `--json`."""
    facts = {
        "parameters": cost.parameters,
        "flops_per_token": cost.flops_per_token,
        "tokens": cost.total_tokens,
        "batch_tokens": config.batch_tokens,
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "seconds": cost.seconds,
        "device": device,
    }
    shown = {
        "parameters": show(cost.parameters),
        "FLOPs a token": show(float(cost.flops_per_token)),
        "tokens": show(cost.total_tokens),
        "tokens a step": show(config.batch_tokens),
        "memory of weights, gradients and optimizer": size(cost.weight_bytes),
        "memory of activations, at most about": size(cost.activation_bytes),
        "time, roughly": duration(cost.seconds),
        "device": device,
    }
    if console.as_json:
        console.results([facts])
    else:
        console.results([{"what": name, "value": value} for name, value in shown.items()])


def _run_name(run: Path) -> str:
    """Return what names the run on a command line: its path when it is not in the data folder."""
    from lfs_cli.runs.folder import DataFolder

    is_here = run.resolve().parent == DataFolder.here().runs.resolve()
    return run.name if is_here else shlex.quote(str(run))


def _quoted(text: str) -> str:
    return f'"{text}"' if re.fullmatch(r"[\w ,.;:'?-]*", text) else shlex.quote(printable(text))

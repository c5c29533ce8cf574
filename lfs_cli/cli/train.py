"""`lfs train`: train a model from a JSON config."""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from lfs_cli.cli import check
from lfs_cli.cli.columns import Column, field, lay_out
from lfs_cli.cli.console import Console, ConsoleObserver, duration, printable, show, size
from lfs_cli.cli.options import AsJson, ConfigFile, Explain, Overrides, Quiet, Verbose
from lfs_cli.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from lfs_cli.config import TrainConfig
    from lfs_cli.runs.plan import Plan
    from lfs_cli.runs.recorder import Evaluation, StepRecord
    from lfs_cli.runs.train import TrainResult

Fact: TypeAlias = tuple[str, int]
"""What a line of progress tells, and its rank: 0 stays, of the others the highest goes first when space is short."""

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
    check_data: Annotated[
        bool, typer.Option("--check-data", help="Compare all of its data with their checksums, and stop.")
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with this run (`last` for the newest); CONFIG is not read.")
    ] = None,
    max_time: Annotated[
        str | None, typer.Option("--max-time", metavar="TIME", help="End after so much training, such as 10m or 1h30m.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
    on: Annotated[
        str | None, typer.Option("--on", metavar="GPU", help="With --dry-run: on this GPU, such as H100, not here.")
    ] = None,
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Stop and resume a short run, compare all bits, and stop.")
    ] = False,
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
    _refuse_contradictions(config, config_file, on=on, dry_run=dry_run)
    run, notes, options = None, [], {"max_time": max_time}
    if resume is None:  # all of this before torch: a typo must not cost three seconds
        path = config or config_file or DEFAULT
        settings = load_config(TrainConfig, path, overrides or [], options)
        settings = settings.model_copy(update={"name": settings.name or path.stem})
    else:
        from lfs_cli.runs.changes import resumed_config
        from lfs_cli.runs.folder import DataFolder

        run = DataFolder.here().find_run(resume, is_trained=False)
        settings, notes = resumed_config(run, overrides or [], options)
    if check_data:
        check.check(console, settings)
        return
    for note in notes:
        console.note(note)
    if dry_run:
        _foresee(console, settings, on)
        return
    console.observer = TrainView(console, settings)
    if verify_resume:
        _verify(console, settings)
        return
    from lfs_cli.runs.train import train

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
    if result.problem:
        raise TrainingError(result.problem, hint=result.hint)
    if result.signal:
        console.note(
            f"stopped after step {result.steps:,}, saved in {result.directory}; "
            f"next: `lfs train --resume {_run_name(result.directory)}`"
        )
        raise typer.Exit(128 + result.signal)
    chosen = f"--run {_run_name(result.directory)} " if out or resume else ""  # else it is the newest run
    write = f"`lfs generate {chosen}--prompt {_quoted(settings.sample_prompt)}`"
    if result.steps == result.first_steps:
        console.next(f"{_was_finished(settings, result)}, or {write}")
    else:
        console.next(f"wrote {result.directory}; next: {write}")


def _was_finished(config: "TrainConfig", result: "TrainResult") -> str:
    """Say that a run which was to go on had nothing left to do, and what would let it do as much again."""
    from lfs_cli.runs.folder import DataFolder, RunFolder
    from lfs_cli.runs.setup import text_tokens

    run, wanted = RunFolder(result.directory), 2 * result.steps
    text = text_tokens(config, DataFolder.here()) if config.max_epochs is not None else None
    allowed = config.steps if text is None else config.steps_for(text)
    if result.steps < allowed:
        done = f"{result.steps:,} steps were done in its {config.max_time}"
    elif allowed < config.steps:
        size = "as many as" if result.steps == allowed else "more than"
        done = f"its {result.steps:,} steps are done, {size} `max_epochs` allows,"
    else:
        done = f"its {result.steps:,} steps are done"
    more = f" --set steps={wanted}" if config.steps < wanted else ""
    if text is not None and config.model_copy(update={"steps": wanted}).steps_for(text) < wanted:
        more += f" --set max_epochs={config.epochs_for(wanted, text):g}"
    if config.max_seconds is not None and 2 * result.seconds > config.max_seconds:
        more += f" --max-time {2 * config.max_seconds}s"
    if config.plugins:
        more += f" --set {shlex.quote(f'plugins={json.dumps(config.plugins)}')}"
    return (
        f"{run.path} is finished: {done} and saved in {run.checkpoint(result.steps)}; "
        f"next: `lfs train --resume {_run_name(run.path)}{more}` for more of them"
    )


def _refuse_contradictions(config: Path | None, config_file: Path | None, *, on: str | None, dry_run: bool) -> None:
    """Raise ConfigError for options that do not go together."""
    if config is not None and config_file is not None:
        raise ConfigError(f"two configs are named, `{config}` and `--config {config_file}`", hint="name one of them")
    if on is not None and not dry_run:
        raise ConfigError("`--on` foresees a run and starts none", hint="add `--dry-run`, or leave `--on` out")


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

    def bounded(self, steps: int) -> None:
        self.config = self.config.model_copy(update={"steps": steps})

    def step(self, record: "StepRecord") -> None:
        self._record = record
        if self.console.quiet:
            return
        if self.console.is_live:
            self._refresh()
        elif record.step % self.config.log_every == 0 or record.step in (1, self.config.steps):
            self.console.note(
                f"step {record.step:,}/{self.config.steps:,}  " + "  ".join(text for text, _ in self._facts(record))
            )

    def evaluation(self, record: "Evaluation") -> None:
        self._evaluation = record
        if self.console.is_live:
            self._refresh()
        else:
            self.console.note(f"step {record.step:,}: {', '.join(text for text, _ in _evaluation_facts(record))}")

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

    def _facts(self, record: "StepRecord") -> list[Fact]:
        left = (self.config.steps - record.step) * self.config.batch_tokens / record.tokens_per_second
        if self.config.max_seconds is not None:
            left = max(0.0, min(left, self.config.max_seconds - record.seconds))
        return [
            (f"loss {record.loss:.4f}", 0),
            (f"lr {record.lr:.2e}", 6),
            (f"norm {record.gradient_norm:.2f}", 4),
            (f"{show(record.tokens_per_second)} tokens/s", 2),
            *([(f"MFU {record.mfu:.1%}", 3)] if record.mfu is not None else []),
            (size(record.memory_bytes), 5),
            (f"{duration(left)} left", 1),
        ]

    def _share(self, record: "StepRecord") -> float:
        """Return the share of the run that is done, by steps or by the clock."""
        by_steps, limit = record.step / self.config.steps, self.config.max_seconds
        return max(by_steps, min(1.0, record.seconds / limit)) if limit else by_steps

    def _refresh(self) -> None:
        if self._record is None:
            return
        from rich.console import Console as RichConsole
        from rich.console import Group
        from rich.live import Live
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=RichConsole(stderr=True, highlight=False), refresh_per_second=8)
            self._live.start()
        record, width = self._record, self._live.console.width
        step = f"step {record.step:,} of {self.config.steps:,}  "
        lines: list[Any] = [
            Text(fit(self._facts(record), width, before=step, between="  "), overflow="fold"),
            Padding(ProgressBar(total=1.0, completed=self._share(record)), 0),  # which ends the bar's line
        ]
        if self._evaluation is not None:
            after = f"after step {self._evaluation.step:,}: "
            lines.append(Text(fit(_evaluation_facts(self._evaluation), width, before=after, between=", ")))
        if self._text:
            lines.append(Padding(Text(printable(self._text), style="italic"), (0, 2)))
        self._live.update(Group(*lines))


def _evaluation_facts(record: "Evaluation") -> list[Fact]:
    bits = [(f"{record.bits_per_byte:.3f} bits per byte", 1)] if record.bits_per_byte is not None else []
    return [(f"validation loss {record.loss:.4f}", 0), (f"perplexity {record.perplexity:.2f}", 2), *bits]


def fit(facts: Sequence[Fact], width: int, *, before: str, between: str) -> str:
    """Return ``facts`` in one line of ``width`` characters behind ``before``: what does not fit is left out."""
    kept = list(facts)
    while len(line := before + between.join(text for text, _ in kept)) > width and any(rank for _, rank in kept):
        kept.remove(max(kept, key=lambda fact: fact[1]))
    return line


def _verify(console: Console, config: "TrainConfig") -> None:
    """Run the check of `--verify-resume` and show what was compared."""
    from lfs_cli.runs.verify import verify_resume

    try:
        rows, problem = verify_resume(config, observer=console.observer)
    finally:
        console.observer.finish_progress()
    console.results(rows, steps=config.verify_steps, is_equal=not problem)
    if problem:
        raise problem
    console.next(f"a run of {config.verify_steps} steps with two stops ends bit for bit like one without")


def _foresee(console: Console, config: "TrainConfig", gpu_name: str | None) -> None:
    """Show what a run would take, here or on a GPU by name: rows for a person, one object with `--json`."""
    from lfs_cli.runs.folder import DataFolder
    from lfs_cli.runs.plan import BASES, make_plan
    from lfs_cli.runs.setup import text_tokens

    text = text_tokens(config, DataFolder.here()) if config.max_epochs is not None else None
    plan = make_plan(config, gpu_name, text)
    whole = config.steps if text is None else config.steps_for(text)
    is_timed = plan.steps < whole
    tokens_per_second = config.batch_tokens / plan.step_seconds
    facts = {
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "batch_tokens": config.batch_tokens,
        "microbatch": plan.microbatch,
        "weight_bytes": plan.memory.weights,
        "optimizer_bytes": plan.memory.state,
        "step_bytes": plan.memory.step,
        "peak_bytes": plan.memory.peak,
        "room_bytes": plan.room,
        "fits": plan.fits,
        "largest_microbatch": plan.largest_microbatch,
        "step_seconds": plan.step_seconds,
        "tokens_per_second": tokens_per_second,
        "seconds": plan.seconds,
        "basis": plan.basis,
        "device": plan.device,
    }
    shown = {
        "parameters": show(plan.parameters),
        "FLOPs a token": show(float(plan.flops_per_token)),
        "tokens": show(plan.tokens),
        "tokens a step": show(config.batch_tokens),
        "sequences at once": f"{plan.microbatch:,} of {config.batch_size:,}",
        "device": plan.device,
        "memory of weights and optimizer": size(plan.memory.weights + plan.memory.state),
        "memory of gradients and activations": size(plan.memory.step),
        "fits": _fit(plan),
        "time of a step, about": f"{_about(1000 * plan.step_seconds)} ms",
        "tokens/s, about": _about(tokens_per_second),
        "steps": ("about " if is_timed else "")
        + f"{plan.steps:,}"
        + (f" of {config.steps:,}" if plan.steps < config.steps else "")
        + (f", as `max_epochs` is {config.max_epochs:g}" if whole < config.steps and not is_timed else ""),
        "time, about": duration(plan.seconds) + (", which is the `max_time`" if is_timed else ""),
        "these times are": BASES[plan.basis],
    }
    if console.as_json:
        console.results([facts])
    else:
        console.results([{"what": name, "value": value} for name, value in shown.items()])
    if config.max_epochs is not None and text is None:
        console.note(f"the tokens of `{config.data.dataset}` are not made yet: `max_epochs` may allow fewer steps")
    there = "" if gpu_name is None else f" and `--on`, on a machine that has {plan.device}"
    console.next(f"nothing was made; next: the same command without `--dry-run`{there}")


def _about(value: float) -> str:
    """Return an estimate, with no more digits than it deserves."""
    return show(float(f"{value:.3g}"))


def _fit(plan: "Plan") -> str:
    """Say whether a step fits the memory, and what would."""
    if plan.room is None:
        return f"{size(plan.memory.peak)}, and how much is free is not known"
    if plan.fits:
        return f"yes: {size(plan.memory.peak)} of {size(plan.room)}"
    most = (
        f"at most {plan.largest_microbatch:,} at once" if plan.largest_microbatch else "not even one sequence at once"
    )
    return f"no: {size(plan.memory.peak)} of {size(plan.room)}; {most}"


def _run_name(run: Path) -> str:
    """Return what names the run on a command line."""
    from lfs_cli.runs.folder import DataFolder, RunFolder

    return DataFolder.here().name_of(RunFolder(run))


def _quoted(text: str) -> str:
    return f'"{text}"' if re.fullmatch(r"[\w ,.;:'?-]*", text) else shlex.quote(printable(text))

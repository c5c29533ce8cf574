"""The body of `lfs train`: from a config to a trained model, in one plain loop.

`train` prepares (device, text, tokens, model, optimizers), loops, and writes the result down. A batch is a function of
the seed and the step alone, so a run that was stopped goes on from its last checkpoint with the batches it would have
seen, and ends bit for bit where it would have ended. What is under way on the device is read one step later
(`recorder.py`) and brought to the disk in the background (`saver.py`). So the loop waits for the device only where the
model is looked at or saved, which must know that the last step went well, and for the disk only when it is saved again.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from lfs_cli.config import TrainConfig, dump_config
from lfs_cli.errors import CheckpointError
from lfs_cli.files import replace_text
from lfs_cli.kernels.self_check import cancel_checks
from lfs_cli.model import load_state
from lfs_cli.model.device import is_out_of_memory, release_memory
from lfs_cli.optimizers import Optimizer, build_schedule
from lfs_cli.reports.table import append_row
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.journal import environment, write_json
from lfs_cli.runs.lock import only_trainer
from lfs_cli.runs.microbatch import decide_microbatch, explained_memory, rows_at_once
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress, batch_of
from lfs_cli.runs.recorder import Recorder
from lfs_cli.runs.resume import keep_config, load_checkpoint, restore
from lfs_cli.runs.saver import Saver, finish_writing
from lfs_cli.runs.setup import Setup, set_up
from lfs_cli.runs.stop import Stop, StoppedError, stop_signals
from lfs_cli.training.anomaly import AnomalyError, first_bad_layer
from lfs_cli.training.budget import Budget
from lfs_cli.training.casts import Casts
from lfs_cli.training.cost import device_name
from lfs_cli.training.evaluate import Evaluation, evaluate
from lfs_cli.training.graphs import CudaRecorder, GraphedPass, choose_graphs
from lfs_cli.training.randomness import fixed_order, undisturbed
from lfs_cli.training.recovery import with_less_at_once
from lfs_cli.training.step import train_step


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        directory: The run folder.
        status: `finished`, `stopped` by a signal, or `diverged`.
        signal: Number of that signal, else 0.
        problem: What went wrong in a run that diverged, and where in the model; else empty.
        hint: What to do about it.
        steps: Steps done.
        first_steps: Those of them that had been done before: all of them when a run that is finished is to go on.
        loss: Mean nats per token of the last training batch.
        best_val_loss: Lowest validation loss, or None when the run ended before its first evaluation.
        perplexity: e to that loss.
        bits_per_byte: Bits per byte of text at that loss, or None when the bytes are not known.
        parameters: Weights of the model.
        tokens: Tokens trained on.
        tokens_per_second: Mean over the training steps but the first of each start, in which kernels are compiled; of a
            run that has no others, over those.
        seconds: Seconds of the training steps.
        unigram_entropy: Loss in nats of a model that knows only how frequent each token is.
        sample: What the model wrote last.
    """

    directory: Path
    status: str
    signal: int
    problem: str
    hint: str
    steps: int
    first_steps: int
    loss: float | None
    best_val_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    parameters: int
    tokens: int
    tokens_per_second: float
    seconds: float
    unigram_entropy: float
    sample: str


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    data: DataFolder | None = None,
    observer: Observer | None = None,
    resume: RunFolder | None = None,
) -> TrainResult:
    """Train a model, write the run to a folder of its own and add its row to the experiment table.

    SIGINT and SIGTERM are heard meanwhile: the first one finishes the step and saves (`status` is `stopped`), the
    second one ends the process. A run that diverges is a result too: see `status` and `problem`.

    Args:
        config: The experiment.
        out: Folder that receives the run's folder; by default `runs` in the data folder.
        data: Data folder; by default the one of this process (`DataFolder.here`).
        observer: Is told what happens.
        resume: Go on with this run from its last checkpoint instead of starting a new one.

    Raises:
        ConfigError: When settings do not fit each other or the tokenizer.
        DataError: When the text or its tokens cannot be used.
        DeviceError: When the device cannot do what was asked, or has no memory for a single sequence.
        CheckpointError: When a checkpoint cannot be read or written, or another process trains the run.
    """
    data = data or DataFolder.here()
    with stop_signals() as stop:
        result, row = train_run(
            config, Path(out or data.runs), data=data, observer=observer or Observer(), resume=resume, stop=stop
        )
    append_row(data.table, row)
    return result


def train_run(
    config: TrainConfig, runs: Path, *, data: DataFolder, observer: Observer, resume: RunFolder | None, stop: Stop
) -> tuple[TrainResult, dict[str, Any]]:
    """Do what `train` does but for the table, whose row is returned; ``stop`` says when to end early."""
    if resume:
        resume.refuse_traps()
    with fixed_order() if config.deterministic else nullcontext():
        try:
            setup = set_up(config, resume.path if resume else runs, data, observer)
            bounded = _bounded(config, setup, observer)
            run = resume or _new_run(config, runs, setup)
            with only_trainer(run.path):
                return _train(bounded, setup, run, observer, given=config, is_resumed=resume is not None, stop=stop)
        finally:
            cancel_checks()


def _train(
    config: TrainConfig,
    setup: Setup,
    run: RunFolder,
    observer: Observer,
    *,
    given: TrainConfig,
    is_resumed: bool,
    stop: Stop,
) -> tuple[TrainResult, dict[str, Any]]:
    """Train in the folder ``run``, which is locked, and return the result and its row; keep the config as ``given``."""
    finish_writing(run)
    progress = restore(config, run, setup, observer) if is_resumed else Progress()
    first_steps = progress.step
    keep_config(run, given)
    recorder = Recorder(config, run, progress, observer, setup.device)
    microbatch = decide_microbatch(config, setup, recorder)
    has_graphs, why = choose_graphs(config, setup.device, rows_at_once(config, progress))
    graphs = GraphedPass(setup.loss, setup.model, CudaRecorder(setup.device)) if has_graphs else None
    # A plugin may move weights in ways that PyTorch does not count
    casts = Casts(setup.model, setup.dtype, () if config.plugins else setup.optimizers)
    observer.stage(
        f"training {setup.model.parameter_count():,} weights on {device_name(setup.device)} in "
        f"{setup.dtype}, attention `{setup.attention}` ({setup.reason}), ".replace("torch.", "")
        + (f"{'with' if has_graphs else 'without'} CUDA graphs ({why}), " if setup.device.type == "cuda" else "")
        + (f"{microbatch}, in {run.path}" if microbatch else f"in {run.path}")
    )
    observer.stage(f"to beat: {setup.entropy:.3f}, the loss of guessing by token frequency alone")
    saver = Saver(
        run,
        setup.model,
        setup.optimizers,
        identity=setup.identity,
        tokenizer=setup.tokenizer_file,
        keep=config.keep_checkpoints,
        saved=progress.step if run.checkpoint(progress.step).is_dir() else -1,
    )
    problem = hint = ""
    is_complete = False
    with stop.patiently(), explained_memory(config, progress, setup.device), saver:
        while True:
            try:
                is_complete = _loop(config, setup, graphs, casts, recorder, saver, stop)
                break
            except AnomalyError as anomaly:
                saver.wait()
                if not _went_back(anomaly, config, run, setup, recorder):
                    problem, hint = _explain(anomaly, config, run, setup, progress)
                    break
    status = "diverged" if problem else "finished" if is_complete else "stopped"
    if status == "finished":
        recorder.tell_of_a_rise(setup.identity["text"]["tokens"])
    result = _result(
        run,
        setup,
        config,
        progress,
        status=status,
        signal=0 if is_complete else stop.number,
        problem=problem,
        hint=hint,
        first_steps=first_steps,
    )
    row = _row(config, result, setup)
    write_json(run.result, row)
    return result, row


def _bounded(config: TrainConfig, setup: Setup, observer: Observer) -> TrainConfig:
    """Return ``config`` with the steps that its text is long enough for."""
    text_tokens = setup.identity["text"]["tokens"]
    steps = config.steps_for(text_tokens)
    if steps < config.steps:
        observer.stage(
            f"{steps:,} of {config.steps:,} steps: `max_epochs` is {config.max_epochs:g}, and the text has "
            f"{text_tokens:,} tokens"
        )
        observer.bounded(steps)
        build_schedule(config.schedule, steps)  # which may refuse so few
    return config.model_copy(update={"steps": steps})


def _loop(
    config: TrainConfig,
    setup: Setup,
    graphs: GraphedPass | None,
    casts: Casts,
    recorder: Recorder,
    saver: Saver,
    stop: Stop,
) -> bool:
    """Train from the last step of the run to its end, or until it is asked to stop.

    Each turn first does what is due after the step before: look at the model, save it. So a run that goes on begins
    with what it had not done when it was stopped.

    Returns:
        Whether nothing is left to do, which a signal may prevent.

    Raises:
        AnomalyError: When training has gone wrong.
    """
    progress = recorder.progress
    schedule = build_schedule(config.schedule, config.steps)
    budget = Budget(config.steps, config.max_seconds)
    parameters = list(setup.model.parameters())
    step = progress.step
    while True:
        saver.check()
        is_over = budget.is_spent(step, recorder.seconds(), progress.recent)
        is_best = False
        if is_over or (step and step % config.eval_every == 0):
            recorder.settle()
            if progress.evaluated < step and not stop:
                _look(config, setup, graphs, recorder, stop)
                is_best = progress.is_best()
        is_due = stop or is_over or (step and step % config.checkpoint_every == 0)
        is_due = is_due or (step == 0 and config.anomaly.policy == "rollback")
        if is_best or (is_due and step > saver.saved):
            recorder.settle()
            saver.save(progress)
        if stop or is_over:
            return is_over and progress.evaluated == step

        recorder.start_clock()
        position = budget.position(step, recorder.seconds(), progress.recent, progress.lost())
        factor = schedule(position)
        lr = _set_learning_rates(setup.optimizers, factor)
        step += 1
        tokens_BT, targets_BT = setup.batch(batch_of(step, progress.skipped))
        passes = config.batch_size // rows_at_once(config, progress)
        with casts.kept(passes):
            numbers = train_step(
                setup.loss,
                parameters,
                setup.optimizers,
                tokens_BT,
                targets_BT,
                passes=passes,
                clip=config.clip,
                accept=partial(recorder.accept, step) if recorder.asks_first else None,
                on_less=recorder.ran_out,
                draws=bool(config.plugins),
                one_pass=graphs,
            )
        recorder.take(step, lr, numbers)


def _look(config: TrainConfig, setup: Setup, graphs: GraphedPass | None, recorder: Recorder, stop: Stop) -> None:
    """Evaluate the model and let it write; neither leaves a trace when the run is asked to stop meanwhile."""
    batches, text = setup.valid_batches, ""

    def attempt(rows: int) -> Evaluation:
        with undisturbed(setup.device):
            return evaluate(
                setup.model,
                setup.loss,
                stop.watching(batches.sequential(config.eval_batches)),
                setup.device,
                step=recorder.progress.step,
                bytes_per_token=setup.bytes_per_token,
                rows=rows,
            )

    def undo() -> None:
        if graphs is not None:
            graphs.drop()  # what they hold may be what was missing

    rows = rows_at_once(config, recorder.progress)
    try:
        found = with_less_at_once(attempt, rows, config.batch_size, setup.device, undo=undo, on_less=recorder.ran_out)
        if config.sample_tokens:
            text = _write(config, setup, recorder, stop)
    except StoppedError:
        return
    recorder.evaluated(found)
    recorder.wrote(text)


def _write(config: TrainConfig, setup: Setup, recorder: Recorder, stop: Stop) -> str:
    """Return what the model writes; nothing where there is no memory for that, which is no reason to end a run."""
    try:
        with undisturbed(setup.device), fixed_order(False):  # choosing a token sums in none on a GPU
            pieces = setup.writer().stream(
                config.sample_prompt, max_tokens=config.sample_tokens, seed=config.seed, **config.sampling.model_dump()
            )
            return config.sample_prompt + "".join(stop.watching(pieces))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory(setup.device)
    recorder.observer.warning(f"out of memory: no sample after step {recorder.progress.step:,}")
    return ""


def _went_back(anomaly: AnomalyError, config: TrainConfig, run: RunFolder, setup: Setup, recorder: Recorder) -> bool:
    """Bring the run back to its last checkpoint and leave out the batch of ``anomaly``, where the policy says so.

    Returns:
        Whether that was done: not with another policy, and not too often to one checkpoint.
    """
    if config.anomaly.policy != "rollback":
        return False
    progress = recorder.progress
    batch = batch_of(anomaly.step, progress.skipped)
    seconds, cold = progress.seconds, (progress.cold_steps, progress.cold_seconds)
    rows = rows_at_once(config, progress)
    last = run.checkpoint_steps()[-1]
    if recorder.returns(last) >= config.anomaly.repeats:
        return False
    load_checkpoint(config, run.checkpoint(last), setup, progress, recorder.observer)
    progress.seconds = seconds  # they have passed
    progress.cold_steps, progress.cold_seconds = cold
    recorder.go_back()
    if rows_at_once(config, progress) != rows:  # the memory is still as short as it was found to be
        recorder.microbatch(rows, "out of memory before a rollback")
    recorder.went_back(anomaly, batch)
    return True


def _explain(
    anomaly: AnomalyError, config: TrainConfig, run: RunFolder, setup: Setup, progress: Progress
) -> tuple[str, str]:
    """Return what went wrong and where in the model it began, and what to do.

    Where the update was applied before its numbers were known, on a GPU, all weights may have become NaN. The batch is
    then run with those of the last checkpoint, which most often shows the same.
    """
    batch = setup.batch(batch_of(anomaly.step, progress.skipped))
    passes = config.batch_size // rows_at_once(config, progress)
    layer = first_bad_layer(setup.model, setup.plain_loss, *batch, passes=passes)
    steps = run.checkpoint_steps()
    if layer and layer.startswith("the weight") and steps:
        try:
            load_state(setup.model, run.checkpoint(steps[-1]) / "model.safetensors")
            again = first_bad_layer(setup.model, setup.plain_loss, *batch, passes=passes)
            layer = f"{again} (with the weights of step {steps[-1]:,})" if again else layer
        except CheckpointError:
            pass  # what is known already has to do
    began = f"; first to go wrong: {layer}" if layer else ""
    kept = f"last good checkpoint: step {steps[-1]}; " if steps else ""
    highest = max(range(len(config.optimizer)), key=lambda i: config.optimizer[i].lr)
    lower = f"try `--set optimizer.{highest}.lr={config.optimizer[highest].lr / 4:g}`"
    return f"{anomaly}{began}", f"{kept}{lower}"


def _new_run(config: TrainConfig, runs: Path, setup: Setup) -> RunFolder:
    """Create the run folder with its config and environment."""
    run = None
    try:
        run = RunFolder.create(runs, config.name or config.data.dataset)
        write_json(run.environment, environment(device_name(setup.device)))
        replace_text(run.config, dump_config(config))
    except OSError as error:
        if run is not None:
            shutil.rmtree(run.path, ignore_errors=True)
        raise CheckpointError(
            f"cannot create a run in {runs}: {error.strerror}", hint="choose a folder you can write with `--out`"
        ) from None
    return run


def _set_learning_rates(optimizers: list[Optimizer], factor: float) -> float:
    """Set each group's rate to ``factor`` times its peak, and return the first one's."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = factor * group["peak_lr"]
    return groups[0]["lr"]


def _result(run: RunFolder, setup: Setup, config: TrainConfig, progress: Progress, **how: Any) -> TrainResult:
    steps, seconds = progress.step, progress.seconds
    if progress.warm_seconds:
        steps, seconds = progress.warm_steps, progress.warm_seconds
    return TrainResult(
        directory=run.path,
        **how,
        steps=progress.step,
        loss=progress.loss,
        best_val_loss=progress.best.get("loss"),
        perplexity=progress.best.get("perplexity"),
        bits_per_byte=progress.best.get("bits_per_byte"),
        parameters=setup.model.parameter_count(),
        tokens=progress.step * config.batch_tokens,
        tokens_per_second=steps * config.batch_tokens / seconds if seconds else 0.0,
        seconds=progress.seconds,
        unigram_entropy=setup.entropy,
        sample=progress.sample,
    )


def _row(config: TrainConfig, result: TrainResult, setup: Setup) -> dict[str, Any]:
    """Return the run's row of the experiment table."""
    return {
        "timestamp": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "experiment_name": config.name or config.data.dataset,
        "optimizer": "+".join(dict.fromkeys(group.name for group in config.optimizer)),
        "attention_type": setup.attention,
        "best_val_loss": result.best_val_loss,
        "params_M": result.parameters / 1e6,
        "tokens_M": result.tokens / 1e6,
        "val_bits_per_byte": result.bits_per_byte,
        "tokens_per_second": result.tokens_per_second,
        "minutes": result.seconds / 60,
        "device": device_name(setup.device),
        "run": result.directory.name,
        "status": result.status,
    }

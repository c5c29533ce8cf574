"""The body of `lfs train`: from a config to a trained model, in one plain loop.

`train` prepares (device, text, tokens, model, optimizers), loops, and writes the result down. A batch is a function of
the seed and the step alone, so a run that was stopped goes on from its last checkpoint with the batches it would have
seen. What is under way on the device is read one step later (`_Recorder`), so the loop never waits for it.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lfs_cli.config import DownloadConfig, TokenizeConfig, TrainConfig, dump_config
from lfs_cli.corpus.batches import Batches
from lfs_cli.corpus.shards import Tokens
from lfs_cli.corpus.sources import DATASETS
from lfs_cli.errors import CheckpointError, ConfigError, DataError, DeviceError, LfsError, TrainingError, did_you_mean
from lfs_cli.files import replace_text
from lfs_cli.generation.language_model import LanguageModel
from lfs_cli.model import Transformer, next_token_loss, resolve_attention
from lfs_cli.model.device import choose_device, choose_dtype, precision
from lfs_cli.optimizers import SCHEDULES, Optimizer, build_optimizers
from lfs_cli.registry import import_plugins
from lfs_cli.reports.table import append_row
from lfs_cli.runs.download import download
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.journal import Journal, environment, write_json
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.tokenize import TokenizeResult, tokenize
from lfs_cli.tokenizer import Tokenizer
from lfs_cli.training.checkpoint import point_to, read_checkpoint, write_checkpoint
from lfs_cli.training.cost import Cost, device_name, estimate, flops_per_token, memory_bytes, peak_flops
from lfs_cli.training.evaluate import Evaluation, evaluate, unigram_entropy
from lfs_cli.training.step import LossFunction, Readback, StepRecord, train_step


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        directory: The run folder.
        status: `finished`, or `stopped` by a signal.
        signal: Number of that signal, else 0.
        steps: Steps done.
        loss: Mean nats per token of the last training batch.
        best_val_loss: Lowest validation loss, or None when the run was stopped before its first evaluation.
        perplexity: e to that loss.
        bits_per_byte: Bits per byte of text at that loss, or None when the bytes are not known.
        parameters: Weights of the model.
        tokens: Tokens trained on.
        tokens_per_second: Mean over the training steps.
        seconds: Seconds of the training steps.
        unigram_entropy: Loss in nats of a model that knows only how frequent each token is.
        sample: What the model wrote last.
    """

    directory: Path
    status: str
    signal: int
    steps: int
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


@dataclass
class _Progress:
    """What a run knows of itself, and keeps in each checkpoint."""

    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)  # the line of the best evaluation
    sample: str = ""


def train(
    config: TrainConfig,
    out: Path | str | None = None,
    *,
    data: DataFolder | None = None,
    observer: Observer | None = None,
    resume: RunFolder | None = None,
) -> TrainResult:
    """Train a model and write the run to a folder of its own.

    Args:
        config: The experiment.
        out: Folder that receives the run's folder; by default `runs` in the data folder.
        data: Data folder; by default the one of this process (`DataFolder.here`).
        observer: Is told what happens.
        resume: Go on with this run from its last checkpoint instead of starting a new one.

    Raises:
        ConfigError: When settings do not fit each other or the tokenizer.
        DataError: When the text or its tokens cannot be used.
        DeviceError: When the device cannot do what was asked, or runs out of memory.
        TrainingError: When the loss is not a number.
        CheckpointError: When a checkpoint cannot be read or written.
    """
    data = data or DataFolder.here()
    observer = observer or Observer()
    device, dtype, attention, reason = _resolve(config)
    _check_room(estimate(config, device, dtype), device, resume.path if resume else Path(out or data.runs))

    prepared = prepare(config, data, observer)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    _check_tokenizer(config, tokenizer)
    train_tokens, valid_tokens = (
        Tokens.open(prepared.tokens, split, tokenizer_hash=tokenizer.hash) for split in ("train", "valid")
    )
    shape = {"context_length": config.model.context_length, "seed": config.seed}
    batches = Batches(train_tokens, batch_size=config.batch_size, **shape)
    valid_batches = Batches(valid_tokens, batch_size=config.batch_size, **shape)

    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    optimizers = build_optimizers(model, config.optimizer)
    parameters = list(model.parameters())
    schedule = SCHEDULES.get(config.schedule.name)
    loss_function = _loss_function(model, device, dtype, is_compiled=config.compile)
    writer = LanguageModel(model, tokenizer, device=device, dtype=dtype)

    run = resume or _new_run(config, out, data, device)
    progress = _restore(config, run, model, optimizers, tokenizer) if resume else _Progress()
    recorder = _Recorder(config, run, progress, observer, device)
    entropy = unigram_entropy(valid_tokens)
    observer.stage(
        f"training {model.parameter_count():,} weights on {device_name(device)} in {dtype}, ".replace("torch.", "")
        + f"attention `{attention}` ({reason}), in {run.path}"
    )
    observer.stage(f"to beat: {entropy:.3f}, the loss of guessing by token frequency alone")

    with _stop_signals() as stop, _explained_memory(config, device):
        for step in range(progress.step + 1, config.steps + 1):
            factor = schedule(step - 1, steps=config.steps, warmup=config.schedule.warmup, final=config.schedule.final)
            lr = _set_learning_rates(optimizers, factor)
            tokens_BT, targets_BT = (_to_device(tensor, device) for tensor in batches.at(step - 1))
            numbers = train_step(
                loss_function,
                parameters,
                optimizers,
                tokens_BT,
                targets_BT,
                passes=config.batch_size // config.passes_size,
                clip=config.clip,
            )
            recorder.take(step, lr, numbers)

            if step == config.steps or step % config.eval_every == 0:
                recorder.settle()
                found = evaluate(
                    model,
                    loss_function,
                    valid_batches.sequential(config.eval_batches),
                    device,
                    step=step,
                    bytes_per_token=prepared.bytes_per_token("valid"),
                    rows=config.passes_size,
                )
                recorder.evaluated(found)
                recorder.wrote(_sample(config, writer))
            if stop.number or step == config.steps or step % config.checkpoint_every == 0 or recorder.is_best(step):
                recorder.settle()
                _save(run, model, optimizers, progress, tokenizer, prepared.tokenizer, config.keep_checkpoints)
            if stop.number:
                break
            recorder.start_clock()

    result = _result(run, model, config, progress, entropy, stop.number)
    row = _row(config, result, attention, device)
    write_json(run.result, row)
    append_row(data.table, row)
    return result


def prepare(config: TrainConfig, data: DataFolder, observer: Observer) -> TokenizeResult:
    """Return the tokens that ``config`` trains on, first bringing the text and learning the tokenizer if need be."""
    dataset = config.data.dataset
    if not (data.raw(dataset) / "train.txt").exists():
        if dataset not in DATASETS:
            raise DataError(
                f"no dataset `{dataset}` in {data.root / 'raw'}",
                hint=f"bring it with `lfs download --from FILE --name {dataset}`, or "
                + did_you_mean(dataset, DATASETS).removesuffix("?"),
            )
        observer.stage(f"no text for `{dataset}` yet: `lfs download {dataset}`")
        settings = {"dataset": dataset, "sample_bytes": config.data.sample_bytes}
        download(DownloadConfig(**settings), data, observer)
    settings = {
        "dataset": dataset,
        "vocab_size": config.model.vocab_size,
        "special_tokens": config.data.special_tokens,
        "tokenizer": config.data.tokenizer,
    }
    return tokenize(TokenizeConfig(**settings), data, observer)


def plan(config: TrainConfig) -> tuple[Cost, str]:
    """Return what the run of ``config`` would take on this machine, and the name of its device (`--dry-run`)."""
    device, dtype, _, _ = _resolve(config)
    return estimate(config, device, dtype), device_name(device)


class _Recorder:
    """Turns numbers on the device into records, one step behind, and keeps the run's time.

    Args:
        config: The experiment.
        run: Where the records go. A resumed run's journal is cut back to its checkpoint.
        progress: What the run knows of itself; kept up to date here.
        observer: Is told about each record.
        device: Where the numbers come from.
    """

    def __init__(
        self, config: TrainConfig, run: RunFolder, progress: _Progress, observer: Observer, device: torch.device
    ) -> None:
        self.config, self.run, self.progress, self.observer, self.device = config, run, progress, observer, device
        self._journal = Journal(run.metrics)
        self._journal.trim(progress.step)
        self._flops = flops_per_token(config.model)
        self._peak = peak_flops(device)
        self._pending: tuple[int, float, Readback] | None = None
        self._recent: list[float] = []
        self._lap = time.perf_counter()

    def start_clock(self) -> None:
        """Leave out of the training time what has passed since the last record, unless a step is under way."""
        if self._pending is None:
            self._lap = time.perf_counter()

    def take(self, step: int, lr: float, numbers: Tensor) -> None:
        """Note that ``step`` is under way with its loss and norm in ``numbers``, and record the one before it."""
        readback = Readback(numbers)
        self.settle()
        self._pending = (step, lr, readback)
        if not numbers.is_cuda:  # nothing runs ahead here: the numbers are ready
            self.settle()

    def settle(self) -> None:
        """Record the step that is under way, if one is.

        Raises:
            TrainingError: When its loss or gradient is not a number.
        """
        if self._pending is None:
            return
        (step, lr, readback), self._pending = self._pending, None
        loss, norm = readback.read()
        if not (isfinite(loss) and isfinite(norm)):
            raise _not_a_number(step, "loss" if not isfinite(loss) else "gradient", self.run, self.config)
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        self._recent = [*self._recent[-19:], seconds]
        rate = self.config.batch_tokens * len(self._recent) / sum(self._recent)
        self.progress.step, self.progress.loss = step, loss
        self.progress.seconds += seconds
        record = StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            gradient_norm=norm,
            tokens=step * self.config.batch_tokens,
            seconds=self.progress.seconds,
            tokens_per_second=rate,
            mfu=rate * self._flops / self._peak if self._peak else None,
            memory_bytes=memory_bytes(self.device),
        )
        self._journal.append(record.line())
        self.observer.step(record)

    def evaluated(self, found: Evaluation) -> None:
        """Record an evaluation.

        Raises:
            TrainingError: When its loss is not a number.
        """
        if not isfinite(found.loss):
            raise _not_a_number(found.step, "validation loss", self.run, self.config)
        self._journal.append(found.line())
        if not self.progress.best or found.loss < self.progress.best["loss"]:
            self.progress.best = found.line()
        self.observer.evaluation(found)

    def wrote(self, text: str) -> None:
        """Keep what the model wrote after the step recorded last."""
        if text:
            self.progress.sample = text
            quoted = "".join(f"> {line}\n" for line in text.splitlines())
            try:
                with self.run.samples.open("a", encoding="utf-8") as file:
                    file.write(f"## Step {self.progress.step:,}\n\n{quoted}\n")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write {self.run.samples}: {error.strerror}",
                    hint=f"free some space, then `lfs train --resume {self.run.path}`",
                ) from None
            self.observer.sample(self.progress.step, text)

    def is_best(self, step: int) -> bool:
        """Whether the lowest validation loss so far was measured after ``step``."""
        return self.progress.best.get("step") == step


def _resolve(config: TrainConfig) -> tuple[torch.device, torch.dtype, str, str]:
    """Return device, dtype, attention backend and why that one: all that can be refused before anything is made."""
    import_plugins(config.plugins)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    SCHEDULES.get(config.schedule.name)
    return device, dtype, *resolve_attention(config.model.attention, device.type, dtype, config.model.head_dim)


def _check_room(cost: Cost, device: torch.device, folder: Path) -> None:
    """Raise an error when the weights cannot fit the memory of the device, or a checkpoint the disk."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _machine_bytes()
    if total and cost.weight_bytes > total:
        raise DeviceError(
            f"weights, gradients and optimizer need {cost.weight_bytes / 2**30:,.1f} GiB of memory, and there are "
            f"{total / 2**30:,.1f}",
            hint="make the model smaller, such as with `--set model.width=512`; `--dry-run` shows what it needs",
        )
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
    if cost.weight_bytes > free:
        raise CheckpointError(
            f"a checkpoint in {folder} needs about {cost.weight_bytes / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB are free",
            hint="free some space, or name a folder on a larger disk with `--out`",
        )


def _machine_bytes() -> int:
    """Return the memory of this machine in bytes, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, among others
        return 0


def _check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when the tokenizer has ids that the model lacks, or the sample's prompt is too long."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.model.vocab_size:,}",
            hint=f"try `--set model.vocab_size={tokenizer.vocab_size}`",
        )
    prompt = len(tokenizer.encode(config.sample_prompt))
    if config.sample_tokens and prompt >= config.model.context_length:
        raise ConfigError(
            f"`sample_prompt` has {prompt} tokens and the context {config.model.context_length}",
            hint="shorten it, or turn samples off with `--set sample_tokens=0`",
        )


def _loss_function(model: Transformer, device: torch.device, dtype: torch.dtype, *, is_compiled: bool) -> LossFunction:
    """Return the forward pass from tokens to their mean loss, in the types of a run."""

    def loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with precision(device, dtype):
            return next_token_loss(model.hidden(tokens_BT), model.head_weight, targets_BT)

    return torch.compile(loss) if is_compiled else loss


def _new_run(config: TrainConfig, out: Path | str | None, data: DataFolder, device: torch.device) -> RunFolder:
    """Create the run folder with its config and environment."""
    runs = Path(out) if out is not None else data.runs
    run = None
    try:
        run = RunFolder.create(runs, config.name or config.data.dataset)
        write_json(run.environment, environment(device_name(device)))
        replace_text(run.config, dump_config(config))
    except OSError as error:
        if run is not None:
            shutil.rmtree(run.path, ignore_errors=True)
        raise CheckpointError(
            f"cannot create a run in {runs}: {error.strerror}", hint="choose a folder you can write with `--out`"
        ) from None
    return run


def _restore(
    config: TrainConfig, run: RunFolder, model: Transformer, optimizers: Sequence[Optimizer], tokenizer: Tokenizer
) -> _Progress:
    """Put the last checkpoint of ``run`` into the model and optimizers, and return where it was."""
    folder = run.latest()
    state = read_checkpoint(folder, model, optimizers)
    if state["tokenizer_hash"] != tokenizer.hash:
        raise CheckpointError(
            f"the checkpoint {folder} was trained with another tokenizer than {config.data.dataset} has now",
            hint="go on with the tokenizer in the checkpoint: "
            f"`lfs train --resume {run.path} --set data.tokenizer={folder / 'tokenizer.json'}`",
        )
    return _Progress(**state["progress"])


def _save(
    run: RunFolder,
    model: Transformer,
    optimizers: Sequence[Optimizer],
    progress: _Progress,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    keep: int,
) -> None:
    """Write the checkpoint of this step, point to it, and remove those that are neither among the last nor the best."""
    folder = run.checkpoint(progress.step)
    state = {"progress": asdict(progress), "tokenizer_hash": tokenizer.hash}
    write_checkpoint(folder, model, optimizers, state, tokenizer_folder / "tokenizer.json")
    point_to(run.checkpoints / "latest", folder)
    if progress.best.get("step") == progress.step:
        point_to(run.checkpoints / "best", folder)
    run.prune_checkpoints(keep)


def _sample(config: TrainConfig, writer: LanguageModel) -> str:
    """Return the prompt of the config as the model continues it now."""
    if not config.sample_tokens:
        return ""
    return config.sample_prompt + writer.generate(
        config.sample_prompt, max_tokens=config.sample_tokens, seed=config.seed, **config.sampling.model_dump()
    )


def _set_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> float:
    """Set each group's rate to ``factor`` times its peak, and return the first one's."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = factor * group["peak_lr"]
    return groups[0]["lr"]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host; on CUDA without waiting, which needs pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class _Stop:
    number: int = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Let the first SIGINT or SIGTERM finish the step under way, and the second one stop at once."""
    stop = _Stop()

    def notice(number: int, frame: FrameType | None) -> None:
        if stop.number:
            raise KeyboardInterrupt
        stop.number = number

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, notice)
        except ValueError:  # not in the main thread: whoever started the thread handles signals
            break
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _explained_memory(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Turn the allocator's refusal into an error that names the setting to change."""
    try:
        yield
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # the first has torch.OutOfMemoryError, and what the CPU's allocator says
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        used = ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB used)"
        size = config.passes_size
        smaller = max(n for n in range(1, max(2, size // 2 + 1)) if config.batch_size % n == 0)
        raise DeviceError(
            f"out of memory at microbatch {size} x {config.model.context_length} tokens{used}",
            hint=f"try `--set microbatch={smaller}`; the result is the same"
            if size > 1
            else "choose a smaller model or a shorter context",
        ) from None


def _not_a_number(step: int, what: str, run: RunFolder, config: TrainConfig) -> LfsError:
    lower = f"try `--set optimizer.0.lr={config.optimizer[0].lr / 4:g}`"
    steps = run.checkpoint_steps()
    kept = f"last good checkpoint: step {steps[-1]}; " if steps else ""
    return TrainingError(f"{what} is not a number at step {step}", hint=kept + lower)


def _result(
    run: RunFolder, model: Transformer, config: TrainConfig, progress: _Progress, entropy: float, signal_number: int
) -> TrainResult:
    tokens = progress.step * config.batch_tokens
    return TrainResult(
        directory=run.path,
        status="stopped" if signal_number else "finished",
        signal=signal_number,
        steps=progress.step,
        loss=progress.loss,
        best_val_loss=progress.best.get("loss"),
        perplexity=progress.best.get("perplexity"),
        bits_per_byte=progress.best.get("bits_per_byte"),
        parameters=model.parameter_count(),
        tokens=tokens,
        tokens_per_second=tokens / progress.seconds if progress.seconds else 0.0,
        seconds=progress.seconds,
        unigram_entropy=entropy,
        sample=progress.sample,
    )


def _row(config: TrainConfig, result: TrainResult, attention: str, device: torch.device) -> dict[str, Any]:
    """Return the run's row of the experiment table."""
    return {
        "timestamp": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "experiment_name": config.name or config.data.dataset,
        "optimizer": "+".join(dict.fromkeys(group.name for group in config.optimizer)),
        "attention_type": attention,
        "best_val_loss": result.best_val_loss,
        "params_M": result.parameters / 1e6,
        "tokens_M": result.tokens / 1e6,
        "val_bits_per_byte": result.bits_per_byte,
        "tokens_per_second": result.tokens_per_second,
        "minutes": result.seconds / 60,
        "device": device_name(device),
        "run": result.directory.name,
        "status": result.status,
    }

"""nanoGPT as a peer: model and optimizer as its clone makes them, trained as its `train.py` does by default.

That is: bfloat16 autocast around the compiled model, gradients clipped to norm 1, AdamW with rates 6e-4 and betas 0.9
and 0.95, decay 0.1 of what has two dimensions, a short warm-up and a cosine down to a tenth. The cosine ends with the
time, which its author recommends ("should be ~= max_iters"). Dropout and biases are off, as there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lfs_cli.benchmarks.machine import PeakMemory
from lfs_cli.benchmarks.measure import Bench, Candidate
from lfs_cli.config import ScheduleConfig, TrainConfig
from lfs_cli.corpus.batches import Batches
from lfs_cli.corpus.shards import Tokens
from lfs_cli.model import Transformer
from lfs_cli.model.device import choose_compile, choose_device, choose_dtype, precision, release_memory
from lfs_cli.optimizers import build_optimizers, build_schedule
from lfs_cli.runs.folder import DataFolder, RunFolder
from lfs_cli.runs.journal import Journal, environment, write_json
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.setup import prepare, training_loss
from lfs_cli.tokenizer import Tokenizer
from lfs_cli.training.budget import Budget, lost_seconds
from lfs_cli.training.casts import Casts
from lfs_cli.training.cost import device_name, memory_bytes
from lfs_cli.training.evaluate import evaluate
from lfs_cli.training.graphs import WARM_UPS, CudaRecorder, GraphedPass, choose_graphs
from lfs_cli.training.step import Readback, StepRecord, train_step

PEAK_LR, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
SCHEDULE = ScheduleConfig(name="cosine", warmup=0.02, final=0.1)
ENDLESS = 10**9
"""Steps of a run that only the clock ends."""


@dataclass(frozen=True)
class Shape:
    """Of nanoGPT's model; by default its GPT-2 of 124 million weights."""

    vocab_size: int
    context_length: int
    layers: int = 12
    heads: int = 12
    width: int = 768


class Peer:
    """nanoGPT's model and optimizer.

    Args:
        clone: Folder with its `model.py`.
        shape: Of the model.
        lr: Peak learning rate.
        device: Where it is.
        dtype: Type of the matrix products.
        is_compiled: Whether torch.compile is used, as it is there.
    """

    def __init__(
        self, clone: Path, shape: Shape, lr: float, device: torch.device, dtype: torch.dtype, is_compiled: bool
    ) -> None:
        spec = spec_from_file_location("nanogpt_model", clone / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model: nn.Module = module.GPT(
            module.GPTConfig(
                block_size=shape.context_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.layers,
                n_head=shape.heads,
                n_embd=shape.width,
                dropout=0.0,
                bias=False,
            )
        ).to(device)
        self.optimizer = self.model.configure_optimizers(WEIGHT_DECAY, lr, BETAS, device.type)
        self._forward = torch.compile(self.model) if is_compiled else self.model
        self._precision = lambda: precision(device, dtype)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean loss."""
        with self._precision():
            return self._forward(tokens_BT, targets_BT)[1]

    def step(self, tokens_BT: Tensor, targets_BT: Tensor, passes: int) -> Tensor:
        """Train on one batch and return its loss and the norm of its gradients, on the device."""
        total = torch.zeros((), device=tokens_BT.device)
        for tokens, targets in zip(tokens_BT.chunk(passes), targets_BT.chunk(passes), strict=True):
            part = self.loss(tokens, targets) / passes
            part.backward()
            total += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([total, norm])


def race(
    config: TrainConfig, clone: Path, shape: Shape, *, minutes: float, lr: float = PEAK_LR, out: Path | None = None
) -> Path:
    """Train nanoGPT for so many minutes of training, evaluations left out, and return its run folder.

    Args:
        config: Names the text, tokenizer, batch, seed and evaluation.
        clone: Folder of nanoGPT.
        shape: Of its model.
        minutes: Time of training, the compilation included, as lfs counts it.
        lr: Peak learning rate.
        out: Folder that receives the run's folder; by default the runs of the data folder.
    """
    data = DataFolder.here()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    prepared = prepare(config, data, Observer())
    hash = Tokenizer.load(prepared.tokenizer).hash
    sizes = {"batch_size": config.batch_size, "context_length": shape.context_length, "seed": config.seed}
    batches, valid = (
        Batches(Tokens.open(prepared.tokens, split, tokenizer_hash=hash), **sizes) for split in ("train", "valid")
    )
    torch.manual_seed(config.seed)
    peer = Peer(clone, shape, lr, device, dtype, choose_compile(config.compile, device))

    run = RunFolder.create(out or data.runs, "nanogpt")
    write_json(run.environment, environment(device_name(device)))
    settings = {"name": "nanogpt", "data": config.data.model_dump(mode="json"), "model": asdict(shape)}
    settings |= {"optimizer": [{"name": "torch.adamw", "lr": lr}], "batch_size": config.batch_size, "minutes": minutes}
    run.config.write_text(json.dumps(settings, indent=1) + "\n")
    journal = Journal(run.metrics)

    schedule, budget = build_schedule(SCHEDULE, ENDLESS), Budget(ENDLESS, 60 * minutes)
    step, seconds, best = 0, 0.0, None
    recent: list[float] = []
    first = 0.0  # seconds of the first step, which compiles
    pending: Callable[[], None] | None = None
    lap = time.perf_counter()

    def tick() -> None:
        nonlocal seconds, lap, first
        now = time.perf_counter()
        if seconds:
            recent[:] = [*recent[-19:], now - lap]
        else:
            first = now - lap
        seconds, lap = seconds + now - lap, now

    while not budget.is_spent(step, seconds, recent):
        lost = lost_seconds(1, first, recent)
        rate = schedule(budget.position(step, seconds, recent, lost)) * lr
        for group in peer.optimizer.param_groups:
            group["lr"] = rate
        tokens_BT, targets_BT = (x.to(device, non_blocking=True) for x in batches.at(step))
        numbers = Readback(peer.step(tokens_BT, targets_BT, config.batch_size // config.passes_size))
        step += 1
        if pending is not None:  # one step behind, so that a GPU never runs dry
            pending()
        tick()
        pending = _recorded(journal, config, step, rate, seconds, recent, device, numbers)
        if step % config.eval_every == 0 or budget.is_spent(step, seconds, recent):
            pending()
            pending = None
            tick()
            found = evaluate(
                peer.model,
                peer.loss,
                valid.sequential(config.eval_batches),
                device,
                step=step,
                bytes_per_token=prepared.bytes_per_token("valid"),
                rows=config.passes_size,
            )
            journal.append(found.line())
            best = found if best is None or found.loss < best.loss else best
            lap = time.perf_counter()
    assert best is not None
    write_json(
        run.result,
        {
            "timestamp": datetime.now().strftime("%Y-%m-%d %H:%M"),
            "experiment_name": "nanogpt",
            "optimizer": "torch.adamw",
            "attention_type": "torch",
            "best_val_loss": best.loss,
            "params_M": sum(weight.numel() for weight in peer.model.parameters()) / 1e6,
            "tokens_M": step * config.batch_tokens / 1e6,
            "val_bits_per_byte": best.bits_per_byte,
            "tokens_per_second": max(1, step - 1) * config.batch_tokens / (seconds - first or seconds),
            "minutes": seconds / 60,
            "device": device_name(device),
            "run": run.name,
            "status": "finished",
        },
    )
    return run.path


def _recorded(
    journal: Journal,
    config: TrainConfig,
    step: int,
    lr: float,
    seconds: float,
    recent: list[float],
    device: torch.device,
    numbers: Readback,
) -> Callable[[], None]:
    """Return what writes the record of a step once its numbers are there."""
    rate = config.batch_tokens / max(median(recent or [seconds]), 1e-9)

    def write() -> None:
        loss, norm = numbers.read()
        tokens = step * config.batch_tokens
        journal.append(StepRecord(step, loss, lr, norm, tokens, seconds, rate, None, memory_bytes(device)).line())

    return write


def time_steps(config: TrainConfig, clone: Path, shape: Shape, *, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Time steps of lfs and of nanoGPT in turn, in this process, and return a row for each; ratios are to nanoGPT.

    `peak_bytes` is the most that a step holds in tensors at once, beside weights and optimizer: what `lfs train
    --dry-run` foresees. The allocator sees nothing of a replay, but all of a recording, which asks for the memory that
    its replays will work in. So the step that records is the one measured; in a run of lfs, too, the peak has it.
    Neither number has what is reserved beyond tensors: gaps between them, and a graph's memory while the update runs.

    Args:
        config: Names lfs's model and optimizers.
        clone: Folder of nanoGPT.
        shape: Of its model.
        batch: Sequences in a step, of random tokens.
        seconds: Time after which the measuring stops early.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    is_compiled = choose_compile(config.compile, device)
    torch.manual_seed(config.seed)
    batches = torch.randint(shape.vocab_size, (2, batch, shape.context_length), device=device)
    peer = Peer(clone, shape, PEAK_LR, device, dtype, is_compiled)
    model = Transformer(config.model).to(device)
    optimizers = build_optimizers(model, config.optimizer)
    loss, weights = training_loss(model, config, device, dtype), list(model.parameters())
    casts = Casts(model, dtype, optimizers)
    is_replayed, _ = choose_graphs(config, device, batch)
    one_pass = GraphedPass(loss, model, CudaRecorder(device)) if is_replayed else None

    def step() -> None:
        with casts.kept(1):
            train_step(loss, weights, optimizers, *batches, passes=1, clip=config.clip, one_pass=one_pass)

    candidates = [Candidate("lfs", step), Candidate("nanogpt", lambda: peer.step(*batches, passes=1))]
    peaks = {candidate.name: _peak_after_warm_up(candidate, device) for candidate in candidates}
    if peaks["lfs"] is not None:
        peaks["lfs"] += casts.bytes_held(1)  # from step to step
    found = Bench(device, dtype, repeats=30, max_seconds=seconds).measure("steps", candidates)
    rows = []
    for name, result in found.items():
        row = replace(result, peak_bytes=peaks[name]).row(found["nanogpt"], "nanogpt")
        row["tokens_per_second"] = 1e3 * batch * shape.context_length / row["median_ms"]
        rows.append({"name": name, "device": device_name(device), "dtype": str(dtype).removeprefix("torch."), **row})
    return rows


def _peak_after_warm_up(candidate: Candidate, device: torch.device) -> int | None:
    """Run steps until one is compiled, has what the optimizers remember and is recorded; return the memory of that."""
    for _ in range(WARM_UPS):
        candidate.run()
    release_memory(device)  # what is garbage now must not be freed in the middle of the step
    memory = PeakMemory(device)
    memory.start()
    candidate.run()
    return memory.peak_bytes()

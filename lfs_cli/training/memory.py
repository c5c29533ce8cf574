"""How much memory a training step will need, before there is one: the most bytes that live at once in its trace.

Two models of a few layers are traced (`trace.py`), and the rest is a straight line through both: every further block
adds the same. The update comes after the passes, when activations are gone and gradients are there; the larger of the
two counts.

What it does not see: the inside of single operations, save the chunk of logits of the loss, which is added; the
workspaces of libraries; fragments that an allocator cannot use. AdamW and Muon are counted as the operations that stand
in for their kernels where those cannot run: AdamW's hold as much again as the weights, and its kernel nothing. On a GPU
the trace has the kernels for norms, rotations and gates, which keep what torch.compile keeps: it computes again what is
cheap. On a CPU a compiled step has that of norms; some of what the compiler saves with `relu2` or checkpointing stays
unseen.

On one H200, compiled, 2026-11-30, steps of gpt2_small.json with 32 sequences held 10.7 GB beside weights and state, as
foreseen; those of speedrun.json 8.7, and 9.1 are foreseen. Kernels for Hopper GPUs may keep less than others: the first
held 11.9 GB before `product.py` turned queries and keys, and config.json 2.59, and 2.9 without `short_attention.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isqrt
from typing import TypeVar

import torch

from lfs_cli.config import ModelConfig, TrainConfig
from lfs_cli.model.device import as_by_compiler, as_on_gpu
from lfs_cli.model.loss import chunk_bytes
from lfs_cli.training.casts import Casts
from lfs_cli.training.cost import parameter_count
from lfs_cli.training.trace import fake_model, no_tokens, optimizer_bytes, peak_bytes, run_pass

Number = TypeVar("Number", int, float)

TRACED_LAYERS = 3


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one training step.

    Args:
        weights: The model.
        state: What the optimizer remembers.
        step: Most that is held beside these: activations, gradients, what is passing through in passes or update.
    """

    weights: int
    state: int
    step: int

    @property
    def peak(self) -> int:
        """Most bytes held at once."""
        return self.weights + self.state + self.step


def predict_memory(
    config: TrainConfig, device_type: str, dtype: torch.dtype, *, is_hopper: bool = False
) -> MemoryPrediction:
    """Return what a step of ``config`` will hold in memory, on a device that need not be here.

    Args:
        config: The run.
        device_type: Such as "cuda".
        dtype: Of the matrix products.
        is_hopper: Whether it is a GPU of the Hopper generation, which has kernels of its own.
    """
    return _predict(config, device_type, dtype, _optimizer_bytes(config, device_type), is_hopper)


def _predict(
    config: TrainConfig, device_type: str, dtype: torch.dtype, optimizer: tuple[int, int], is_hopper: bool
) -> MemoryPrediction:
    """Do what `predict_memory` does where `optimizer_bytes` is known already."""
    model, rows = resolved_for(config.model, device_type), config.passes_size
    passes = min(2, config.batch_size // rows)  # from the second on, gradients are there from the beginning

    is_compiled = bool(config.compile) and (config.compile != "auto" or device_type == "cuda")
    how = {"dtype": dtype, "is_compiled": is_compiled, "is_hopper": is_hopper}

    def traced(layers: int) -> tuple[int, int]:
        return _step_bytes(model.model_copy(update={"layers": layers}), rows, passes, device_type, **how)

    step, copies = along_layers(traced, model.layers)
    weights = 4 * parameter_count(model)
    state, update = optimizer
    # What is compiled whole gives out all gradients at its end: from the second pass on, beside those they are added to
    gradients = passes * weights if is_compiled and config.compile != "blocks" else weights
    return MemoryPrediction(weights=weights, state=state, step=max(step, copies + max(gradients, weights + update)))


def largest_microbatch(
    config: TrainConfig, device_type: str, dtype: torch.dtype, room: int, *, is_hopper: bool = False
) -> int | None:
    """Return the largest number of sequences a pass that divides the batch and fits, or None when not even one does.

    Args:
        config: The run; its `microbatch` does not count.
        device_type: Such as "cuda".
        dtype: Of the matrix products.
        room: Bytes that may be held at once.
        is_hopper: As in `predict_memory`.
    """
    below_root = [n for n in range(1, isqrt(config.batch_size) + 1) if config.batch_size % n == 0]
    sizes = sorted({*below_root, *(config.batch_size // n for n in below_root)})
    optimizer = _optimizer_bytes(config, device_type)

    def fits(rows: int) -> bool:
        asked = config.model_copy(update={"microbatch": rows})
        return _predict(asked, device_type, dtype, optimizer, is_hopper).peak <= room

    if fits(config.batch_size):  # first, as several passes hold what one does not: copies, and gradients twice
        return config.batch_size
    low, high = 0, len(sizes) - 1  # all sizes before `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def along_layers(measure: Callable[[int], tuple[Number, ...]], layers: int) -> tuple[Number, ...]:
    """Return what ``measure`` would give for so many layers, from models of a few: each further layer adds the same."""
    if layers <= TRACED_LAYERS:
        return measure(layers)
    fewer, more = measure(TRACED_LAYERS - 1), measure(TRACED_LAYERS)
    return tuple(b + (layers - TRACED_LAYERS) * (b - a) for a, b in zip(fewer, more, strict=True))


def resolved_for(model: ModelConfig, device_type: str) -> ModelConfig:
    """Return ``model`` with the attention that `auto` means on such a device, which need not be here."""
    if model.attention != "auto":
        return model
    return model.model_copy(update={"attention": "flash" if device_type == "cuda" else "standard"})


def _optimizer_bytes(config: TrainConfig, device_type: str) -> tuple[int, int]:
    with _as_on(device_type, is_compiled=False):
        return optimizer_bytes(config)


def _as_on(device_type: str, *, is_compiled: bool, is_hopper: bool = False) -> AbstractContextManager[object]:
    if device_type == "cuda":
        return as_on_gpu(is_compiled=is_compiled, is_hopper=is_hopper)
    return as_by_compiler() if is_compiled else nullcontext()


def _step_bytes(
    model: ModelConfig,
    rows: int,
    passes: int,
    device_type: str,
    dtype: torch.dtype,
    is_compiled: bool,
    is_hopper: bool,
) -> tuple[int, int]:
    """Return the peak of what the passes hold beside weights and state, and the part that `Casts` still holds after."""

    def step() -> None:
        tokens_BT = no_tokens(transformer, rows)
        with casts.kept(passes):
            for _ in range(passes):
                run_pass(transformer, tokens_BT, dtype)

    with _as_on(device_type, is_compiled=is_compiled, is_hopper=is_hopper), fake_model(model) as transformer:
        chunk = chunk_bytes(device_type, dtype, rows * model.context_length, model.vocab_size)
        casts = Casts(transformer, dtype)
        return peak_bytes(step, {torch.ops.lfs.linear_cross_entropy.default: chunk}), casts.bytes_held(passes)

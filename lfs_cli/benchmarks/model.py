"""A training step by its parts, for the sizes of CS336's table.

    forward      embedding, blocks and final norm, keeping what backward needs
    loss         head and cross-entropy, and their gradients, which the chunked loss computes on the way
    backward     the rest of the gradients
    optimizer    clipping and AdamW
    step         all of it as training runs it: the number that counts

The peak memory of `step` counts everything from the weights on; that of a part counts what the part adds.

Source: Stanford CS336 2025, assignment 2, table 1, for the sizes small to 2.7b; batch 4 and vocabulary 10,000 as there.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lfs_cli.benchmarks.machine import PeakMemory
from lfs_cli.benchmarks.measure import (
    BENCHMARKS,
    Bench,
    Candidate,
    Measurement,
    Row,
    is_out_of_memory,
    memory_refusal,
    release_memory,
)
from lfs_cli.config import BenchConfig, ModelBench, ModelConfig, TrainConfig
from lfs_cli.model import Transformer, next_token_loss, resolve_attention
from lfs_cli.model.device import precision
from lfs_cli.optimizers import AdamW, clip_gradients
from lfs_cli.training.cost import estimate, flops_per_token, parameter_count, peak_flops
from lfs_cli.training.step import train_step

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 256, "feed_forward_width": 1_024, "layers": 4, "heads": 4},
    "small": {"width": 768, "feed_forward_width": 3_072, "layers": 12, "heads": 12},
    "medium": {"width": 1_024, "feed_forward_width": 4_096, "layers": 24, "heads": 16},
    "large": {"width": 1_280, "feed_forward_width": 5_120, "layers": 36, "heads": 20},
    "xl": {"width": 1_600, "feed_forward_width": 6_400, "layers": 48, "heads": 25},
    "2.7b": {"width": 2_560, "feed_forward_width": 10_240, "layers": 32, "heads": 32},
}
"""Shapes by name; `tiny` is not in CS336's table and fits any laptop."""

PARTS = ("forward", "loss", "backward", "optimizer", "step")


@BENCHMARKS.register("model")
def bench_model(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every part of a step of every size at every sequence length."""
    asked = settings.model
    on_gpu = bench.device.type == "cuda"
    sizes = asked.sizes or (tuple(name for name in SIZES if name != "tiny") if on_gpu else ("tiny",))
    rows: list[Row] = []
    for size in sizes:
        for length in asked.seq or ((512,) if on_gpu else (64,)):
            rows += _bench_size(size, length, asked, settings.seed, bench)
    return rows


def model_config(size: str, length: int, asked: ModelBench) -> ModelConfig:
    """Return the model of a size of the table, for sequences of ``length`` tokens."""
    return ModelConfig(vocab_size=asked.vocab_size, context_length=length, attention=asked.attention, **SIZES[size])


def _bench_size(size: str, length: int, asked: ModelBench, seed: int, bench: Bench) -> list[Row]:
    config = model_config(size, length, asked)
    attention, _ = resolve_attention(config.attention, bench.device.type, bench.dtype, config.head_dim)
    modes = ("eager", "compiled") if asked.compile else ("eager",)
    results: dict[str, dict[str, Measurement]] = {mode: {} for mode in modes}
    for part, result in _measure(f"model {size} T={length:,}", config, asked.batch, modes, seed, bench).items():
        mode, _, name = part.partition(" ")
        results[mode][name] = result
    tokens, peak = asked.batch * length, peak_flops(bench.device)
    rows = []
    for mode in modes:
        for part, result in results[mode].items():
            seconds = result.timing.median if result.timing else None
            achieved = flops_per_token(config) * tokens / seconds if seconds and part == "step" else None
            rows.append(
                {
                    "size": size,
                    "params_M": parameter_count(config) / 1e6,
                    "seq": length,
                    "batch": asked.batch,
                    "dtype": str(bench.dtype).removeprefix("torch."),
                    "attention": attention,
                    "mode": mode,
                    "part": part,
                    "tokens_per_second": tokens / seconds if seconds else None,
                    "tflops": achieved / 1e12 if achieved else None,
                    "mfu": achieved / peak if achieved and peak else None,
                    **(result.row(results["eager"][part], "eager") if asked.compile else result.row()),
                }
            )
    return rows


def _measure(
    label: str, config: ModelConfig, batch: int, modes: tuple[str, ...], seed: int, bench: Bench
) -> dict[str, Measurement]:
    """Return the measurement of each part, named `<mode> <part>`."""
    names = [f"{mode} {part}" for mode in modes for part in PARTS]
    cost = estimate(TrainConfig(model=config, batch_size=batch), bench.device, bench.dtype)
    refusal = memory_refusal(cost.weight_bytes + cost.activation_bytes, bench.device)
    if refusal is not None:
        return {name: Measurement(status="out of memory", note=refusal) for name in names}
    memory = PeakMemory(bench.device)
    memory.start()
    try:
        training = _Training(config, batch, seed, bench)
        training.step(training.loss)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        results = {name: Measurement(status="out of memory", note="the first step does not fit") for name in names}
    else:
        peak_bytes = memory.peak_bytes()
        results = bench.measure(label, [part for mode in modes for part in training.candidates(mode)])
        for name in names:
            if name.endswith(" step"):
                results[name] = replace(results[name], peak_bytes=peak_bytes if name.startswith("eager") else None)
    release_memory(bench.device)
    return results


class _Training:
    """A model in training, of which each part can be called alone."""

    def __init__(self, config: ModelConfig, batch: int, seed: int, bench: Bench) -> None:
        self.bench = bench
        torch.manual_seed(seed)
        with bench.device:  # drawn where they stay: 2.7 billion weights take a CPU minutes
            self.model = Transformer(config)
            tokens = torch.randint(config.vocab_size, (batch, config.context_length + 1))
        self.tokens_BT, self.targets_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.weights = list(self.model.parameters())
        self.optimizer = AdamW(self.weights)
        self.losses: list[Tensor] = []

    def candidates(self, mode: str) -> list[Candidate]:
        """Return every part, as written or compiled by torch.compile."""
        compiled: Callable[..., Any] = torch.compile if mode == "compiled" else lambda function: function
        hidden, loss, whole = compiled(self.hidden), compiled(self.head_loss), compiled(self.loss)

        def prepare_loss() -> None:
            self._forget()
            self.hidden_BTC = self.hidden(self.tokens_BT).detach().requires_grad_()

        def prepare_backward() -> None:
            self._forget()
            self.losses.append(whole(self.tokens_BT, self.targets_BT))

        runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "forward": (lambda: hidden(self.tokens_BT), self._forget),
            "loss": (lambda: loss(self.hidden_BTC, self.targets_BT), prepare_loss),
            "backward": (lambda: self.losses.pop().backward(), prepare_backward),
            "optimizer": (self._update, self._invent_gradients),
            "step": (lambda: self.step(whole), self._forget),
        }
        return [Candidate(f"{mode} {part}", *runs[part]) for part in PARTS]

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        with precision(self.bench.device, self.bench.dtype):
            return self.model.hidden(tokens_BT)

    def head_loss(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        with precision(self.bench.device, self.bench.dtype):
            return next_token_loss(hidden_BTC, self.model.head_weight, targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.head_loss(self.hidden(tokens_BT), targets_BT)

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        train_step(loss, self.weights, [self.optimizer], self.tokens_BT, self.targets_BT, passes=1, clip=1.0)

    def _update(self) -> None:
        clip_gradients(self.weights, 1.0)
        self.optimizer.step()

    def _forget(self) -> None:
        """Drop what other parts leave, so that each begins with the same memory."""
        self.losses.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _invent_gradients(self) -> None:
        self.losses.clear()
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.full_like(weight, 1e-3)

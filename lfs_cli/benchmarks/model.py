"""A training step by its parts, for the sizes of CS336's table, in several precisions, as written, compiled, replayed.

What the parts and precisions are is told in `model_step.py`. All variants of a size take turns, and every ratio is to
the first of them. The peak memory of `step` counts everything from the weights on; that of a part counts what the part
adds. The MFU is always the share of the bfloat16 peak.

One further step of each size, length and precision is profiled when that is asked for: the table `kernels` has its time
by module, phase and kernel, the table `memory` what lay in memory over its time (`model_trace.py`), and a folder for
profiles receives the trace itself.

Source: Stanford CS336 2025, assignment 2, table 1, for the sizes small to 2.7b; batch 4 and vocabulary 10,000 as there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lfs_cli.benchmarks.machine import free_bytes
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
from lfs_cli.benchmarks.model_profile import profile_step
from lfs_cli.benchmarks.model_step import PARTS, UPDATES, Training, Variant, candidate_name
from lfs_cli.benchmarks.model_trace import sees_gpu, thinned
from lfs_cli.config import BenchConfig, ModelBench, ModelConfig, TrainConfig
from lfs_cli.errors import ConfigError, DeviceError
from lfs_cli.kernels.operation import no_hopper_reason
from lfs_cli.model import resolve_attention
from lfs_cli.training.cost import flops_per_token, parameter_count, peak_flops
from lfs_cli.training.memory import predict_memory

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 256, "feed_forward_width": 1_024, "layers": 4, "heads": 4},
    "small": {"width": 768, "feed_forward_width": 3_072, "layers": 12, "heads": 12},
    "medium": {"width": 1_024, "feed_forward_width": 4_096, "layers": 24, "heads": 16},
    "large": {"width": 1_280, "feed_forward_width": 5_120, "layers": 36, "heads": 20},
    "xl": {"width": 1_600, "feed_forward_width": 6_400, "layers": 48, "heads": 25},
    "2.7b": {"width": 2_560, "feed_forward_width": 10_240, "layers": 32, "heads": 32},
    "10b": {"width": 4_096, "feed_forward_width": 16_384, "layers": 36, "heads": 32},
}
"""Shapes by name. Two are not in CS336's table: `tiny` fits any laptop, and `10b` no single GPU of 80 GB."""

RECOMPILES = 64
"""Variants of one function that torch.compile may make; it would run the ninth as written, without a word."""


@BENCHMARKS.register("model")
def bench_model(settings: BenchConfig, bench: Bench) -> list[Row]:
    """Time every part of a step of every size at every sequence length."""
    asked = settings.model
    on_gpu = bench.device.type == "cuda"
    if _is_profiled(asked) and bench.device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"a step cannot be profiled on {bench.device.type}",
            hint="leave out `--kernels`, `--memory`, `--plot` and `--profile`, or add `--device cpu`",
        )
    if asked.graphs and not on_gpu:
        raise DeviceError(
            f"CUDA graphs are for CUDA GPUs, and this is {bench.device.type}", hint="leave out `--graphs`"
        )
    sizes = asked.sizes or (tuple(name for name in SIZES if name not in ("tiny", "10b")) if on_gpu else ("tiny",))
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
    default = str(bench.dtype).removeprefix("torch.")
    modes = [
        mode + launched
        for mode in (("eager", "compiled") if asked.compile else ("eager",))
        for launched in (("", "+graph") if asked.graphs else ("",))
    ]
    variants = [Variant(name, mode) for name in asked.precisions or (default,) for mode in modes]
    shape = {"size": size, "params_M": parameter_count(config) / 1e6, "seq": length, "batch": asked.batch}
    results = _measure(shape, config, variants, asked, seed, bench)
    first, names = variants[0], _names(variants)
    tokens, peak = asked.batch * length, peak_flops(bench.device)
    rows = []
    for variant in variants:
        attention, _ = resolve_attention(config.attention, bench.device.type, variant.dtype, config.head_dim)
        for part in variant.parts(asked.parts or PARTS):
            result, against = results[variant, part], results[first, part]
            seconds = result.timing.median if result.timing else None
            achieved = flops_per_token(config) * tokens / seconds if seconds and part == "step" else None
            rows.append(
                {
                    **shape,
                    "dtype": variant.precision,
                    "attention": attention,
                    "mode": variant.mode,
                    "part": part,
                    "tokens_per_second": tokens / seconds if seconds else None,
                    "tflops": achieved / 1e12 if achieved else None,
                    "mfu": achieved / peak if achieved and peak else None,
                    **(result.row(against, names[first]) if len(variants) > 1 else result.row()),
                }
            )
    return rows


def _names(variants: Sequence[Variant]) -> dict[Variant, str]:
    """Return what tells the variants apart, such as `eager`, `float32` or `float32 eager`."""
    fields = [field for field in ("precision", "mode") if len({getattr(v, field) for v in variants}) > 1]
    return {variant: " ".join(getattr(variant, field) for field in fields) for variant in variants}


def _measure(
    shape: Row, config: ModelConfig, variants: Sequence[Variant], asked: ModelBench, seed: int, bench: Bench
) -> dict[tuple[Variant, str], Measurement]:
    """Return the measurement of each part of each variant, and profile the step when that is asked for."""
    parts, label = asked.parts or PARTS, f"model {shape['size']} T={shape['seq']:,}"
    training = _start(config, asked, seed, bench.device)
    if isinstance(training, str):
        release_memory(bench.device)
        refused = Measurement(status="out of memory", note=training)
        return {(variant, part): refused for variant in variants for part in parts}

    with _compiling_all() if asked.compile else nullcontext():
        groups = [_candidates(training, variant, parts, config, asked.batch, bench) for variant in variants]
        measured = bench.measure(label, [candidate for group in groups for candidate in group])
    for variant in variants:
        if _is_profiled(asked) and variant.mode == "eager" and _unavailable(variant, bench.device) is None:
            _profile(training, variant, label, shape, asked, bench)
    results = {}
    for variant in variants:
        for part in variant.parts(parts):
            result = measured[candidate_name(variant, part)]
            if variant.is_replayed:
                result = replace(result, peak_bytes=None)
            if part == "step" and result.peak_bytes is not None:
                result = replace(result, peak_bytes=result.peak_bytes + training.held_bytes())
            results[variant, part] = result
    del training, groups
    release_memory(bench.device)
    return results


def _start(config: ModelConfig, asked: ModelBench, seed: int, device: torch.device) -> Training | str:
    """Return a model that is ready for the parts asked for, or why it does not fit."""
    parts = set(asked.parts or PARTS)
    has_state = not parts.isdisjoint(UPDATES) or _is_profiled(asked)
    has_gradients = has_state or not parts <= {"inference", "forward"}
    refusal = _refusal(config, device, has_gradients=has_gradients, has_state=has_state)
    if refusal is not None:
        return refusal
    try:
        training = Training(config, asked.batch, seed, device)
        if has_state:
            training.start_optimizer()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return training
    return "the weights and what belongs to them do not fit"


@contextmanager
def _compiling_all() -> Iterator[None]:
    """Let every variant be compiled, and forget that after: for another size it is of no use, and holds memory."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        try:
            yield
        finally:
            torch._dynamo.reset()


def _candidates(
    training: Training, variant: Variant, parts: Sequence[str], config: ModelConfig, batch: int, bench: Bench
) -> list[Candidate]:
    """Return the parts of a variant, compiled beforehand: neither time nor memory of that is counted."""
    asked = TrainConfig(model=config, batch_size=batch, compile=variant.is_compiled)
    is_hopper = no_hopper_reason(bench.device) is None
    held = predict_memory(asked, bench.device.type, variant.dtype, is_hopper=is_hopper)
    candidates = training.candidates(variant, parts, held.step)
    reason = _unavailable(variant, bench.device)
    if reason is not None:
        return [replace(candidate, unavailable=reason) for candidate in candidates]
    if variant.is_compiled:
        bench.on_note(f"compiling for {variant.precision}{', to be replayed' if variant.is_replayed else ''}")
        for candidate in candidates:
            if memory_refusal(candidate.needs_bytes, bench.device) is None:
                _compile(candidate, bench.device)
    return candidates


def _compile(candidate: Candidate, device: torch.device) -> None:
    try:
        candidate.prepare()
        candidate.run()
        candidate.finish()
    except Exception as error:
        if not (is_out_of_memory(error) or candidate.may_fail):
            raise
    else:
        return
    release_memory(device)  # what does not fit, or fails, is told when it is measured


def _unavailable(variant: Variant, device: torch.device) -> str | None:
    """Return why a variant cannot run on ``device``, or None."""
    if variant.precision != "tf32":
        return None
    if device.type != "cuda":
        return f"tf32 is for CUDA GPUs, and this is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no tf32"
    return None


def _refusal(config: ModelConfig, device: torch.device, *, has_gradients: bool, has_state: bool) -> str | None:
    """Return why a size need not be tried, or None. On a GPU only what is certain: asking for more does no harm."""
    needs = 4 * parameter_count(config) * (1 + has_gradients + 2 * has_state)
    if device.type != "cuda":
        return memory_refusal(needs, device)
    free = free_bytes(device)
    if free is None or needs <= free:
        return None
    what = "weights, gradients and optimizer" if has_state else "weights and gradients" if has_gradients else "weights"
    return f"{what} need {needs / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"


def _is_profiled(asked: ModelBench) -> bool:
    return asked.kernels or asked.memory or asked.plot is not None or asked.profile is not None


def _profile(training: Training, variant: Variant, label: str, shape: Row, asked: ModelBench, bench: Bench) -> None:
    """Run one step under the profiler and hand over what was asked for."""
    stem = f"{label} {variant.precision}" if len(asked.precisions) > 1 else label
    keep = Path(asked.profile) / stem.replace(" ", "-").replace(",", "") if asked.profile else None
    try:
        seen = profile_step(training, variant, keep)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        bench.on_note(f"{stem}: no memory for the profiled step")
        return
    for file in seen.files:
        bench.on_note(f"wrote {file}")
    about = {**shape, "dtype": variant.precision}
    if asked.kernels and bench.device.type == "cuda" and not sees_gpu(seen.events):
        bench.on_note(f"{stem}: no kernels were seen, as another profiler has the GPU; `kernels` has the host's times")
    if asked.kernels:
        bench.on_table("kernels", [{**about, **row} for row in seen.kernels])
    if asked.memory or asked.plot is not None:
        bench.on_table("memory", [{**about, **row} for row in thinned(seen.memory)])

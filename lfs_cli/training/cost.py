"""What a model costs before it runs: parameters, FLOPs, bytes; and what the hardware could do: peak rates, MFU.

Matrix products dominate, so a token costs 2 FLOPs for each weight that multiplies it on the way forward and 4 on the
way back, and causal attention 2 x 2 x (context / 2) x width a layer forward and twice that backward:

    flops per token = 6 * (weights in matrix products) + 6 * layers * context * width

The input embedding is a lookup and counts only where it is also the head.

Source: Kaplan et al., "Scaling Laws for Neural Language Models", 2020 (arXiv:2001.08361), section 2.1; the attention
term with the causal half as in Karpathy's nanoGPT, `estimate_mfu`, halved.
"""

import os
import time
from dataclasses import dataclass

import torch

from lfs_cli.config import ModelConfig, TrainConfig

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOP/s by a part of the GPU's name, from the vendors' data sheets; the first match counts."""

EXPECTED_MFU = 0.3
"""Share of the peak rate that an estimate before a run assumes."""

EXPECTED_SHARE = 0.3
"""The same of the rate measured where the peak is not known. The quickstart reached 0.31 of it on two CPU cores."""


@dataclass(frozen=True)
class Cost:
    """What one training run will take, known from its config alone.

    Args:
        parameters: All weights.
        flops_per_token: FLOPs of forward and backward for one token.
        total_tokens: Tokens of the whole run.
        weight_bytes: Weights, gradients and optimizer state.
        activation_bytes: What forward keeps for backward, for one microbatch; an upper estimate.
        seconds: Estimated time of all steps, or None when the device's rate is not known.
    """

    parameters: int
    flops_per_token: int
    total_tokens: int
    weight_bytes: int
    activation_bytes: int
    seconds: float | None


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights of a model of this shape, without building it."""
    C, F, V, L = config.width, config.feed_forward_width, config.vocab_size, config.layers
    KV = config.kv_heads * config.head_dim
    attention = 2 * C * C + 2 * C * KV
    feed_forward = (3 if config.feed_forward == "swiglu" else 2) * C * F
    norms = 2 * C if config.norm == "rms_norm" else 0
    qk_norms = 2 * config.head_dim if config.qk_norm else 0
    final_norm = C if config.norm == "rms_norm" else 0
    embeddings = V * C * (1 if config.tied_head else 2)
    return L * (attention + feed_forward + norms + qk_norms) + final_norm + embeddings


def flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward for one token (the formula of this module)."""
    lookup = 0 if config.tied_head else config.vocab_size * config.width
    weights = parameter_count(config) - lookup
    return 6 * weights + 6 * config.layers * config.context_length * config.width


def peak_flops(device: torch.device) -> float | None:
    """Return the peak bfloat16 FLOP/s of a GPU that `PEAK_FLOPS` knows, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if part in name), None)


def estimate(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Cost:
    """Return what the run of ``config`` will take on ``device``.

    The memory of activations is counted from the tensors that forward keeps: per token and layer about 12 rows of the
    residual stream and 4 of the hidden layer, the scores of standard attention, and the logits in float32.
    """
    model = config.model
    parameters = parameter_count(model)
    flops = flops_per_token(model)
    state = max(_STATE_FLOATS.get(group.name, 2) for group in config.optimizer)
    element = 2 if dtype == torch.bfloat16 else 4
    rows = config.passes_size * model.context_length
    per_layer = 12 * model.width + 4 * model.feed_forward_width
    if model.attention in ("standard", "reference") or (model.attention == "auto" and device.type != "cuda"):
        per_layer += 3 * model.heads * model.context_length
    rate = peak_flops(device)
    achieved = rate * EXPECTED_MFU if rate else EXPECTED_SHARE * _measure_rate(device)
    return Cost(
        parameters=parameters,
        flops_per_token=flops,
        total_tokens=config.total_tokens,
        weight_bytes=4 * parameters * (2 + state),
        activation_bytes=rows * (model.layers * per_layer * element + 2 * 4 * min(model.vocab_size, 32_768)),
        seconds=config.total_tokens * flops / achieved,
    )


_STATE_FLOATS = {"adamw": 2, "muon": 1, "sgd": 1}
"""Floats that an optimizer keeps for each weight."""


def _measure_rate(device: torch.device, width: int = 512) -> float:
    """Return the FLOP/s of float32 matrix products on ``device``, measured for a tenth of a second."""
    left, right = torch.randn(2, width, width, device=device)
    left @ right
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        (left @ right)[0, 0].item()
        products += 1
    return products * 2 * width**3 / (time.perf_counter() - started)


def memory_bytes(device: torch.device) -> int:
    """Return the peak bytes used so far: of the GPU's allocator, or of this process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """Return the largest resident set of this process so far, or 0 where the system does not tell (Windows)."""
    if os.name != "posix":
        return 0
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """Return the name of the hardware that ``device`` stands for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"

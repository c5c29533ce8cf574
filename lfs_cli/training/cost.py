"""What a model costs before it runs: parameters, FLOPs, bytes; and what the hardware could do: peak rates, MFU.

Matrix products dominate, so a token costs 2 FLOPs for each weight that multiplies it on the way forward and 4 on the
way back, and causal attention 2 x 2 x (context / 2) x width a layer forward and twice that backward:

    flops per token = 6 * (weights in matrix products) + 6 * layers * context * width

A layer with a window of w sees fewer positions: w - w^2 / (2 context) in the mean, in place of context / 2.
Embeddings are lookups and count only where one is also the head.

Source: Kaplan et al., "Scaling Laws for Neural Language Models", 2020 (arXiv:2001.08361), section 2.1; the attention
term with the causal half as in Karpathy's nanoGPT, `estimate_mfu`, halved.
"""

import os

import torch

from lfs_cli.config import ModelConfig
from lfs_cli.training.gpus import known_gpu


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights of a model of this shape, without building it."""
    C, F, V, L = config.width, config.feed_forward_width, config.vocab_size, config.layers
    KV = config.kv_heads * config.head_dim
    attention = 2 * C * C + 2 * C * KV
    feed_forward = (3 if config.feed_forward == "swiglu" else 2) * C * F
    norm = C if config.norm == "rms_norm" else 0
    qk_norms = 2 * config.head_dim if config.qk_norm else 0
    mixes = 2 * L * config.embedding_skip + 2 * 2 * config.value_embeddings
    outer_norms = norm * (2 if config.embedding_norm else 1)
    embeddings = V * C * (1 if config.tied_head else 2) + config.value_embeddings * V * KV
    return L * (attention + feed_forward + 2 * norm + qk_norms) + mixes + outer_norms + embeddings


def flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward for one token (the formula of this module)."""
    looked_up = config.value_embeddings * config.kv_heads * config.head_dim
    looked_up += 0 if config.tied_head else config.width
    weights = parameter_count(config) - config.vocab_size * looked_up
    T, windows = (
        config.context_length,
        [config.layer_window(layer) or config.context_length for layer in range(config.layers)],
    )
    positions_seen = sum(window - window**2 / (2 * T) for window in windows)
    return round(6 * weights + 12 * positions_seen * config.width)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak bfloat16 FLOP/s of a GPU that `gpus.py` knows, else None."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops if gpu else None


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

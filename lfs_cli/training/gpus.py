"""GPUs by name: what their makers say of them, for estimates of runs on hardware that need not be here."""

from dataclasses import dataclass

from lfs_cli.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Args:
        name: Short name.
        flops: FLOP/s of matrix products in bfloat16 with sums in float32, without sparsity.
        memory_bytes: All of its memory.
        bandwidth: Bytes/s that it reads and writes.
    """

    name: str
    flops: float
    memory_bytes: int
    bandwidth: float


def _gpu(name: str, teraflops: float, gibibytes: int, gigabytes_per_second: float) -> GPU:
    return GPU(name, teraflops * 1e12, gibibytes * 2**30, gigabytes_per_second * 1e9)


GPUS = (
    _gpu("B200", 2250, 180, 8000),
    _gpu("H200", 989, 140, 4800),
    _gpu("H100 PCIe", 756, 80, 2000),
    _gpu("H100 NVL", 835, 94, 3900),
    _gpu("H100", 989, 80, 3350),
    _gpu("A100 40GB", 312, 40, 1555),
    _gpu("A100", 312, 80, 2039),
    _gpu("A10G", 70, 24, 600),
    _gpu("L40S", 362, 48, 864),
    _gpu("L4", 121, 24, 300),
    _gpu("RTX 5090", 209, 32, 1792),
    _gpu("RTX 4090", 165, 24, 1008),
    _gpu("RTX 3090", 71, 24, 936),
)
"""From the makers' data sheets; H100 and A100 alone are the SXM modules, the latter of 80 GB. Of two names
that begin alike the longer one comes first."""


def gpu_called(name: str) -> GPU:
    """Return the GPU that ``name`` stands for, such as `h100` or `NVIDIA H100 80GB HBM3`.

    Raises:
        ConfigError: When no known one is called so.
    """
    found = known_gpu(name)
    if found is None:
        raise ConfigError(f"unknown GPU `{name}`", hint=did_you_mean(name.upper(), [gpu.name for gpu in GPUS]))
    return found


def known_gpu(name: str) -> GPU | None:
    """Return the first GPU all of whose words are in ``name``, such as what CUDA calls it, or None."""
    given = name.lower().replace("-", " ").replace("_", " ").split()
    return next((gpu for gpu in GPUS if set(gpu.name.lower().split()) <= set(given)), None)

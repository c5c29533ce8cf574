"""What a run would take, before there is one: `lfs train --dry-run`, here or on a GPU that is not here."""

from dataclasses import dataclass

import torch

from lfs_cli.benchmarks.machine import free_bytes
from lfs_cli.config import TrainConfig
from lfs_cli.errors import ConfigError
from lfs_cli.kernels.operation import no_hopper_reason
from lfs_cli.model.device import choose_compile
from lfs_cli.runs.microbatch import USED_SHARE
from lfs_cli.runs.plugins import import_plugins
from lfs_cli.runs.setup import resolve
from lfs_cli.training.cost import device_name, flops_per_token, parameter_count
from lfs_cli.training.gpus import GPU, gpu_called, known_gpu
from lfs_cli.training.graphs import check_graphs
from lfs_cli.training.memory import MemoryPrediction, largest_microbatch, predict_memory
from lfs_cli.training.pace import measured_step_seconds
from lfs_cli.training.roofline import is_hopper, step_seconds

BASES = {
    "roofline": "from its data sheet and what was measured of an H100; not of known precision",
    "measured": "from passes of one and two layers, measured now",
}
"""What the time of a plan is made from, in words."""


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        device: Name of the hardware.
        parameters: Weights of the model.
        flops_per_token: FLOPs of forward and backward for one token.
        steps: Steps of the run: those of the config, or as many as its time has room for.
        tokens: Tokens of all of them.
        microbatch: Sequences in a pass.
        memory: Bytes that a step holds.
        room: Bytes that there are for it, None where that is not known.
        largest_microbatch: Most sequences in a pass that fit, None where not even one does; known where it was asked
            for, or where the microbatch of the config does not fit.
        step_seconds: Time of a step.
        basis: What that is made from: a key of `BASES`.
    """

    device: str
    parameters: int
    flops_per_token: int
    steps: int
    tokens: int
    microbatch: int
    memory: MemoryPrediction
    room: int | None
    largest_microbatch: int | None
    step_seconds: float
    basis: str

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return self.steps * self.step_seconds

    @property
    def fits(self) -> bool | None:
        """Whether a step is predicted to fit; None where the room is not known."""
        return None if self.room is None else self.memory.peak <= self.room


def make_plan(config: TrainConfig, gpu_name: str | None = None, text_tokens: int | None = None) -> Plan:
    """Return what the run of ``config`` would take.

    Args:
        config: The experiment.
        gpu_name: GPU that it would run on, such as `H100`, which need not be here; by default the device of the run.
        text_tokens: Tokens of the training text, by which `max_epochs` counts; None where they are not known.

    Raises:
        ConfigError: When no GPU of that name is known, settings do not fit each other, or the run is not one for a GPU.
        DeviceError: When the device cannot do what was asked.
    """
    target = _here(config) if gpu_name is None else _elsewhere(config, gpu_name)
    room = None if target.free is None else round(USED_SHARE[target.kind] * target.free)
    largest = None
    if config.microbatch == "auto" and room is not None:
        largest = largest_microbatch(config, target.kind, target.dtype, room, is_hopper=target.is_hopper)
        config = config.model_copy(update={"microbatch": largest or 1})
    memory = predict_memory(config, target.kind, target.dtype, is_hopper=target.is_hopper)
    if largest is None and room is not None and memory.peak > room:
        largest = largest_microbatch(config, target.kind, target.dtype, room, is_hopper=target.is_hopper)
    if target.gpu is not None:
        seconds = step_seconds(config, target.gpu, target.dtype, is_compiled=target.is_compiled)
    else:
        seconds = measured_step_seconds(config, torch.device(target.kind), target.dtype, target.free)
    limit = config.max_seconds
    steps = config.steps if text_tokens is None else config.steps_for(text_tokens)
    steps = steps if limit is None else min(steps, max(1, round(limit / seconds)))
    return Plan(
        device=target.name,
        parameters=parameter_count(config.model),
        flops_per_token=flops_per_token(config.model),
        steps=steps,
        tokens=steps * config.batch_tokens,
        microbatch=config.passes_size,
        memory=memory,
        room=room,
        largest_microbatch=largest,
        step_seconds=seconds,
        basis="roofline" if target.gpu is not None else "measured",
    )


@dataclass(frozen=True)
class _Target:
    """Where a run would be: `gpu` where that is one with a data sheet, else the device of that kind that is here."""

    name: str
    kind: str
    dtype: torch.dtype
    free: int | None
    is_compiled: bool
    gpu: GPU | None
    is_hopper: bool


def _here(config: TrainConfig) -> _Target:
    device, dtype, _, _ = resolve(config)
    name = device_name(device)
    return _Target(
        name=name,
        kind=device.type,
        dtype=dtype,
        free=free_bytes(device),
        is_compiled=choose_compile(config.compile, device),
        gpu=known_gpu(name) if device.type == "cuda" and dtype == torch.bfloat16 else None,
        is_hopper=no_hopper_reason(device) is None,
    )


def _elsewhere(config: TrainConfig, gpu_name: str) -> _Target:
    gpu = gpu_called(gpu_name)
    import_plugins(config.plugins)
    check_graphs(config, torch.device("cuda"))
    for setting, value, suits in (("device", config.device, "cuda"), ("dtype", config.dtype, "bfloat16")):
        if value not in ("auto", suits):
            raise ConfigError(
                f"`{setting}` is `{value}`, and what is known of the {gpu.name} is for `{suits}`",
                hint=f"add `--set {setting}=auto`, or leave `--on` out",
            )
    return _Target(
        name=gpu.name,
        kind="cuda",
        dtype=torch.bfloat16,
        free=gpu.memory_bytes,
        is_compiled=bool(config.compile),  # `auto` does so on a GPU
        gpu=gpu,
        is_hopper=is_hopper(gpu),
    )

"""How many sequences go through the model at once: what the config says, or as many as fit; fewer once memory ran out.

The number does not change what is computed, only how sums are rounded. So where it is not simply that of the config it
is written down, as a record of metrics.jsonl and in each checkpoint, and a run that goes on takes it from there: with
the same passes it ends where it would have ended, to the bit, however much memory is free by then. The record says what
the config asked for, too; once that is changed, the number is decided anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lfs_cli.benchmarks.machine import free_bytes
from lfs_cli.config import TrainConfig
from lfs_cli.errors import DeviceError
from lfs_cli.kernels.operation import no_hopper_reason
from lfs_cli.model.device import is_out_of_memory
from lfs_cli.runs.progress import Progress
from lfs_cli.runs.recorder import Recorder
from lfs_cli.runs.setup import Setup, resolve
from lfs_cli.training.memory import largest_microbatch

USED_SHARE = {"cuda": 0.9, "mps": 0.7, "cpu": 0.7}
"""Of the free memory, what is planned with. The rest is for libraries, fragments and what the prediction does not see,
and where the system would rather end processes than refuse, for others too."""


def rows_at_once(config: TrainConfig, progress: Progress) -> int:
    """Return how many sequences a pass of the run has now: those written down, else those of the config."""
    return _written(config, progress) or config.passes_size


def decide_microbatch(config: TrainConfig, setup: Setup, recorder: Recorder) -> str:
    """Choose how many sequences go through the model at once, where the config leaves that open and nothing is known.

    Returns:
        The number and why it is that one, in words; empty where the config says it all.
    """
    rows, why = _written(config, recorder.progress), "as before"
    if rows is None and config.microbatch == "auto":
        held = [*setup.model.parameters(), *_state_of(setup)]
        held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in held)
        rows, why = choose_microbatch(config, setup.device, setup.dtype, held=held_bytes)
        recorder.microbatch(rows, why)
    return f"microbatch {rows:,} of {config.batch_size:,} ({why})" if rows else ""


def _written(config: TrainConfig, progress: Progress) -> int | None:
    """Return the number that was written down under this config, if it makes sense: files are damaged at times."""
    rows = progress.microbatch.get("rows")
    is_meant = progress.microbatch.get("asked") == config.microbatch
    is_usable = type(rows) is int and rows > 0 and config.batch_size % rows == 0
    return rows if is_meant and is_usable else None


def choose_microbatch(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, *, held: int = 0
) -> tuple[int, str]:
    """Return the most sequences that can go through the model at once, and why these, in words.

    Args:
        config: The run; its `microbatch` does not count.
        device: Where it will compute, which is asked what is free.
        dtype: Of the matrix products.
        held: Bytes of weights and optimizers that are there already.
    """
    free = free_bytes(device)
    if free is None:
        return config.batch_size, "the system does not tell how much memory is free"
    room, is_hopper = round(held + USED_SHARE[device.type] * free), no_hopper_reason(device) is None
    return fitting_microbatch(config, device.type, dtype, room, is_hopper=is_hopper)


def fitting_microbatch(
    config: TrainConfig, device_type: str, dtype: torch.dtype, room: int, *, is_hopper: bool = False
) -> tuple[int, str]:
    """Do what `choose_microbatch` does for a device that has ``room`` bytes for the training and need not be here."""
    rows = largest_microbatch(config, device_type, dtype, room, is_hopper=is_hopper)
    size = f"{room / 2**30:,.1f} GiB"
    return (1, f"even one may be too many for {size}") if rows is None else (rows, f"the largest that fits in {size}")


def with_microbatch(config: TrainConfig) -> TrainConfig:
    """Return ``config`` with the number that this machine would choose now, for runs that are to be the same."""
    if config.microbatch != "auto":
        return config
    device, dtype, _, _ = resolve(config)
    return config.model_copy(update={"microbatch": choose_microbatch(config, device, dtype)[0]})


@contextmanager
def explained_memory(config: TrainConfig, progress: Progress, device: torch.device) -> Iterator[None]:
    """Turn a refusal of the allocator that could not be helped into an error that names what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the first has torch.OutOfMemoryError, too
        if not is_out_of_memory(error):
            raise
        used = ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB used)"
        rows = rows_at_once(config, progress)
        if rows > 1:  # a pass would have been tried with fewer
            raise DeviceError(
                f"out of memory beside the passes of {rows} x {config.model.context_length} tokens{used}",
                hint="choose a smaller model, or an optimizer that remembers less, such as `lion`",
            ) from None
        raise DeviceError(
            f"out of memory at microbatch 1 x {config.model.context_length} tokens{used}",
            hint="choose a smaller model or a shorter context, or try `--set model.checkpointing=full`",
        ) from None


def _state_of(setup: Setup) -> list[Tensor]:
    states = [state for optimizer in setup.optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]

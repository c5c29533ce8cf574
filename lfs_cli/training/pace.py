"""How long a training step takes on the device that is here: a few passes and updates are done, of a smaller model.

Models of one and of two layers, with all else as in the config, take some sequences forward and back, and their
optimizers move them; each further layer adds what the second one did. Weights are filled with anything: what is
measured is time. It takes some two seconds, and the memory of two layers.

Where even that is too much, the matrix products of a step are counted, and the rate of one product is measured.

Compared with training of five configs on one core of a machine that other work kept busy, 2026-11-25, three times in
turns: of the fastest each, the estimate was off by -10 to +14 %, of the medians by -21 to +31 %.
"""

import statistics
import time
from collections.abc import Callable

import torch

from lfs_cli.config import ModelConfig, TrainConfig
from lfs_cli.optimizers import build_optimizers, clip_scale, step_scaled
from lfs_cli.training.cost import flops_per_token
from lfs_cli.training.memory import predict_memory
from lfs_cli.training.trace import filled_model, run_pass

EXPECTED_SHARE = 0.3
"""Of the rate of matrix products, what a step reaches. The quickstart reached 0.31 of it on two CPU cores."""

PASS_SECONDS = 0.3
"""About what a pass may take that is measured; if need be, of fewer sequences than the run's."""

MOST_SECONDS = 3.0
"""Time of one sequence, and share of the free memory, from which on nothing is tried."""
MOST_MEMORY = 0.25

REPEATS = 5


def measured_step_seconds(config: TrainConfig, device: torch.device, dtype: torch.dtype, free: int | None) -> float:
    """Return the seconds that one step of ``config`` takes on ``device``.

    Args:
        config: The run.
        device: Where.
        dtype: Of the matrix products.
        free: Bytes of memory that are free, None when that is not known.
    """
    rate = EXPECTED_SHARE * product_rate(device)
    few = config.model.model_copy(update={"layers": min(2, config.model.layers)})
    sequence_seconds = flops_per_token(few) * few.context_length / rate
    rows = max(1, min(config.passes_size, int(PASS_SECONDS / sequence_seconds)))
    tried = config.model_copy(update={"model": few, "batch_size": rows, "microbatch": rows})
    needs = predict_memory(tried, device.type, dtype).peak
    if sequence_seconds > MOST_SECONDS or (free is not None and needs > MOST_MEMORY * free):
        return config.batch_tokens * flops_per_token(config.model) / rate
    times = [_times(config, layers, rows, device, dtype) for layers in range(1, few.layers + 1)]
    one_pass, update = (
        first + (config.model.layers - 1) * max(0.0, last - first)
        for first, last in zip(times[0], times[-1], strict=True)
    )
    return one_pass * config.batch_size / rows + update


def _times(
    config: TrainConfig, layers: int, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds of a pass and of an update of a model of so many layers."""
    shape: ModelConfig = config.model.model_copy(update={"layers": layers})
    model = filled_model(shape, lambda size: torch.empty(size, device=device).uniform_(-0.05, 0.05))
    optimizers = build_optimizers(model, config.optimizer)
    weights = list(model.parameters())
    tokens_BT = torch.randint(shape.vocab_size, (rows, shape.context_length), device=device)

    def update() -> None:
        _, scale = clip_scale(weights, 1.0)
        step_scaled(optimizers, scale)

    def one_pass() -> None:
        for weight in weights:
            weight.grad = None
        run_pass(model, tokens_BT, dtype)

    return _median(one_pass, device), _median(update, device)


def _median(work: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.empty(1, device=device).item()  # which waits for all of it
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first one warmed up


def product_rate(device: torch.device, width: int = 512) -> float:
    """Return the FLOP/s of float32 matrix products on ``device``, measured for a tenth of a second."""
    left, right = torch.randn(2, width, width, device=device)
    left @ right
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        (left @ right)[0, 0].item()
        products += 1
    return products * 2 * width**3 / (time.perf_counter() - started)

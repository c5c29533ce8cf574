"""Schedules: the learning rate as a share of its peak, as a pure function of the step.

`step` counts the steps done before, from 0 to `steps - 1`. The first step is one step up the curve and not at its foot,
where the rate is 0; the last one is at its end. It need not be whole: a run that is bounded by time asks for the place
on the curve that its time has reached. Every curve rises from 0 in a straight line over the first `warmup * steps`
steps and then has its own shape:

    cosine      half a wave down to `final` at the last step
    linear      straight down to `final` at the last step
    wsd         stays at 1 (warm-up, stable, decay), and goes down to `final` over the last fifth of the steps
    constant    stays at 1; `final` has no part in it

`wsd` has options for how long its last part is and which shape it has. With x from 0 to 1 over that part:

    linear      1 - x
    sqrt        1 - sqrt(x)          falls at once, and spends most of its time at low rates
    cosine      (1 + cos(pi x)) / 2

Sources: Loshchilov & Hutter, "SGDR", 2017 (arXiv:1608.03983), eq. 5, for the cosine.
         Hu et al., "MiniCPM", 2024 (arXiv:2404.06395), section 4, for warm-up, stable, decay.
         Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024
         (arXiv:2405.18392), sections 3 and 4, for its fifth and for 1 - sqrt.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import cos, pi, sqrt
from typing import Any, Protocol

from lfs_cli.errors import ConfigError
from lfs_cli.registry import Registry

DECAYS = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - sqrt(x),
    "cosine": lambda x: (1 + cos(pi * x)) / 2,
}
"""What is left of the peak at a share x of the way down."""


class Schedule(Protocol):
    """Say which share of its peak rate a step uses.

    Args:
        step: Steps done before, from 0; need not be whole. Beyond ``steps - 1`` the last value stays.
        steps: Steps of the whole run.
        warmup: Share of ``steps`` over which the rate rises from 0 to its peak.
        final: Share of the peak that is left at the last step.

    A schedule may have further arguments, by name: they are `schedule.options` in a config.

    Returns:
        A factor from 0 to 1.
    """

    def __call__(self, step: float, *, steps: int, warmup: float, final: float, **options: Any) -> float: ...


class ScheduleSettings(Protocol):
    """What a config says of its schedule, as `lfs_cli.config.ScheduleConfig` does."""

    @property
    def name(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def warmup_steps(self) -> int | None: ...
    @property
    def final(self) -> float: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


SCHEDULES: Registry[Schedule] = Registry("schedule", room="lfs_cli.optimizers")


def build_schedule(settings: ScheduleSettings, steps: int) -> Callable[[float], float]:
    """Return the schedule of a run of ``steps`` steps, as a function of the steps done before.

    Raises:
        ConfigError: When no schedule has that name, or it cannot use an option.
    """
    warmup = settings.warmup if settings.warmup_steps is None else min(1.0, settings.warmup_steps / steps)
    schedule = partial(
        SCHEDULES.get(settings.name), steps=steps, warmup=warmup, final=settings.final, **settings.options
    )
    try:
        schedule(0)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"schedule `{settings.name}` cannot use its settings: {error}", hint="change `schedule.options`"
        ) from None
    return schedule


@SCHEDULES.register("cosine")
def cosine(step: float, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, then follow half a cosine wave down to ``final``."""
    return cosine_schedule(step + 1, 1.0, final, warmup * steps, steps)


@SCHEDULES.register("linear")
def linear(step: float, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, then go straight down to ``final``."""
    return min(_rise(step + 1, warmup * steps), _fall(step + 1, warmup * steps, steps, final))


@SCHEDULES.register("wsd")
def wsd(step: float, *, steps: int, warmup: float, final: float, decay: float = 0.2, shape: str = "linear") -> float:
    """Warm up, stay at the peak, and go down to ``final`` over the last part.

    Args:
        step: Steps done before.
        steps: Steps of the whole run.
        warmup: Share of them over which the rate rises.
        final: Share of the peak that is left at the end.
        decay: Share of the steps over which the rate falls; what the warm-up leaves of it.
        shape: Of the fall: one of `DECAYS`.

    Raises:
        ValueError: When ``shape`` is none of them, or ``decay`` no share.
    """
    if shape not in DECAYS:
        raise ValueError(f"`shape` must be {', '.join(f'`{name}`' for name in DECAYS)}, and is `{shape}`")
    if not 0 <= decay <= 1:
        raise ValueError(f"`decay` must be from 0 to 1, and is {decay}")
    begin = max(warmup, 1 - decay) * steps
    return min(_rise(step + 1, warmup * steps), _fall(step + 1, begin, steps, final, shape))


@SCHEDULES.register("constant")
def constant(step: float, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, then stay at the peak whatever ``final`` says."""
    return _rise(step + 1, warmup * steps)


def cosine_schedule(step: float, max_lr: float, min_lr: float, warmup_steps: float, cosine_steps: float) -> float:
    """Return the learning rate of CS336's cosine schedule with warm-up.

    step < warmup_steps     max_lr step / warmup_steps
    step <= cosine_steps    min_lr + (1 + cos(pi (step - warmup_steps) / (cosine_steps - warmup_steps))) / 2
                            (max_lr - min_lr)
    later                   min_lr

    Args:
        step: Number of the update.
        max_lr: Rate at the end of the warm-up.
        min_lr: Rate from ``cosine_steps`` on.
        warmup_steps: Step at which the warm-up ends.
        cosine_steps: Step at which the cosine ends; counted from the start, warm-up included.
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if step >= cosine_steps:
        return min_lr if cosine_steps > warmup_steps else max_lr
    progress = (step - warmup_steps) / (cosine_steps - warmup_steps)
    return min_lr + (1 + cos(pi * progress)) / 2 * (max_lr - min_lr)


def _rise(step: float, end: float) -> float:
    return min(1.0, step / end) if end else 1.0


def _fall(step: float, begin: float, end: float, final: float, shape: str = "linear") -> float:
    """Go from 1 at ``begin`` to ``final`` at ``end``."""
    if begin >= end:
        return 1.0
    done = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return final + (1 - final) * DECAYS[shape](done)

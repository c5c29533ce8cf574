"""Schedules: the learning rate as a share of its peak, as a pure function of the step.

`step` counts the steps done before, from 0 to `steps - 1`. The first step is one step up the curve and not at its foot,
where the rate is 0; the last one is at its end. Every curve rises from 0 in a straight line over the first
`warmup * steps` steps and then has its own shape:

    cosine      half a wave down to `final` at the last step
    linear      straight down to `final` at the last step
    trapezoid   stays at 1, and goes straight down to `final` over the last fifth of the steps
    constant    stays at 1; `final` has no part in it

Sources: Loshchilov & Hutter, "SGDR", 2017 (arXiv:1608.03983), eq. 5, for the cosine.
         Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024
         (arXiv:2405.18392), section 4, for the trapezoid and its fifth.
"""

from math import cos, pi
from typing import Protocol

from lfs_cli.registry import Registry

COOLDOWN = 0.2


class Schedule(Protocol):
    """Say which share of its peak rate a step uses.

    Args:
        step: Steps done before, from 0. Beyond ``steps - 1`` the last value stays.
        steps: Steps of the whole run.
        warmup: Share of ``steps`` over which the rate rises from 0 to its peak.
        final: Share of the peak that is left at the last step.

    Returns:
        A factor from 0 to 1.
    """

    def __call__(self, step: int, *, steps: int, warmup: float, final: float) -> float: ...


SCHEDULES: Registry[Schedule] = Registry("schedule", room="lfs_cli.optimizers")


@SCHEDULES.register("cosine")
def cosine(step: int, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, then follow half a cosine wave down to ``final``."""
    return cosine_schedule(step + 1, 1.0, final, warmup * steps, steps)


@SCHEDULES.register("linear")
def linear(step: int, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, then go straight down to ``final``."""
    return min(_rise(step + 1, warmup * steps), _fall(step + 1, warmup * steps, steps, final))


@SCHEDULES.register("trapezoid")
def trapezoid(step: int, *, steps: int, warmup: float, final: float) -> float:
    """Warm up, stay at the peak, and go straight down to ``final`` over the last fifth."""
    begin = max(warmup, 1 - COOLDOWN) * steps
    return min(_rise(step + 1, warmup * steps), _fall(step + 1, begin, steps, final))


@SCHEDULES.register("constant")
def constant(step: int, *, steps: int, warmup: float, final: float) -> float:
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


def _fall(step: float, begin: float, end: float, final: float) -> float:
    """Go from 1 at ``begin`` to ``final`` at ``end`` in a straight line."""
    if begin >= end:
        return 1.0
    left = min(1.0, max(0.0, (end - step) / (end - begin)))
    return final + (1 - final) * left

"""How far a run is, when it is bounded by steps, by time, or by both: whichever ends first.

A schedule is a function of the step out of all steps. Where time bounds the run, the step that it is given is the share
of the time that will have passed when the step is done, times all steps. So the learning rate reaches its last value
with the last step that fits, however fast the machine is. What compiling takes is left out of that share: it would use
up the warm-up, which protects the first steps. On the clock the rates, and so the weights, are no longer a function of
the config alone.
"""

from dataclasses import dataclass
from statistics import median


@dataclass
class Budget:
    """What a run may take.

    Args:
        steps: Most steps.
        seconds: Most seconds of training; None for no limit.
    """

    steps: int
    seconds: float | None = None

    def is_spent(self, step: int, seconds: float, recent: list[float]) -> bool:
        """Whether the run ends after ``step``.

        Args:
            step: Steps done.
            seconds: Seconds of training that they took.
            recent: Seconds of each of the last steps, first ones of a start left out: they may compile the model.
        """
        if step >= self.steps or self.seconds is None:
            return step >= self.steps
        # One more step starts only if more than half of it fits: the end is then on time to half a step.
        return seconds + _typical(recent) / 2 >= self.seconds

    def position(self, step: int, seconds: float, recent: list[float], lost: float = 0.0) -> float:
        """Return where on the schedule the step after ``step`` is, from 0 to ``steps`` - 1.

        Args:
            step: As `is_spent` has it, like the next two.
            seconds: Seconds of training.
            recent: Seconds of each of the last steps.
            lost: Those of ``seconds`` in which the schedule stood still, as `lost_seconds` finds them.
        """
        if self.seconds is None:
            return step
        end = seconds + _typical(recent)
        is_last = self.is_spent(step + 1, end, recent)
        share = 1.0 if is_last else (end - lost) / (self.seconds - lost)
        return max(step, self.steps * share - 1)


def lost_seconds(firsts: int, seconds: float, recent: list[float]) -> float:
    """Return by how much longer than other steps those were that compiled the model.

    Args:
        firsts: First steps of the starts of a run.
        seconds: What they took together.
        recent: Seconds of each of the last steps, first ones left out.
    """
    return max(0.0, seconds - firsts * _typical(recent))


def _typical(recent: list[float]) -> float:
    return median(recent) if recent else 0.0

"""A budget of time ends a run when it is spent, with the schedule at its last value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfs_cli.optimizers import SCHEDULES
from lfs_cli.training.budget import Budget, lost_seconds


def run(budget: Budget, seconds_of: list[float]) -> tuple[list[float], float]:
    """Return the positions of all steps of a run whose steps take ``seconds_of`` in turn, and when it ended."""
    positions, laps = [], []
    while not budget.is_spent(step := len(laps), sum(laps), recent := laps[1:][-20:]):
        lost = lost_seconds(len(laps[:1]), sum(laps[:1]), recent)
        positions.append(budget.position(step, sum(laps), recent, lost))
        laps.append(seconds_of[step % len(seconds_of)])
    return positions, sum(laps)


def test_without_a_limit_of_time_positions_are_steps() -> None:
    assert run(Budget(5), [1.0])[0] == [0, 1, 2, 3, 4]


@given(st.floats(0.01, 3.0), st.integers(20, 10_000_000))
def test_the_run_ends_on_time_at_the_end_of_the_schedule(seconds: float, steps: int) -> None:
    positions, end = run(Budget(steps, 60.0), [seconds])
    assert len(positions) == steps or abs(end - 60.0) <= seconds / 2 + 1e-6
    assert positions[-1] == steps - 1
    assert positions == sorted(positions)
    assert all(0 <= position <= steps - 1 for position in positions)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_run_on_the_clock_has_the_curve_of_one_that_counts(name: str) -> None:
    schedule, settings = SCHEDULES.get(name), {"warmup": 0.1, "final": 0.05}
    counted = [schedule(step, steps=60, **settings) for step in range(60)]
    positions, _ = run(Budget(1_000_000, 60.0), [1.0])
    timed = [schedule(position, steps=1_000_000, **settings) for position in positions]
    assert timed[2:] == pytest.approx(counted[2:], abs=1e-4)  # the first two do not know yet how long one takes


def test_whichever_ends_first_counts() -> None:
    assert len(run(Budget(10, 60.0), [1.0])[0]) == 10
    assert len(run(Budget(100, 60.0), [1.0])[0]) == 60


def test_a_first_step_that_compiles_does_not_end_the_run_early() -> None:
    positions, end = run(Budget(1_000_000, 60.0), [30.0, *[1.0] * 1000])
    assert len(positions) == 31
    assert end == 60.0
    # and the schedule goes on as that of a run of 31 steps does
    assert positions == pytest.approx(run(Budget(1_000_000, 31.0), [1.0])[0], rel=0.05, abs=2)


def test_a_step_longer_than_the_budget_is_the_only_one() -> None:
    assert run(Budget(10, 5.0), [60.0]) == ([0], 60.0)

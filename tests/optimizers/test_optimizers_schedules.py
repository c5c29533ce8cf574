"""Schedules: where they start and end, that they never jump, and CS336's cosine to the last digit."""

from itertools import pairwise
from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfs_cli.config import ScheduleConfig, TrainConfig
from lfs_cli.errors import ConfigError
from lfs_cli.optimizers import SCHEDULES, build_schedule, cosine_schedule

shares = st.floats(0, 1)
ENDS_AT_ITS_PEAK = {"constant"}


def curve(name: str, steps: int, warmup: float, final: float) -> list[float]:
    schedule = SCHEDULES.get(name)
    return [schedule(step, steps=steps, warmup=warmup, final=final) for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES.names())
@given(steps=st.integers(1, 60), warmup=shares, final=shares)
def test_every_schedule_stays_between_nothing_and_its_peak(name, steps, warmup, final) -> None:
    factors = curve(name, steps, warmup, final)

    assert all(0 < factor <= 1 for factor in factors) or final == 0
    assert all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_rises_in_a_straight_line_to_its_peak(name) -> None:
    factors = curve(name, 100, 0.1, 0.2)

    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert max(factors) == 1


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule_ends_as_it_says_and_stays_there(name) -> None:
    end = 1.0 if name in ENDS_AT_ITS_PEAK else 0.2
    schedule = SCHEDULES.get(name)

    for step in (99, 100, 1000):
        assert schedule(step, steps=100, warmup=0.1, final=0.2) == pytest.approx(end)


@pytest.mark.parametrize("name", SCHEDULES.names())
@given(warmup=st.floats(0.02, 0.9), final=shares)
def test_no_schedule_jumps_or_rises_after_the_warm_up(name, warmup, final) -> None:
    factors = curve(name, 1000, warmup, final)
    changes = [later - earlier for earlier, later in pairwise(factors)]

    steepest = max(1 / (1000 * warmup), pi / 2 / (1000 * (1 - warmup)), 1 / 200)
    assert max(map(abs, changes)) <= steepest + 1e-9
    assert all(change <= 1e-12 for change in changes[int(1000 * warmup) + 1 :])


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (1.0, 1), (0.0, 10), (1.0, 10), (0.02, 3)])
def test_extreme_settings_work(name, warmup, steps) -> None:
    factors = curve(name, steps, warmup, 0.0)

    assert len(factors) == steps
    if warmup == 1:
        assert factors[-1] == 1


def test_the_shapes_in_the_middle() -> None:
    middle = {name: curve(name, 100, 0.0, 0.0)[49] for name in SCHEDULES.names()}

    assert middle == pytest.approx({"cosine": 0.5, "linear": 0.5, "wsd": 1.0, "constant": 1.0})
    assert curve("wsd", 100, 0.0, 0.0)[89] == pytest.approx(0.5)
    assert curve("cosine", 100, 0.0, 0.0)[24] == pytest.approx((1 + cos(pi / 4)) / 2)


def test_cs336s_cosine_schedule() -> None:
    settings = {"max_lr": 1.0, "min_lr": 0.1, "warmup_steps": 7, "cosine_steps": 21}

    rates = [cosine_schedule(step, **settings) for step in range(25)]

    assert rates[:8] == pytest.approx([step / 7 for step in range(8)])
    assert rates[14] == pytest.approx(0.55)
    assert rates[7:22] == pytest.approx([0.1 + 0.45 * (1 + cos(pi * step / 14)) for step in range(15)])
    assert rates[21:] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(
    ("shape", "half_way"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5), ("cosine", 0.5)], ids=["linear", "sqrt", "cosine"]
)
def test_the_decay_of_wsd_has_the_length_and_shape_that_are_asked_for(shape: str, half_way: float) -> None:
    schedule = SCHEDULES.get("wsd")
    asked = {"steps": 100, "warmup": 0.1, "final": 0.2, "decay": 0.4, "shape": shape}

    assert schedule(59, **asked) == 1
    assert schedule(60, **asked) < 1
    assert schedule(79, **asked) == pytest.approx(0.2 + 0.8 * half_way)
    assert schedule(99, **asked) == pytest.approx(0.2)


@pytest.mark.parametrize("name", SCHEDULES.names())
@given(step=st.floats(0, 98), warmup=st.floats(0.02, 0.9), final=shares)
def test_between_two_steps_a_schedule_is_between_their_values(name, step, warmup, final) -> None:
    schedule = SCHEDULES.get(name)
    asked = {"steps": 100, "warmup": warmup, "final": final}

    inside = sorted((schedule(int(step), **asked), schedule(int(step) + 1, **asked)))
    peak = 1.0 if int(step) + 1 < 100 * warmup <= int(step) + 2 else 0.0  # the curve turns between the two
    turn = 1.0 if int(step) + 1 <= 100 * max(warmup, 0.8) <= int(step) + 2 else 0.0
    assert inside[0] - 1e-12 <= schedule(step, **asked) <= max(inside[1], peak, turn) + 1e-12


def test_a_config_builds_its_schedule() -> None:
    schedule = build_schedule(ScheduleConfig(name="wsd", warmup_steps=5, final=0.0, options={"decay": 0.5}), 20)

    assert [schedule(step) for step in (0, 4, 9, 14, 19)] == pytest.approx([0.2, 1.0, 1.0, 0.5, 0.0])
    assert build_schedule(ScheduleConfig(warmup_steps=50), 20)(19) == 1  # still rising when the run ends


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "wsd", "options": {"shape": "square"}},
            "`shape` must be `linear`, `sqrt`, `cosine`, and is `square`",
        ),
        ({"name": "wsd", "options": {"decay": 2}}, "`decay` must be from 0 to 1, and is 2"),
        ({"name": "wsd", "options": {"decay": "half"}}, "schedule `wsd` cannot use its settings"),
        ({"name": "cosin"}, "unknown schedule `cosin`"),
    ],
    ids=str,
)
def test_a_mistake_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(ScheduleConfig(**settings), 10)


def test_an_unknown_option_is_refused_before_torch_is_needed() -> None:
    with pytest.raises(ConfigError, match="schedule `cosine` has no option `decay`"):
        TrainConfig(schedule=ScheduleConfig(options={"decay": 0.5}))

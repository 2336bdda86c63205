"""When to save and when to stop, with the clock passed in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.output.units import parse_duration, parse_moment
from keepstep.policy.schedule import (
    Moment,
    Schedule,
    best_interval,
    high,
    lost_minutes,
    needed,
    next_save,
    saves_at,
)

MEASURED = Moment(now=1000, last_save=900, save_seconds=[4, 5, 6], step_seconds=[1, 2])


def test_nothing_to_do() -> None:
    assert next_save(Schedule(), MEASURED) is None
    assert next_save(Schedule(interval=101, deadline=2000), MEASURED) is None


@pytest.mark.parametrize(
    ("step", "planned", "strategy", "save_steps", "expected"),
    [
        (12, 12, "steps", 5, True),  # the last one
        (10, 12, "steps", 5, True),  # stopped early
        (9, 12, "steps", 5, False),
        (12, 6, "steps", 5, True),  # fewer are planned now
        (6, 12, "steps", 0.25, True),
        (5, 12, "steps", 0.25, False),
        (12, 12, "epoch", 5, True),
        (10, 12, "epoch", 5, False),
        (12, 12, "no", 4, False),
        (12, 12, "best", 4, False),
    ],
)
def test_which_last_steps_are_saved(
    step: int, planned: int, strategy: str, save_steps: float, expected: bool
) -> None:
    assert saves_at(step, planned, strategy, save_steps) is expected


def test_interval_and_requests() -> None:
    assert next_save(Schedule(interval=100), MEASURED) == "interval"
    asked = replace(MEASURED, requests=("save-now",))
    assert next_save(Schedule(), asked) == "save-now"
    assert next_save(Schedule(interval=1), replace(asked, requests=("stop", "save-now"))) == "stop"


def test_the_deadline_leaves_time_for_a_step_and_the_save() -> None:
    schedule = Schedule(deadline=1018, margin=10)
    assert needed(schedule, MEASURED) == 2 + 6 + 10
    assert next_save(schedule, MEASURED) == "deadline"
    assert next_save(replace(schedule, deadline=1018.1), MEASURED) is None
    # A save in flight has to arrive first.
    busy = replace(MEASURED, in_flight=True)
    assert next_save(replace(schedule, deadline=1024), busy) == "deadline"
    # Nothing has been measured: a minute.
    new = Moment(now=1000, last_save=1000)
    assert next_save(Schedule(deadline=1090), new) == "deadline"
    assert next_save(Schedule(deadline=1091), new) is None


@given(
    steps=st.lists(st.floats(0.01, 50), min_size=30, max_size=300),
    save=st.floats(0.1, 100),
    limit=st.floats(100, 2000),
)
def test_a_run_ends_before_its_deadline(steps: list[float], save: float, limit: float) -> None:
    """If the margin covers the longest step; but for the first step, of which nothing is known."""
    schedule = Schedule(deadline=limit, margin=max(steps))
    for made in range(1, len(steps) + 1):
        now = sum(steps[:made])
        if next_save(schedule, Moment(now, 0.0, [save], steps[:made])) == "deadline":
            assert made == 1 or now + save <= limit
            return
        assert now + save < limit


def test_the_95th_percentile() -> None:
    assert high([]) == 0
    assert high([3]) == 3
    assert high(range(1, 101)) == 95
    assert high([1, 2, 3, 100]) == 100


def test_the_interval_that_loses_least() -> None:
    cheap = best_interval(1, 24 * 3600)
    assert cheap == pytest.approx(math.sqrt(2 * 24 * 3600), rel=0.01)

    def lost(interval: float) -> float:
        """Expected seconds per second of work, when failures come by chance."""
        cost, mtbf = 100.0, 3600.0
        return mtbf * (math.exp((interval + cost) / mtbf) - 1) / interval

    best = best_interval(100, 3600)
    assert lost(best) <= min(lost(best * 0.9), lost(best * 1.1))
    assert best_interval(8000, 3600) == 3600


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90), ("1.5", 1.5), ("45m", 2700), ("3h30m", 12600), ("1d2s", 86402)),
        *(("3:30:00", 12600), ("1-02:00:01", 93601)),
    ],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3 h", "h", "-5", "4w", "3:30", "3:3:30"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no length of time"):
        parse_duration(text)


def test_moments() -> None:
    assert parse_moment("2026-11-25T08:00:00+00:00") == 1795593600
    with pytest.raises(ValueError, match="is no moment"):
        parse_moment("tomorrow")


def test_what_a_failure_loses() -> None:
    assert lost_minutes(100, None, [6.0] * 9) is None, "too few steps to tell"
    assert lost_minutes(100, None, [6.0] * 10) == 10
    assert lost_minutes(100, 120.0, [6.0] * 10) == 2
    assert lost_minutes(math.inf, 120.0, [6.0] * 10) == 2
    assert lost_minutes(100, None, [600.0] * 5 + [6.0] * 20) == 10, "the first steps are slow"

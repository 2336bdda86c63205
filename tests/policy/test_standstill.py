"""How long a run may stand still, learnt from itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.standstill import ENOUGH, LAST, TOLD, Phase, Standstills

LEAST, MOST = 60.0, 1800.0
SECONDS = st.floats(0, 10_000)
LEARNT = sorted(ENOUGH)
ROUNDING = 1e-6


def after(phase: Phase, seconds: Sequence[float], least: float = LEAST) -> Standstills:
    """One step (evaluation, …) for each of these numbers, with that standstill in it."""
    standstills, now = Standstills(least, MOST), 0.0
    standstills.got_on(now)
    for number in seconds:
        standstills.got_on(now, phase)
        now += number
        standstills.got_on(now)
        standstills.got_on(now, "write")
    return standstills


def bound(phase: Phase, seconds: Sequence[float]) -> float:
    return after(phase, seconds).bound([phase]).seconds


@pytest.mark.parametrize("phase", LEARNT)
def test_before_there_are_enough_nothing_is_learnt(phase: Phase) -> None:
    standstills = after(phase, [1.0] * (ENOUGH[phase] - 1))
    assert standstills.bound([phase]).seconds == MOST
    assert not standstills.bound([phase]).is_learnt
    assert after(phase, [1.0] * ENOUGH[phase]).bound([phase]).is_learnt


def test_ten_times_the_usual() -> None:
    assert bound("step", [1.0] * 100) == 60
    assert bound("step", [30.0] * 100) == 300
    assert bound("step", [300.0] * 100) == MOST
    assert bound("save", [1.0] * 100) == 300, "it makes folders: a disk may pause"
    assert bound("evaluation", [7.0, 8.0, 9.0, 8.0, 7.0]) == 90


def test_one_outlier_may_come_again_and_decides_nothing_else() -> None:
    """A compiler, a loader that looks for its next file."""
    usual = [1.0] * (LAST - 1)
    assert bound("step", [25.0, *usual]) == 60
    assert bound("step", [90.0, *usual]) == 180, "not 900"
    assert bound("step", [90.0, *usual, *usual]) == 180, "for as long as the attempt goes on"


def test_what_comes_now_and_then_is_usual() -> None:
    """Three of two hundred."""
    assert bound("step", [*[1.0] * 197, 20.0, 20.0, 20.0]) == 200


@pytest.mark.parametrize("phase", ["write", "end"])
def test_what_the_disk_and_the_end_take_is_never_learnt(phase: Phase) -> None:
    standstills, now = Standstills(LEAST, MOST), 0.0
    for _ in range(500):
        standstills.got_on(now, "write")
        now += 1
        standstills.got_on(now, "step")
    standstills.got_on(now, phase)
    assert standstills.bound([phase]).seconds == MOST


def test_the_longest_of_what_ranks_are_at() -> None:
    standstills = after("step", [1.0] * 50)
    assert standstills.bound(["step"]).seconds == 60
    assert standstills.bound(["step", "evaluation"]).seconds == MOST
    assert standstills.bound(["step", "evaluation"]).phase == "evaluation"


def test_a_step_is_as_slow_as_its_slowest_part() -> None:
    """256 quick micro-batches and an optimizer step on the host: not one in a hundred."""
    standstills, now = Standstills(LEAST, MOST), 0.0
    for _ in range(60):
        standstills.got_on(now, "step")
        for seconds in (*[0.5] * 256, 40.0):
            now += seconds
            standstills.got_on(now)
    standstills.got_on(now, "step")
    assert standstills.bound(["step"]).seconds == 400


def test_what_is_under_way_counts_as_soon_as_it_is_over() -> None:
    standstills = after("step", [1.0] * 50)
    now = 1000.0
    standstills.got_on(now, "step")
    standstills.got_on(now + 55)
    assert standstills.bound(["step"]).seconds == 110


def test_an_evaluation_goes_on_from_batch_to_batch() -> None:
    """Each batch says that it belongs to one: it is one all the same."""
    standstills = Standstills(LEAST, MOST)
    for batch in range(100):
        standstills.got_on(float(batch), "evaluation")
    standstills.got_on(100.0, "step")
    assert not standstills.bound(["evaluation"]).is_learnt


def test_nothing_follows_the_end() -> None:
    """Its saves are tried again, and waited for."""
    standstills = after("save", [1.0] * 50)
    standstills.got_on(5000.0, "end")
    standstills.got_on(5001.0, "save")
    assert standstills.phase == "end"
    assert standstills.bound([standstills.phase]).seconds == MOST


def test_a_process_that_was_stopped_has_not_stood_still() -> None:
    standstills = after("step", [1.0] * 50)
    standstills.got_on(100.0, "step")
    standstills.forget()
    standstills.got_on(9000.0)
    assert standstills.bound(["step"]).seconds == 60


def test_what_has_ended_an_attempt_is_given_longer_until_it_is_passed() -> None:
    standstills = after("step", [1.0] * 50)
    standstills.suspect = 137
    for step, seconds in ((0, MOST), (137, MOST), (138, 60)):
        standstills.step = step
        assert standstills.bound(["step"]).seconds == seconds


def test_it_says_what_it_was_measured_by() -> None:
    standstills = after("step", [0.8] * 300)
    told = "in a step, where none of the last 200 stood still for longer than 0.8 s"
    assert standstills.told("step", standstills.bound(["step"])) == told
    other = "in an evaluation (another rank was in a step, where none of the last 200 stood still"
    assert standstills.told("evaluation", standstills.bound(["step"])).startswith(other)
    for phase, where in TOLD.items():
        assert standstills.told(phase, standstills.bound(["end"])) == where


@given(st.sampled_from(LEARNT), st.lists(SECONDS, max_size=60), st.floats(1, 4000))
def test_it_lies_between_the_least_and_the_most(
    phase: Phase, seconds: list[float], least: float
) -> None:
    found = after(phase, seconds, least).bound([phase])
    assert min(least, MOST) <= found.seconds <= MOST
    assert found.is_learnt == (found.seconds < MOST)


@given(st.sampled_from(LEARNT), st.lists(st.tuples(SECONDS, st.floats(0, 100)), min_size=50))
def test_slower_steps_never_shorten_it(phase: Phase, seconds: list[tuple[float, float]]) -> None:
    before = bound(phase, [number for number, _ in seconds])
    assert bound(phase, [sum(both) for both in seconds]) >= before - ROUNDING


@given(st.sampled_from(LEARNT), st.lists(st.floats(0, 800), max_size=60))
def test_what_was_seen_once_may_come_again(phase: Phase, seconds: list[float]) -> None:
    assert bound(phase, seconds) >= 2 * max(seconds, default=0) - ROUNDING


@given(st.floats(0, 5), SECONDS, st.integers(0, LAST))
def test_one_outlier_raises_it_to_twice_itself_at_most(
    usual: float, outlier: float, where: int
) -> None:
    seconds = [usual] * LAST
    with_it = [*seconds[:where], outlier, *seconds[where:]]
    assert bound("step", with_it) <= max(bound("step", seconds), 2 * outlier) + ROUNDING

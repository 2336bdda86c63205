"""When copies begin, and which failures are told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.mirror_pace import LONGEST_WAIT, Pace, is_due


def test_a_store_that_fails_for_a_day_and_comes_back() -> None:
    """Sooner at first, then every half an hour; seven lines; the first time is known."""
    pace, now, told, tries = Pace(), 1000.0, 0, 0
    while now < 1000.0 + 24 * 3600:
        pace = pace.begun(now).failed(now + 5)
        tries, told = tries + 1, told + pace.is_told
        assert now + 35 <= pace.not_before <= now + 5 + LONGEST_WAIT
        now = pace.not_before
    assert (tries, told, pace.since) == (53, 6, 1005.0)
    assert pace.done().failures == 0
    assert pace.done().failed(now).not_before == now + 30


@given(st.floats(0, 1e4), st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=40))
def test_never_sooner_than_the_pause(pause: float, copies: list[tuple[bool, float]]) -> None:
    pace, now = Pace(pause), 0.0
    for is_there, took in copies:
        began, now = now, now + took
        pace = pace.begun(began)
        pace = pace.done() if is_there else pace.failed(now)
        assert pace.not_before >= began + pause
        assert is_there or pace.not_before > now
        now = max(now, pace.not_before)


@given(st.integers(1, 6), st.sets(st.integers(1, 100)), st.data())
def test_every_nth_save(every: int, steps: set[int], data: st.DataObject) -> None:
    """If every one that is due is copied, n - 1 lie between two; what is due stays due."""
    saved: list[int] = []
    copied: list[int] = []
    for step in sorted(steps):
        saved.append(step)
        if is_due(saved, copied, every):
            assert is_due([*saved, step + 1], copied, every), "a copy that failed"
            copied.append(step)
    assert copied == sorted(steps)[::every]
    if copied:
        assert not is_due(saved, [*copied, saved[-1]], every), "as the best, in between"

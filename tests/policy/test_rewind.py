"""Which rows are left out, and when a run goes back no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.rewind import Rewind, decided_since, left_out, why_not

BATCH = Batch(3, 2, 2)


def rewind(attempt: int, *rows: int, of: int = 64, dataset: str = "d") -> Rewind:
    return Rewind(attempt, 9, 8, "the loss is not finite (nan) in step 9", rows, of, dataset)


def test_what_the_checkpoint_does_not_know_is_added() -> None:
    """Wherever a run goes back to: what was decided since that was saved counts as well."""
    rewinds = [rewind(1, 3), rewind(2, 5, 6), rewind(4, 9)]
    assert decided_since(rewinds, None) == tuple(rewinds)
    assert decided_since(rewinds, 2) == tuple(rewinds[1:])
    assert decided_since(rewinds, 5) == ()
    before = Dealt(BATCH, BATCH, 64, skipped=(3,))
    assert left_out(before, rewinds[1:], 64, "d", True) == {3, 5, 6, 9}
    assert left_out(None, rewinds, 64, "d", False) == {3, 5, 6, 9}


def test_of_other_data_they_mean_nothing() -> None:
    before = Dealt(BATCH, BATCH, 64, skipped=(3,))
    assert left_out(before, [rewind(2, 5)], 64, "mended", False) == set()
    assert left_out(before, [rewind(2, 5)], 60, "d", True) == set()
    assert left_out(None, [rewind(2, 5, 70, -1)], 64, "d", True) == {5}


@given(
    rewinds=st.lists(st.builds(rewind, st.integers(1, 9), st.integers(0, 63)), max_size=6),
    attempt=st.integers(1, 9),
)
def test_a_row_that_was_left_out_stays_out(rewinds: list[Rewind], attempt: int) -> None:
    """Whichever checkpoint a later attempt starts with, however many it has passed by."""
    known = [r for r in rewinds if r.attempt < attempt]
    skipped = tuple(sorted(left_out(None, known, 64, "d", True)))
    before = Dealt(BATCH, BATCH, 64, skipped=skipped)
    since = decided_since(rewinds, attempt)
    assert left_out(before, since, 64, "d", True) == {row for r in rewinds for row in r.rows}


def test_when_it_goes_back_no_more() -> None:
    assert why_not([], 3, [5], 64) is None
    assert why_not([], 0, [5], 64) == "max_rewinds: 0"
    told = why_not([rewind(1, 3), rewind(2, 5, 6)], 2, [9], 64)
    assert told is not None
    first, then, last = told.splitlines()
    assert first == "max_rewinds: 2 were tried:"
    assert then.strip() == (
        "from step 9 to checkpoint-8, without row 3 (the loss is not finite (nan) in step 9)"
    )
    assert "without rows 5, 6" in last
    assert "no row to leave out" in str(why_not([rewind(1, 3)], 3, [], 63))
    assert "no row would be left" in str(why_not([], 3, [0, 1, 2], 3))

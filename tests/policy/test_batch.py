"""The rows of a step, on any number of processes; the position in the data, counted in rows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.batch import Batch, BatchError, Course, Dealt, agree
from keepstep.policy.strict import TextError

ASKED = Batch(4, 1, 2)
small = st.integers(1, 6)
batches = st.builds(Batch, small, small, small)


def dealt(batch: Batch, asked: Batch | None = None) -> Dealt:
    return Dealt(batch, asked or batch, 100)


@given(asked=batches, world_size=st.integers(1, 8))
def test_the_rows_a_step_stay(asked: Batch, world_size: int) -> None:
    relaunched = replace(asked, world_size=world_size)
    if asked.rows % world_size:
        with pytest.raises(BatchError):
            agree(dealt(asked), relaunched)
        changed = agree(dealt(asked), relaunched, allow_change=True)
        assert abs(changed.rows - asked.rows) < world_size
        assert changed.per_device <= asked.per_device
        return
    batch = agree(dealt(asked), relaunched)
    assert batch.rows == asked.rows
    assert batch.world_size == world_size
    assert batch.per_device <= asked.per_device
    if asked.rows % (asked.per_device * world_size) == 0:
        assert batch.per_device == asked.per_device
    # The next attempt, on as many processes, by the same recipe; and back.
    assert agree(dealt(batch, asked), relaunched) == batch
    assert agree(dealt(batch, asked), asked) == asked


def test_a_changed_recipe_is_left_to_the_drift_check() -> None:
    assert agree(dealt(ASKED), Batch(8, 1, 2)) == Batch(8, 1, 2)
    # With fewer processes it may change as it likes: the rows stay.
    assert agree(dealt(ASKED), Batch(2, 1, 1)) == Batch(2, 4, 1)
    assert agree(dealt(ASKED), Batch(8, 1, 1)) == Batch(8, 1, 1)
    assert agree(None, Batch(5, 1, 3)) == Batch(5, 1, 3)


def test_the_error_lists_what_works() -> None:
    with pytest.raises(BatchError, match="8 rows cannot be shared out evenly among 3 processes"):
        agree(dealt(ASKED), Batch(4, 1, 3))
    with pytest.raises(BatchError, match="launch 1, 2, 4 or 8 processes; or accept 9 rows a step"):
        agree(dealt(ASKED), Batch(4, 1, 3))


def test_dealt_is_read_back() -> None:
    before = Dealt(ASKED, Batch(8, 1, 1), None)
    assert Dealt.from_json(before.as_json()) == before
    assert Dealt.from_json({}) is None
    assert "skipped" not in before.as_json(), "an older version reads it"
    without = Dealt(ASKED, ASKED, 100, skipped=(3, 99))
    assert Dealt.from_json(json.loads(json.dumps(without.as_json()))) == without
    for rows, skipped in ((100, (100,)), (100, (-1, 3)), (None, (3,))):
        with pytest.raises(TextError, match="rows that are none"):
            Dealt.from_json(Dealt(ASKED, ASKED, rows, skipped=skipped).as_json())


def rows_of(course: Course, step: int, shift: int, batch: Batch) -> list[int]:
    """Of all ranks together, in the order of a sampler that deals micro-batches in turn."""
    shares = [course.share(step, shift, batch, rank) for rank in range(batch.world_size)]
    return [row for turn in zip(*shares, strict=True) for cell in turn for row in cell]


@given(rows=st.integers(1, 80), batch=batches, drop_last=st.booleans())
def test_every_row_once_per_epoch(rows: int, batch: Batch, drop_last: bool) -> None:
    course = Course(rows, batch.rows, drop_last)
    drawn = [
        row for step in range(course.steps_per_epoch) for row in rows_of(course, step, 0, batch)
    ]
    assert drawn == list(range(len(drawn)))
    if drop_last and rows >= batch.rows:
        assert rows - len(drawn) == rows % batch.rows
    else:
        assert len(drawn) == rows
    for rank in range(batch.world_size):
        for step in range(course.steps_per_epoch):
            cells = course.share(step, 0, batch, rank)
            assert len(cells) == batch.accumulation
            assert max(map(len, cells)) <= batch.per_device


def test_a_full_step_is_dealt_as_accelerate_does() -> None:
    course = Course(24, 12)
    assert course.share(1, 0, Batch(3, 2, 2), 1) == [range(15, 18), range(21, 24)]
    assert course.share(1, 0, Batch(3, 4, 1), 0) == [range(n, n + 3) for n in (12, 15, 18, 21)]


@given(rows=st.integers(1, 60), batch=batches, step=st.integers(0, 9))
def test_weighted_means_of_micro_batches_are_the_mean_of_a_step(
    rows: int, batch: Batch, step: int
) -> None:
    """However many rows each micro-batch has, on however many processes."""
    course = Course(rows, batch.rows)
    step %= course.steps_per_epoch
    cells = batch.accumulation * batch.world_size
    total, places = 0.0, []
    for rank in range(batch.world_size):
        shares = course.share(step, 0, batch, rank)
        weights = course.weights(step, 0, batch, rank)
        for share, weight in zip(shares, weights, strict=True):
            assert (weight == 0) == (not share)
            total += weight * sum(share) / max(1, len(share)) / cells
            places += share
    assert total == pytest.approx(sum(places) / len(places))
    if len(places) == batch.rows:
        assert weights == [1.0] * batch.accumulation, "a full step's are left as they are"


@given(
    rows=st.integers(1, 60),
    stages=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_any_chain_of_batches_draws_each_row_once(rows: int, stages: list[tuple[int, int]]) -> None:
    """The rows a step may change in mid-epoch, again and again: no row is lost or drawn twice."""
    samples, drawn = 0, []
    for per_step, steps in stages:
        course, batch = Course(rows, per_step), Batch(per_step, 1, 1)
        epoch, done, shift = course.start(samples)
        for step in range(done, done + steps):
            number, step = divmod(step, course.steps_per_epoch)
            places = rows_of(course, step, 0 if number else shift, batch)
            drawn += [(epoch + number) * rows + place for place in places]
        samples = course.after(samples, steps)
        assert samples == len(drawn)
    assert drawn == list(range(len(drawn)))


@given(rows=st.integers(1, 60), per_step=st.integers(1, 70), steps=st.integers(0, 200))
def test_without_a_change_steps_and_rows_agree(rows: int, per_step: int, steps: int) -> None:
    course = Course(rows, per_step)
    samples = course.after(0, steps)
    assert samples == steps // course.steps_per_epoch * rows + min(
        steps % course.steps_per_epoch * per_step, rows
    )
    epoch, done, shift = course.start(samples)
    assert (epoch * course.steps_per_epoch + done, shift) == (steps, 0)

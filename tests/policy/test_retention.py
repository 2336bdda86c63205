"""Retention against a statement of the policy that looks at every subset."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.retention import Policy, Record, best_step, plan_retention, room_for

values = st.one_of(
    st.none(), st.sampled_from([math.nan, math.inf, 1.0, 1.0, 2.0]), st.floats(0, 10)
)
records = st.lists(
    st.builds(Record, step=st.integers(0, 60), value=values), max_size=9, unique_by=lambda r: r.step
)
policies = st.builds(
    Policy,
    limit=st.one_of(st.none(), st.integers(1, 5)),
    ranking=st.sampled_from(["metric", "recency"]),
    metric=st.just("eval_loss"),
    greater_is_better=st.booleans(),
)


def worth(record: Record, policy: Policy) -> tuple[int, float, int]:
    """How much a checkpoint is worth keeping; more is better."""
    finite = record.value is not None and math.isfinite(record.value)
    if policy.ranking == "metric" and finite:
        assert record.value is not None
        value = record.value if policy.greater_is_better else -record.value
        return (1, value, -record.step)
    return (0, record.step, 0)


def brute_force(records: list[Record], policy: Policy) -> set[int]:
    """The subset of the allowed size, with the newest in it, whose members are worth most."""
    if not records:
        return set()
    newest = max(records, key=lambda r: r.step)
    size = min(policy.limit or len(records), len(records))
    allowed = [s for s in combinations(records, size) if newest in s]
    best = max(allowed, key=lambda s: sorted(worth(r, policy) for r in s if r != newest)[::-1])
    return {record.step for record in best}


@given(records, policies)
def test_plan_equals_the_policy(records: list[Record], policy: Policy) -> None:
    plan = plan_retention(records, policy)
    assert [d.step for d in plan] == sorted(r.step for r in records)
    assert {d.step for d in plan if d.keep} == brute_force(records, policy)
    assert all(d.reason for d in plan)


@given(records, policies)
def test_the_newest_is_never_pruned(records: list[Record], policy: Policy) -> None:
    plan = plan_retention(records, policy)
    assert not plan or plan[-1].keep


@given(records, policies)
def test_a_second_pass_prunes_nothing(records: list[Record], policy: Policy) -> None:
    kept = {d.step for d in plan_retention(records, policy) if d.keep}
    again = plan_retention([r for r in records if r.step in kept], policy)
    assert all(d.keep for d in again)


@given(records, policies)
def test_the_best_is_kept_when_two_may_stay(records: list[Record], policy: Policy) -> None:
    best = best_step(records, policy)
    if policy.ranking == "metric" and best is not None and policy.limit != 1:
        assert best in {d.step for d in plan_retention(records, policy) if d.keep}


def test_reasons() -> None:
    losses = {500: 1.9, 1000: 1.2, 1500: 1.1, 2000: 1.3, 2500: 1.4, 3000: 1.5}
    records = [Record(step, loss) for step, loss in losses.items()]
    plan = plan_retention(records, Policy(3, "metric", "eval_loss"))
    assert {d.step: d.reason for d in plan if d.keep} == {
        1000: "best 2 of 6",
        1500: "best",
        3000: "newest",
    }


def test_exactly_the_best_three_when_the_newest_is_among_them() -> None:
    losses = {500: 1.9, 1000: 1.2, 1500: 1.1, 2000: 1.0}
    records = [Record(step, loss) for step, loss in losses.items()]
    plan = plan_retention(records, Policy(3, "metric", "eval_loss"))
    assert {d.step: d.reason for d in plan if d.keep} == {
        1000: "best 3 of 4",
        1500: "best 2 of 4",
        2000: "newest, best",
    }


@given(records, policies, values)
def test_what_goes_for_a_coming_checkpoint_goes_with_its_commit(
    records: list[Record], policy: Policy, value: float | None
) -> None:
    early = {d.step for d in room_for(61, records, policy)}
    plan = plan_retention([*records, Record(61, value)], policy)
    newest = max((r.step for r in records), default=None)
    assert newest not in early
    assert early == {d.step for d in plan if not d.keep} - {newest, 61}


def test_abandoned_branches_make_room() -> None:
    records = [Record(10), Record(20), Record(30, abandoned=True), Record(15, pinned=True)]
    gone = room_for(40, records, Policy(3, "recency"))
    assert [d.step for d in gone] == [10, 30]


anything = st.lists(
    st.builds(
        Record,
        step=st.integers(0, 30),
        value=values,
        bytes=st.integers(0, 10),
        pinned=st.booleans(),
        abandoned=st.booleans(),
    ),
    max_size=9,
    unique_by=lambda r: r.step,
)
bounded = st.builds(
    Policy,
    limit=st.one_of(st.none(), st.integers(1, 4)),
    ranking=st.sampled_from(["metric", "recency"]),
    metric=st.just("eval_loss"),
    every_n_steps=st.one_of(st.none(), st.integers(1, 5)),
    total_bytes=st.one_of(st.none(), st.integers(0, 30)),
)


@given(anything, bounded, st.integers(0, 40), st.booleans(), st.data())
def test_what_a_run_would_carry_on_from_never_goes(
    records: list[Record], policy: Policy, step: int, keep_abandoned: bool, data: st.DataObject
) -> None:
    """The newest, a pin, and what this attempt resumed: of whichever branch, at whichever step."""
    resumed = data.draw(st.sampled_from([None, *(r.step for r in records)]))
    records = [replace(r, grown_from=r.step == resumed) for r in records]
    alive = [r.step for r in records if not r.abandoned]
    newest = max(alive or [r.step for r in records], default=None)
    needed = {r.step for r in records if r.pinned or r.grown_from} | {newest}
    early = {d.step for d in room_for(step, records, policy)}
    assert not needed & early
    planned = {d.step for d in plan_retention(records, policy, keep_abandoned) if not d.keep}
    assert not planned & (needed - {None if alive else newest})


odd_records = st.lists(
    st.builds(
        Record,
        step=st.integers(0, 60),
        value=values,
        bytes=st.integers(1, 9),
        is_finite=st.booleans(),
    ),
    max_size=9,
    unique_by=lambda r: r.step,
)


@given(odd_records, policies, st.none() | st.integers(0, 20))
def test_what_is_not_finite_is_never_the_best_and_never_all_that_is_kept(
    records: list[Record], policy: Policy, budget: int | None
) -> None:
    finite = [r.step for r in records if r.is_finite]
    policy = replace(policy, total_bytes=budget)
    assert best_step(records, policy) in {None, *finite}
    kept = {d.step for d in plan_retention(records, policy) if d.keep}
    gone = {d.step for d in room_for(99, records, policy)}
    if finite:
        assert max(finite) in kept
        assert max(finite) not in gone

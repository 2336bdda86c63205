"""Which machines make an attempt together, and what is next after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.machines import (
    GROWS,
    LEAVES,
    Machine,
    Part,
    Plan,
    Range,
    Rows,
    Verdict,
    after,
    ended_of,
    linked,
    meeting_address,
    pending,
    range_of,
    suspects,
    together,
)
from keepstep.policy.next_step import FAILED, FINISHED, NO_PROGRESS, PREEMPTED, RECIPE, Ended

NAMES = "abcde"


def network(links: Iterable[tuple[str, str]], names: str = NAMES) -> dict[str, Machine]:
    """Machines of which these pairs reach each other."""
    found = {n: Machine(n, n, 2, (f"10.0.0.{i}", "172.17.0.1")) for i, n in enumerate(names)}
    for one, other in links:
        for a, b in ((one, other), (other, one)):
            reaches = {**found[a].reaches, b: found[b].addresses[:1]}
            found[a] = replace(found[a], reaches=reaches)
    return found


def all_of(names: str) -> dict[str, Machine]:
    return network(combinations(names, 2), names)


@pytest.mark.parametrize(("text", "range_"), [("3", Range(3, 3)), ("1:3", Range(1, 3))])
def test_a_range(text: str, range_: Range) -> None:
    assert range_of(text) == range_


@pytest.mark.parametrize("text", ["3:1", "0", "0:2", "x", "1:", ":3", "-1", "1:2:3", "1:9999", ""])
def test_no_range(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither N nor MIN:MAX|no range of machines"):
        range_of(text)


PAIRS = st.sets(st.sampled_from(list(combinations(NAMES, 2))))


@given(PAIRS, st.permutations(NAMES), st.integers(0, 5))
def test_all_of_a_group_reach_each_other(
    links: set[tuple[str, str]], order: list[str], known: int
) -> None:
    there = network(links)
    group = linked(there, order[:known])
    assert len(set(group)) == len(group) >= 1
    for one, other in combinations(group, 2):
        assert other in there[one].reaches
        assert one in there[other].reaches
    address = meeting_address(group, there)
    assert all(address in there[one].reaches[group[0]] for one in group[1:])
    more = [n for n in there if n not in group and all(n in there[m].reaches for m in group)]
    assert not more, "nobody is left out who reaches all"


@given(PAIRS, st.permutations(NAMES))
def test_the_order_stays(links: set[tuple[str, str]], order: list[str]) -> None:
    group = linked(network(links), order)
    assert list(group) == [one for one in order if one in group]


def test_of_two_halves_one_goes_on() -> None:
    halves = network([("a", "b"), ("c", "d")], "abcd")
    assert linked(halves, ("c", "a", "b", "d")) == ("c", "d")
    assert linked(halves, ("a", "b", "c", "d")) == ("a", "b")
    assert linked(network([("b", "c")], "abc"), ("a", "b", "c")) == ("b", "c"), "the larger one"


def test_the_ranks_meet_at_one_address() -> None:
    there = all_of("abc")
    there["b"] = replace(there["b"], reaches={**there["b"].reaches, "a": ("192.168.0.1",)})
    there["a"] = replace(there["a"], addresses=("192.168.0.1", "10.0.0.0"))
    assert linked(there, ("a",)) == ("a", "b"), "two networks, and no address that all reach"
    assert meeting_address(("a", "b"), there) == "192.168.0.1"
    assert meeting_address(("a", "c"), there) == "10.0.0.0"


@pytest.mark.parametrize(
    ("rows", "most", "refused", "count"),
    [
        (Rows(), 5, (), 5),
        (Rows(), 3, (), 3),
        (Rows(8), 5, (), 4),  # 10 processes cannot share out 8 rows
        (Rows(12), 5, (), 3),
        (Rows(7), 5, (), 0),
        (Rows(4, sharing=2), 5, (), 4),  # 4 groups of 2 processes
        (Rows(12), 5, (("c", "b", "a"),), 2),
    ],
)
def test_as_many_as_can_share_out_the_rows(
    rows: Rows, most: int, refused: tuple[tuple[str, ...], ...], count: int
) -> None:
    there, plan = all_of(NAMES), Plan(refusals=refused, proven=tuple("abc"))
    assert together(linked(there), there, most, rows, plan) == tuple(NAMES)[:count]


def test_who_was_refused_waits_and_another_one_is_tried() -> None:
    """A machine with another recipe is not the end of the machines' number."""
    plan = Plan(machines=("a", "b"), proven=("a", "b"), refusals=(("a", "b", "c"),))
    assert suspects(plan) == {"c"}
    three, four = all_of("abc"), all_of("abcd")
    assert together("abc", three, 3, plan=plan) == ("a", "b")
    assert together("abcd", four, 3, plan=plan) == ("a", "b", "d"), "d may be c, mended"
    assert together("abcd", four, 4, plan=plan) == ("a", "b", "d", "c")
    assert together("ac", three, 3, plan=plan) == ("a", "c"), "not refused as these two"


def test_each_has_as_many_processes_as_the_smallest() -> None:
    there = all_of("ab")
    there["b"] = replace(there["b"], processes=1)
    assert together("ab", there, 2, Rows(2)) == ("a", "b")


PLAN = Plan(7, "token", ("a", "b", "c"), fruitless=1, commits=4, proven=("a", "b", "c"))
PROGRESS, NONE = 5, 4


def part(outcome: str = FAILED, code: int = 70, asked: str = "", begun: bool = True) -> Part:
    return Part(7, outcome, f"{outcome} there", code, begun, asked)


def told(outcome: str, code: int = 70, reason: str = "why") -> Ended:
    return Ended(outcome, reason, code, True)


def verdict(
    ended: Ended, group: str = "abc", commits: int = NONE, asked: str = "", **more: object
) -> Verdict:
    there = all_of("abc")
    there["b"] = replace(there["b"], part=part(asked=asked))
    values = {"machines": Range(1, 3), "retries": 2, "stop_requested": False, **more}
    return after(PLAN, ended, there, tuple(group), commits, **values)  # type: ignore[arg-type]


def test_the_end_of_one_is_the_end_of_all() -> None:
    assert verdict(told(FINISHED, 0)).end == 0
    assert verdict(told(FINISHED, 70)).end == 70, "not published"
    assert verdict(told(NO_PROGRESS, 76)).end == 76
    assert verdict(told(RECIPE, 2)).end == 2
    assert verdict(told(PREEMPTED, 75, "keepstep stop")).end == 75
    assert verdict(told(PREEMPTED, 75, "SIGUSR1 to rank 0")).end == 75, "somebody's wish"
    assert verdict(told(PREEMPTED, 75, "the deadline is near")).end == 75
    assert verdict(told(FAILED), stop_requested=True).end == 75


def test_who_leaves_or_is_lost_costs_no_retry() -> None:
    for outcome, group, asked in ((FAILED, "ab", ""), (PREEMPTED, "ab", LEAVES)):
        said = verdict(told(outcome, 75, "SIGTERM to rank 1"), group, asked=asked)
        assert (said.end, said.pause, said.counts.fruitless) == (None, 0, 1)
    said = verdict(told(PREEMPTED, 75, "SIGTERM to rank 0"), "abc", PROGRESS, GROWS)
    assert said.words == "on more machines", "that is what the signal was for"
    assert (said.end, said.pause, said.counts.fruitless) == (None, 0, 0)


def test_a_failure_that_is_the_runs_own_counts() -> None:
    assert verdict(told(FAILED)).counts.fruitless == 2
    assert verdict(told(FAILED)).pause > 0
    assert verdict(told(FAILED), commits=PROGRESS).counts.fruitless == 0
    given_up = verdict(told(FAILED), retries=1)
    assert given_up.end == 76
    assert "2 attempts in a row without a new checkpoint: why" in given_up.words


def test_refused_on_these_machines() -> None:
    others = replace(PLAN, machines=("a", "d"), proven=("a", "b", "c"))

    def refused(plan: Plan, group: str, machines: Range) -> Verdict:
        return after(plan, told(RECIPE, 2), all_of("abcd"), tuple(group), 4, machines, 2, False)

    said = refused(others, "ad", Range(1, 3))
    assert (said.end, said.counts.refusals) == (None, (("a", "d"),))
    assert said.words == "refused on a, d: why"
    came = replace(others, machines=("a", "b", "d"))
    assert refused(came, "abd", Range(1, 3)).end is None, "as many as were not refused"
    assert refused(others, "ad", Range(2, 2)).end == 2
    alone = replace(others, machines=("a",), refusals=(("a", "d"), ("a", "x")))
    assert refused(alone, "ad", Range(1, 3)).end == 2, "alone, too: it is nobody else's recipe"
    assert refused(alone, "abd", Range(1, 3)).counts.refusals == (("a", "d"), ("a",)), "x is gone"


def test_whose_word_counts() -> None:
    there = all_of("abc")
    ended = told(PREEMPTED, 75, "SIGTERM to rank 1 (its launcher is gone)")
    assert ended_of(PLAN, ended, there).outcome == FAILED, "nobody has asked"
    there["b"] = replace(there["b"], part=part(asked=LEAVES))
    assert ended_of(PLAN, ended, there).outcome == PREEMPTED
    assert ended_of(PLAN, told(FINISHED, 0), there).outcome == FINISHED
    assert ended_of(PLAN, None, {}).outcome == FAILED
    assert ended_of(PLAN, None, there) == Ended(FAILED, "failed there", 70, True)
    there["c"] = replace(there["c"], part=part(FINISHED, 0))
    there["b"] = replace(there["b"], part=None)
    assert ended_of(PLAN, None, there).outcome == FAILED, "its main process had more to do"
    there["c"] = replace(there["c"], part=part(RECIPE, 2, begun=False))
    there["a"] = replace(there["a"], part=part(PREEMPTED, 75, begun=False))
    assert ended_of(PLAN, None, there).outcome == RECIPE
    older = replace(PLAN, number=8)
    assert ended_of(older, None, there).outcome == FAILED, "of another attempt"


def test_an_attempt_is_over_when_all_say_so_who_are_there() -> None:
    there = all_of("abc")
    assert pending(PLAN, there) == ["a", "b", "c"]
    ended = {name: replace(one, part=part()) for name, one in there.items()}
    assert pending(PLAN, ended) == []
    assert pending(PLAN, {"a": ended["a"]}) == [], "the others are gone"
    assert pending(replace(PLAN, number=8), ended) == ["a", "b", "c"]
    assert pending(replace(PLAN, end=0), there) == []

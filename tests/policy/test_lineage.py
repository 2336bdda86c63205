from __future__ import annotations

from typing import Any

import pytest

from keepstep.policy.lineage import (
    Attempt,
    Finish,
    Node,
    abandoned_steps,
    fruitless_resumes,
    is_under_way,
    last_finish,
)


def test_one_line_of_attempts_abandons_nothing() -> None:
    nodes = [Node(10, 1, 0), Node(20, 1, 0), Node(30, 2, 20), Node(40, 3, 30)]
    assert abandoned_steps(nodes) == set()


def test_going_back_abandons_what_came_after() -> None:
    first = [Node(10, 1, 0), Node(20, 1, 0), Node(30, 1, 0)]
    assert abandoned_steps([*first, Node(15, 2, 10)]) == {20, 30}
    assert abandoned_steps([*first, Node(40, 2, 30), Node(25, 3, 20)]) == {30, 40}
    assert abandoned_steps([*first, Node(15, 2, 10), Node(5, 3, 0)]) == {10, 15, 20, 30}


def test_what_was_left_behind_stays_so_when_the_branchs_beginning_is_pruned() -> None:
    attempts = [Attempt(1, commits=3), Attempt(2, "10", 10, commits=2), Attempt(3, "auto", 25, 9)]
    left = [Node(30, 1, 0), Node(50, 3, 25), Node(60, 3, 25)]
    assert abandoned_steps(left, attempts) == {30}


def died(number: int, step: int, request: str = "auto", **facts: Any) -> Attempt:
    """It had begun to load the checkpoint of `step`, and left no word."""
    return Attempt(number, request, step, began_training=True, **facts)


def test_fruitless_resumes_are_counted_since_the_last_progress() -> None:
    history = [
        Attempt(1, "auto", 0, commits=2),
        died(2, 20),
        died(3, 20),
        Attempt(4),  # ended before it had chosen
        died(5, 10, outcome="failed", exit=70),
    ]
    assert fruitless_resumes(history) == {20: 2, 10: 1}
    assert fruitless_resumes([*history, died(6, 20, commits=1)]) == {}
    assert fruitless_resumes([*history, died(6, 20, outcome="finished")]) == {}
    assert fruitless_resumes([*history, died(6, 20, finish=Finish(25, 20))]) == {}
    assert fruitless_resumes([*history, died(6, 20, "20")], "20") == {20: 1}


@pytest.mark.parametrize(
    "blameless",
    [
        Attempt(6, "auto", 20),  # killed before it had begun to load it
        Attempt(6, "auto", 20, outcome="failed", exit=70),  # the model could not be built
        died(6, 20, outcome="failed", exit=2),
        died(6, 20, stop_asked=True),  # Ctrl-C twice
        died(6, 20, outcome="failed", exit=70, machine_lost=True),
        died(6, 20, outcome="preempted", exit=75),
        died(6, 20, recipe="another"),
    ],
)
def test_what_a_checkpoint_is_not_blamed_for(blameless: Attempt) -> None:
    history = [Attempt(1, "auto", 0, commits=2), died(2, 20, recipe="this")]
    assert fruitless_resumes([*history, blameless], recipe="this") == {20: 1}


def test_a_finished_run_stays_finished_under_its_plan() -> None:
    plan = {"steps": 12, "patience": 2}
    finish = Finish(9, 6, plan)  # stopped early, and its last steps have no checkpoint
    first = Attempt(1, "auto", 0, commits=2, recipe="this", finish=finish)
    attempts = [first, Attempt(2, "auto", 6), Attempt(3)]
    assert last_finish(attempts, "this") == finish
    assert last_finish(attempts, "another") is None
    assert last_finish(attempts) is None
    assert last_finish([*attempts, Attempt(4, "auto", 6, commits=1)], "this") is None
    ended = Finish(9, 9, plan)  # with a checkpoint, that others are compared with
    assert last_finish([Attempt(1, commits=2, finish=ended)], "another") == ended
    assert ended.holds(plan, saves_it=True)
    assert not finish.holds(plan, saves_it=True)
    assert finish.holds(dict(plan))
    assert not finish.holds(plan | {"patience": 3})
    assert not finish.holds(plan | {"steps": 14})
    assert finish.holds({"steps": 9, "patience": 3})  # fewer steps, and they are made
    assert not Finish(9, 6).holds(plan)  # told by an older version


def test_a_request_is_under_way_once_it_has_committed() -> None:
    assert not is_under_way("best", [])
    assert not is_under_way("best", [Attempt(1, "auto", commits=5)])
    assert not is_under_way("best", [Attempt(1, "auto", commits=5), Attempt(2, "best")])
    begun = [Attempt(1, "auto", commits=5), Attempt(2, "best", 20, commits=1)]
    ended = Attempt(2, "best", 20, finish=Finish(25, 20))  # killed while it published
    assert is_under_way("best", [begun[0], ended])
    assert is_under_way("best", begun)
    assert is_under_way("best", [*begun, Attempt(3, "best", 40)])
    assert not is_under_way("10", begun)
    done = [*begun, Attempt(3, "best", 40, commits=1, outcome="finished")]
    assert not is_under_way("best", done)

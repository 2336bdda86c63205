from __future__ import annotations

from keepstep.checkpoint.lineage import (
    Attempt,
    Node,
    abandoned_steps,
    fruitless_resumes,
    is_under_way,
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


def test_fruitless_resumes_are_counted_since_the_last_progress() -> None:
    history = [
        Attempt(1, "auto", 0, commits=2),
        Attempt(2, "auto", 20),
        Attempt(3, "auto", 20),
        Attempt(4),  # ended before it had chosen
        Attempt(5, "auto", 10),
    ]
    assert fruitless_resumes(history) == {20: 2, 10: 1}
    assert fruitless_resumes([*history, Attempt(6, "auto", 20, commits=1)]) == {}
    assert fruitless_resumes([*history, Attempt(6, "auto", 20, outcome="finished")]) == {}
    assert fruitless_resumes([*history, Attempt(6, "auto", 20, outcome="preempted")])[20] == 3
    assert fruitless_resumes([*history, Attempt(6, "20", 20)], "20") == {20: 1}


def test_a_request_is_under_way_once_it_has_committed() -> None:
    assert not is_under_way("best", [])
    assert not is_under_way("best", [Attempt(1, "auto", commits=5)])
    assert not is_under_way("best", [Attempt(1, "auto", commits=5), Attempt(2, "best")])
    begun = [Attempt(1, "auto", commits=5), Attempt(2, "best", 20, commits=1)]
    assert is_under_way("best", begun)
    assert is_under_way("best", [*begun, Attempt(3, "best", 40)])
    assert not is_under_way("10", begun)
    done = [*begun, Attempt(3, "best", 40, commits=1, outcome="finished")]
    assert not is_under_way("best", done)

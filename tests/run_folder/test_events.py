from __future__ import annotations

import json
from typing import Any

import pytest

from keepstep.policy.lineage import Attempt, Node, abandoned_steps, is_under_way, newest_hang
from keepstep.policy.strict import with_check
from keepstep.run_folder.events import as_asked_now, attempts_of, read_lines


def line(event: str, attempt: int, **facts: object) -> str:
    values = {"time": "2026-11-26T05:00:00.000+00:00", "attempt": attempt, "event": event, **facts}
    return with_check(json.dumps(values))


LINES = [
    line("attempt", 1),
    line("resume", 1, request="auto", step=None),
    *(line("commit", 1, step=step, parent=None, request="auto") for step in (10, 20, 30)),
    line("attempt", 2),
    line("resume", 2, request="auto", step=30),
    line("commit", 2, step=40, parent=30, request="auto"),
    line("attempt", 3),
    line("resume", 3, request="auto", step=40),
    line("commit", 3, step=50, parent=40, request="auto"),
]
# What is left of them: attempt 2's own checkpoint has been pruned.
LEFT = [Node(20, 1, 0), Node(30, 1, 0), Node(50, 3, 40)]


@pytest.mark.parametrize("lost", range(len(LINES)))
def test_one_lost_or_damaged_line_makes_nothing_abandoned(lost: int) -> None:
    for instead in ([], [LINES[lost].replace("2", "3")], [LINES[lost][:20]]):
        events, damaged = read_lines("\n".join([*LINES[:lost], *instead, *LINES[lost + 1 :]]))
        assert damaged == len(instead)
        assert abandoned_steps(LEFT, attempts_of(events, LEFT)) == set()


def test_where_nothing_tells_it_an_attempt_did_not_go_back() -> None:
    """As an older version wrote: its commits name no parent."""
    older = [text for text in LINES if '"resume"' not in text and '"attempt": 2' in text]
    older = [text.replace(', "parent": 30', "").split(', "check"')[0] + "}" for text in older]
    (attempt,) = attempts_of(read_lines("\n".join(older))[0])
    known: dict[str, Any] = {"began": attempt.began, "last": attempt.last}
    assert attempt == Attempt(2, None, 0, 1, begun_at_known=False, **known)
    assert abandoned_steps(LEFT, [attempt]) == set()


def test_a_rewind_is_one_although_its_line_is_lost() -> None:
    back = [line("attempt", 4), line("commit", 4, step=25, parent=20, request="20")]
    attempts = attempts_of(read_lines("\n".join([*LINES, *back]))[0], LEFT)
    assert abandoned_steps([*LEFT, Node(25, 4, 20)], attempts) == {30, 50}
    assert is_under_way("20", attempts)


def test_the_newest_step_at_which_an_attempt_hung() -> None:
    """By a learnt bound. Whichever attempt it was: a later one may not have come so far."""
    assert newest_hang(attempts_of(read_lines("\n".join(LINES))[0])) is None
    hung = [
        line("hang", 1, step=37, phase="step", seconds=60.0),
        line("hang", 2, step=31, phase="evaluation", seconds=90.0),
        line("hang", 3, phase="step"),
    ]
    attempts = attempts_of(read_lines("\n".join([*LINES, *hung]))[0])
    assert [attempt.hang_at for attempt in attempts] == [37, 31, None]
    assert newest_hang(attempts) == 37


def test_what_an_attempt_asked_for_has_more_than_one_name() -> None:
    attempts = [
        Attempt(1, "auto", commits=1),
        Attempt(2, "ab12@500", 500, commits=2, path="../a/checkpoint-500"),
    ]
    for names in (["ab12@500", "else"], ["else", "../a/checkpoint-500"]):
        assert is_under_way(names[0], as_asked_now(attempts, names))
    assert not is_under_way("ab12@600", as_asked_now(attempts, ["ab12@600", "../a/c"]))
    lost = [Attempt(1, "auto", commits=1), Attempt(2, None, 500, commits=2)]
    assert is_under_way("ab12@500", as_asked_now(lost, ["ab12@500", "500"]))
    assert not is_under_way("400", as_asked_now(lost, ["400"]))


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": "1"},
        {"attempt": None},
        {"attempt": -1},
        {"attempt": 10**20},
        {"step": "10"},
        {"step": 1.5},
        {"time": "yesterday"},
        {"time": 5},
        {"event": None},
        {"event": "commit", "stall": "long"},
        {"event": "commit", "metrics": {"eval_loss": "x"}},
        {"event": "resume", "request": 10},
        {"event": "finished", "newest": 3, "plan": {"steps": 3}},
        {"attempt": 10**9 + 1},
    ],
)
def test_a_fact_of_another_kind_damages_its_line_alone(change: dict[str, object]) -> None:
    values = json.loads(line("resume", 1, step=3, request="auto")) | change
    del values["check"]
    events, damaged = read_lines("\n".join([LINES[0], json.dumps(values), LINES[1]]))
    assert (len(events), damaged) == (2, 1)


def test_an_attempt_that_saves_all_the_time() -> None:
    """(In a way that goes over all saves at each, this test would take minutes.)"""
    facts = {"parent": None, "request": "auto", "spent": {"step": 1.0}}
    event = {"time": "2026-11-26T05:00:00.000+00:00", "attempt": 1, "event": "commit", **facts}
    (attempt,) = attempts_of({**event, "step": step} for step in range(30_000))
    assert (attempt.commits, len(attempt.spent)) == (30_000, 30_000)


def test_a_jobs_own_lines_are_for_people() -> None:
    job = (
        '{"time": "2026-11-26T05:00:00.000+00:00", "event": "launch", "owner": "7.0.1", "exit": 0}'
    )
    published = line("publish", 1, step=10, commit="ab12", outcome="published")
    events, damaged = read_lines("\n".join([job, published, ""]))
    assert ([e["event"] for e in events], damaged) == (["publish"], 0)

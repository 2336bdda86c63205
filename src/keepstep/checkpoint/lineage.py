"""Which checkpoint each attempt grew from, and which branch is alive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any


@dataclass(frozen=True)
class Node:
    """A committed checkpoint in the tree: its step, the attempt that wrote it, and the step that
    attempt began at (0: the beginning of the run)."""

    step: int
    attempt: int
    parent: int


@dataclass(frozen=True)
class Attempt:
    """One launch of the run, as the events tell it.

    Attributes:
        number: counted from 1.
        request: its `resume_from_checkpoint`; None: it ended before it had chosen.
        resumed_from: the step it began at, 0 for the beginning of the run.
        begun_at_known: whether that is known: the line that told it may be lost.
        path: its request as it was written, where that is a path.
        commits: checkpoints that it committed.
        outcome: finished, preempted, failed, …; None: killed, or still at work.
        reached: the step at which it ended, None unless it said so.
        resharded: (processes, ZeRO stage) that wrote what it resumed from, if not the same as its.
        began: when, as the events tell it (UTC, ISO 8601).
        job: of a batch job: `job` (its id), `nodes`, `restarts`.
    """

    number: int
    request: str | None = None
    resumed_from: int = 0
    commits: int = 0
    outcome: str | None = None
    reached: int | None = None
    resharded: tuple[int, int] | None = None
    began: str | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    begun_at_known: bool = True
    path: str | None = None


def abandoned_steps(nodes: Iterable[Node], attempts: Iterable[Attempt] = ()) -> set[int]:
    """Steps of an abandoned branch: a later attempt began at an earlier step and has committed.

    The history of attempts is needed as well: retention may have pruned every checkpoint that
    tells where a branch began, and what it left behind must not come back to life. But where an
    attempt began that nothing tells of any more is not made up: a hole in the log is no rewind.
    """
    known = list(nodes)
    begun = {a.number: a.resumed_from for a in attempts if a.commits and a.begun_at_known}
    begun |= {node.attempt: node.parent for node in known}
    earliest_after: dict[int, float] = {}  # attempt → the earliest step a later attempt began at
    earliest = inf
    for number in sorted(begun, reverse=True):
        earliest_after[number] = earliest
        earliest = min(earliest, begun[number])
    return {node.step for node in known if node.step > earliest_after[node.attempt]}


def fruitless_resumes(attempts: Sequence[Attempt], request: str = "auto") -> dict[int, int]:
    """How often each step was resumed since the last progress (a commit, or a finished run).

    For `auto` whoever asked; for any other request the resumes that it asked for itself: a person
    who names a step wants it tried.
    """
    count: dict[int, int] = {}
    for attempt in reversed(attempts):
        if attempt.commits or attempt.outcome == "finished":
            break
        if attempt.request is not None and request in ("auto", attempt.request):
            count[attempt.resumed_from] = count.get(attempt.resumed_from, 0) + 1
    return count


def is_under_way(request: str, attempts: Sequence[Attempt]) -> bool:
    """Whether the newest attempts have this same request, unfinished, and have committed since.

    The same command carries on: going back to a step is done once, not at every relaunch.
    """
    for attempt in reversed(attempts):
        if attempt.request is None and not attempt.commits:
            continue  # it ended before it had chosen
        if attempt.request != request or attempt.outcome == "finished":
            return False
        if attempt.commits:
            return True
    return False

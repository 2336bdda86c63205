"""Which checkpoint each attempt grew from, and which branch is alive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf


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
        commits: checkpoints that it committed.
        outcome: finished, preempted, failed, …; None: killed, or still at work.
        reached: the step at which it ended, None unless it said so.
    """

    number: int
    request: str | None = None
    resumed_from: int = 0
    commits: int = 0
    outcome: str | None = None
    reached: int | None = None


def abandoned_steps(nodes: Iterable[Node]) -> set[int]:
    """Steps of an abandoned branch: a later attempt began at an earlier step and has committed."""
    abandoned: set[int] = set()
    earliest = inf  # the earliest step that a later attempt began at
    newest_first = sorted(nodes, key=lambda node: node.attempt, reverse=True)
    for _, of_attempt in groupby(newest_first, key=lambda node: node.attempt):
        siblings = list(of_attempt)
        abandoned |= {node.step for node in siblings if node.step > earliest}
        earliest = min([earliest, *(node.parent for node in siblings)])
    return abandoned


def fruitless_resumes(attempts: Sequence[Attempt]) -> dict[int, int]:
    """How often each step was resumed since the last progress (a commit, or an orderly end)."""
    count: dict[int, int] = {}
    for attempt in reversed(attempts):
        if attempt.commits or attempt.outcome in ("finished", "preempted"):
            break
        if attempt.request is not None:
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

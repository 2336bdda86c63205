"""Which checkpoint each attempt grew from, and which branch is alive. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal, Self

from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.rewind import Rewind

RECIPE = 2  # the exit status of an attempt whose recipe is wrong
# What an attempt's time goes into, as it measures that. `step`: what is none of the others, from
# the first step's begin on; `ending`: from the last one's end on.
# unknown: the process was stopped.
Kind = Literal["startup", "restore", "reshard", "step", "evaluation", "save", "ending", "unknown"]


@dataclass(frozen=True)
class Node:
    """A committed checkpoint in the tree: its step, the attempt that wrote it, and the step that
    attempt began at (0: the beginning of the run)."""

    step: int
    attempt: int
    parent: int


@dataclass(frozen=True)
class Finish:
    """A run that was finished, as the events tell it.

    Attributes:
        step: the last one that was made.
        newest: the newest checkpoint then; None without one.
        plan: the planned `steps`, and what may stop it before them. None: not known (told by an
            older version).
    """

    step: int
    newest: int | None
    plan: Mapping[str, Any] | None = None

    @property
    def is_saved(self) -> bool:
        """Whether its last step has a checkpoint. Else its line alone tells of that step."""
        return self.newest == self.step

    def holds(self, plan: Mapping[str, Any], saves_it: bool = False) -> bool:
        """Whether the run is still finished under this plan.

        Args:
            saves_it: whether the present recipe saves a run's last step: then a run without that
                checkpoint is not what is asked for.
        """
        if saves_it and not self.is_saved:
            return False
        return self.step >= plan["steps"] or self.plan == plan


@dataclass(frozen=True)
class Spent:
    """What an attempt had spent at a moment.

    Attributes:
        step: the optimizer steps completed then.
        seconds: of each `Kind`, since its process began.
        at: the wall clock's time then (UTC, ISO 8601); None: not known.
    """

    step: int
    seconds: Mapping[str, float]
    at: str | None = None


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
        began_training: it had built everything, and was about to load its checkpoint.
        stop_asked: a signal has asked it to stop.
        machine_lost: of several machines one has left it, or was lost.
        save_failed: it came as far as a save, and that failed.
        hang_at: the step at which a bound that was learnt has ended it; None: none has.
        rewind: it has ended to go back from a step that had spoilt the run; None: it has not.
        recipe: a digest of what was asked for; None: not known.
        finish: it came to the end of the run, or found it there.
        outcome: finished, preempted, rewound, failed, …; None: killed, or still at work.
        exit: its exit status, None unless it said so.
        reason: what asked for its end, or the error; None: it has not said so, or there is none.
        reached: the step at which it ended, None unless it said so.
        resharded: the processes that wrote what it resumed from, if not the same as its.
        began: when, as the events tell it (UTC, ISO 8601).
        job: of a batch job: `job` (its id), `nodes`, `restarts`.
        up: seconds that its process was there when it began.
        spent: what it had spent, at its saves, its end, and its last sign of life.
        last: its last word, or sign of life, as the events tell it (UTC, ISO 8601).
        is_heard: of one that did not tell of its end: its last sign of life is known.
    """

    number: int
    request: str | None = None
    resumed_from: int = 0
    commits: int = 0
    began_training: bool = False
    stop_asked: bool = False
    machine_lost: bool = False
    save_failed: bool = False
    hang_at: int | None = None
    rewind: Rewind | None = None
    recipe: str | None = None
    finish: Finish | None = None
    outcome: str | None = None
    exit: int | None = None
    reached: int | None = None
    resharded: ParallelLayout | None = None
    began: str | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    begun_at_known: bool = True
    path: str | None = None
    up: float = 0.0
    spent: tuple[Spent, ...] = ()
    last: str | None = None
    is_heard: bool = False
    reason: str | None = None

    def heard_of(self, spent: Spent, at: str | None) -> Self:
        """The same, with a sign of life that it has given."""
        moments = [moment for moment in (self.last, at) if moment is not None]
        last = max(moments, default=None)
        return replace(self, spent=(*self.spent, spent), last=last, is_heard=True)


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


def fruitless_resumes(
    attempts: Sequence[Attempt], request: str = "auto", recipe: str | None = None
) -> dict[int, int]:
    """How often each step was resumed in vain since the last progress (a commit, or the end).

    For `auto` whoever asked; for any other request the resumes that it asked for itself: a person
    who names a step wants it tried. Attempts of another recipe do not count: this one has not been
    tried yet.
    """
    count: dict[int, int] = {}
    for attempt in reversed(attempts):
        if attempt.commits or attempt.finish is not None or attempt.outcome == "finished":
            break
        if None not in (recipe, attempt.recipe) and attempt.recipe != recipe:
            continue
        if _died_of_it(attempt) and request in ("auto", attempt.request):
            count[attempt.resumed_from] = count.get(attempt.resumed_from, 0) + 1
    return count


def _died_of_it(attempt: Attempt) -> bool:
    """Whether what an attempt resumed from may be what ended it.

    Not when it ended before it had begun to load that, was asked to stop, had lost a machine, says
    that the recipe is wrong, goes back from a later step, or trained as far as a save that failed:
    a full disk must cost no recovery point. (Nobody can tell a kill by hand from one for lack of
    memory: that counts.)
    """
    if attempt.request is None or not attempt.began_training:
        return False
    if attempt.stop_asked or attempt.machine_lost or attempt.save_failed:
        return False
    if attempt.rewind is not None:
        return False
    return attempt.outcome is None or (attempt.outcome == "failed" and attempt.exit != RECIPE)


def last_finish(attempts: Sequence[Attempt], recipe: str | None = None) -> Finish | None:
    """How the run was finished, if nothing has been committed since; None: it was not.

    Without a checkpoint of its last step there is nothing to compare another recipe with: then only
    the one that it was finished with is finished.
    """
    for attempt in reversed(attempts):
        if attempt.finish is not None:
            same = recipe is not None and attempt.recipe == recipe
            return attempt.finish if same or attempt.finish.is_saved else None
        if attempt.commits:
            break
    return None


def newest_hang(attempts: Iterable[Attempt]) -> int | None:
    """The newest step at which a learnt bound has ended an attempt; None: none has."""
    steps = (attempt.hang_at for attempt in attempts)
    return max((step for step in steps if step is not None), default=None)


def is_under_way(request: str, attempts: Sequence[Attempt]) -> bool:
    """Whether the newest attempts have this same request, unfinished, and have committed since.

    The same command carries on: going back to a step is done once, not at every relaunch.
    """
    for attempt in reversed(attempts):
        if attempt.request is None and not attempt.commits:
            continue  # it ended before it had chosen
        if attempt.request != request or attempt.outcome == "finished":
            return False
        if attempt.commits or attempt.finish is not None:
            return True
    return False

"""Which save grew from which, as nested lists. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from keepstep.report.facts import Event, RunFacts


@dataclass
class Stretch:
    """Saves of one attempt, one behind the other, that nothing else begins between.

    Attributes:
        attempt: which wrote them.
        start: the step that they grew from; 0: the beginning.
        saves: their commits.
        branches: what grew from the last of them, beside what follows in the list.
    """

    attempt: int
    start: int
    saves: list[Event] = field(default_factory=list)
    branches: list[list[Stretch]] = field(default_factory=list)


def lineage(run: RunFacts) -> list[Stretch]:
    """The living branch, from the beginning on; the others hang where they were left.

    An attempt that has saved nothing has no place in it.
    """
    commits = run.of_kind("commit")
    began = {attempt.number: attempt.resumed_from for attempt in run.attempts}
    children: dict[int, list[int]] = {-1: []}  # place of a commit → those that grew from it
    written: dict[int, int] = {}  # step → the place of its newest commit
    of_attempt: dict[int, int] = {}  # attempt → the place of its newest commit
    for place, commit in enumerate(commits):
        attempt = commit["attempt"]
        start = commit.get("parent", began.get(attempt)) or 0
        parent = of_attempt.get(attempt, written.get(start, -1))
        children[parent].append(place)
        children[place] = []
        written[commit["step"]] = of_attempt[attempt] = place
    return _chain(-1, commits, children)


def _chain(root: int, commits: Sequence[Event], children: dict[int, list[int]]) -> list[Stretch]:
    """From a commit on (without it), along what was written last."""
    chain: list[Stretch] = []
    last = root
    while children[last]:
        *left, following = children[last]
        commit, start = commits[following], 0 if last < 0 else commits[last]["step"]
        if left and not chain:  # they grew from the beginning itself
            chain.append(Stretch(0, 0))
        if left:
            chain[-1].branches = [_branch(one, start, commits, children) for one in left]
        if not chain or left or chain[-1].attempt != commit["attempt"]:
            chain.append(Stretch(commit["attempt"], start))
        chain[-1].saves.append(commit)
        last = following
    return chain


def _branch(
    first: int, start: int, commits: Sequence[Event], children: dict[int, list[int]]
) -> list[Stretch]:
    """One that was left: its first save, and what grew from that."""
    rest = _chain(first, commits, children)
    head = Stretch(commits[first]["attempt"], start, [commits[first]])
    if rest and rest[0].attempt == 0:  # branches at the first save itself
        head.branches = rest.pop(0).branches
    elif rest and rest[0].attempt == head.attempt:
        head.saves += rest[0].saves
        head.branches = rest.pop(0).branches
    return [head, *rest]

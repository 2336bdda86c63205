"""Several machines without a scheduler (`--nnodes MIN:MAX`): which of them make an attempt, and
what is next after it. Pure.

Each machine sees the same files and comes to the same answer; the first of a group writes it down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from keepstep.policy.next_step import (
    FAILED,
    FINISHED,
    GIVEN_UP,
    NO_PROGRESS,
    NOT_PUBLISHED,
    PREEMPTED,
    RECIPE,
    STOPPED,
    Ended,
    Situation,
    after_attempt,
    fruitless_after,
)

MOST = 4096  # machines; who writes a larger number means something else
# Why a machine has asked its ranks for a stop: it leaves, another has come, another is gone.
LEAVES, GROWS, ENDS = "leaves", "grows", "ends"


@dataclass(frozen=True)
class Range:
    """How many machines make an attempt: `least` to `most`."""

    least: int
    most: int


def range_of(text: str) -> Range:
    """`MIN:MAX`, or one number, as torchrun has it.

    Raises:
        ValueError: it is none; in words for people.
    """
    numbers = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", text)
    if numbers is None:
        raise ValueError(f"{text!r} is neither N nor MIN:MAX")
    least, most = int(numbers[1]), int(numbers[2] or numbers[1])
    if not 1 <= least <= most <= MOST:
        raise ValueError(f"{text} is no range of machines: 1 <= MIN <= MAX <= {MOST}")
    return Range(least, most)


@dataclass(frozen=True)
class Part:
    """How a machine's part of an attempt ended.

    Attributes:
        number: of the plan.
        outcome, reason, exit, has_begun: as `Ended` has them.
        asked: why this machine had asked for a stop: LEAVES, GROWS, ENDS, or empty.
    """

    number: int
    outcome: str
    reason: str
    exit: int
    has_begun: bool
    asked: str = ""


@dataclass(frozen=True)
class Machine:
    """A machine, as its file in the run folder tells of it.

    Attributes:
        id: of its command: one that is started again is another one.
        host: its name, for people.
        processes: how many it can have.
        addresses: its own, IPv4.
        port: at which it answers with its id.
        reaches: other machines, and at which of their addresses they have answered.
        leaves: it takes part in no further attempt.
        part: how its part of the last attempt that it was in ended.
    """

    id: str
    host: str
    processes: int
    addresses: tuple[str, ...] = ()
    port: int = 0
    reaches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leaves: bool = False
    part: Part | None = None


@dataclass(frozen=True)
class Plan:
    """What the machines have agreed on: an attempt, or the end.

    Attributes:
        number: one more than that of the plan before.
        token: the attempt's name, for which the run folder has it as its owner.
        machines: ids, in the order of their ranks.
        address, port: where the ranks meet: the first machine's.
        processes: of each machine.
        fruitless: attempts in a row without a new checkpoint, before this one.
        commits: of the run, before this one.
        attempts: the number of the newest one before.
        proven: the machines of the last attempt that was not refused; none: each was.
        refusals: of attempts that were, though that one was not: their machines.
        end: the exit status of all, if there is no further attempt.
        words: why, for people.
    """

    number: int = 0
    token: str = ""
    machines: tuple[str, ...] = ()
    address: str = ""
    port: int = 0
    processes: int = 1
    fruitless: int = 0
    commits: int = 0
    attempts: int = 0
    proven: tuple[str, ...] = ()
    refusals: tuple[tuple[str, ...], ...] = ()
    end: int | None = None
    words: str = ""


@dataclass(frozen=True)
class Rows:
    """How the rows of a step can be shared out.

    Attributes:
        rows: of a step; None: not known, or they may become others.
        sharing: processes that share each row (sequence parallelism).
    """

    rows: int | None = None
    sharing: int = 1

    def fit(self, processes: int) -> bool:
        """Whether so many processes can share them out evenly."""
        groups, left = divmod(processes, self.sharing)
        return self.rows is None or (groups > 0 and left == 0 and self.rows % groups == 0)


def linked(there: Mapping[str, Machine], before: Sequence[str] = ()) -> tuple[str, ...]:
    """As many machines as reach each other, every one every other one, in the order of their ranks.
    Of several such groups the one of who was there before is taken, so that of a network in two
    halves one goes on, and the other one knows.

    Args:
        there: those that are alive, and do not leave.
        before: those of the last attempt, in their order.
    """
    order = [one for one in before if one in there] + sorted(set(there) - set(before))
    best: tuple[str, ...] = ()
    for first in order:
        group = [first]
        for other in order:
            if other != first and all(_linked(there[other], there[one]) for one in group):
                group.append(other)
        group = _reaching_one_address(sorted(group, key=order.index), there)
        if len(group) > len(best):
            best = tuple(group)
    return best


def together(
    group: Sequence[str],
    there: Mapping[str, Machine],
    most: int,
    rows: Rows = Rows(),
    plan: Plan = Plan(),
) -> tuple[str, ...]:
    """The machines of the next attempt: the first ones of a group, as many as may be, and can share
    out the rows of a step; not those that were refused together. Whoever comes is tried.

    Args:
        plan: the newest one.
    """
    order = [*group[:1], *sorted(group[1:], key=suspects(plan).__contains__)]
    for count in range(min(len(group), most), 0, -1):
        chosen = tuple(order[:count])
        is_refused = any(set(chosen) == set(one) for one in plan.refusals)
        if not is_refused and rows.fit(count * processes_of_each(chosen, there)):
            return chosen
    return ()


def suspects(plan: Plan) -> set[str]:
    """Machines without which an attempt was not refused: their recipe or data may be another."""
    return {one for refused in plan.refusals for one in refused} - set(plan.proven)


def processes_of_each(group: Sequence[str], there: Mapping[str, Machine]) -> int:
    """As many as each of them can have: launchers know one number for all machines."""
    return min(there[one].processes for one in group)


def _linked(one: Machine, other: Machine) -> bool:
    return bool(one.reaches.get(other.id) and other.reaches.get(one.id))


def meeting_address(group: Sequence[str], there: Mapping[str, Machine]) -> str:
    """The address of the first machine at which most of the others have reached it; its first one,
    where it is alone."""
    head, others = there[group[0]], [there[one] for one in group[1:]]
    counts = {a: sum(a in one.reaches[head.id] for one in others) for a in head.addresses}
    return max(counts, key=lambda a: counts[a]) if counts else "127.0.0.1"


def _reaching_one_address(group: list[str], there: Mapping[str, Machine]) -> list[str]:
    """Without those that reach the first one at another address alone: the ranks meet at one."""
    head, address = there[group[0]], meeting_address(group, there)
    return [group[0], *(one for one in group[1:] if address in there[one].reaches[head.id])]


def pending(plan: Plan, alive: Mapping[str, Machine]) -> list[str]:
    """Machines whose part of the plan's attempt has not ended, or not begun yet."""
    if plan.end is not None:
        return []
    there = [alive[one] for one in plan.machines if one in alive]
    return [m.id for m in there if m.part is None or m.part.number < plan.number]


def ended_of(plan: Plan, told: Ended | None, known: Mapping[str, Machine]) -> Ended:
    """How the plan's attempt ended.

    Args:
        told: what the run folder tells of it: its main process has written it; None: nothing.
        known: all machines that there were, also those that are gone.
    """
    parts = {
        one: part
        for one in plan.machines
        if one in known and (part := known[one].part) and part.number == plan.number
    }
    if told is None and parts:
        # A recipe that is refused tells more than a peer that has waited for that one.
        begun = [part for part in parts.values() if part.has_begun] or list(parts.values())
        part = min(begun, key=lambda part: (part.outcome != RECIPE, part.outcome != FAILED))
        told = Ended(part.outcome, part.reason, part.exit, part.has_begun)
        if told.outcome == FINISHED and plan.machines[0] not in parts:  # it may have to publish
            told = Ended(FAILED, "its main process was lost at the end", 70, True)
    if told is None:
        return Ended(FAILED, "nobody has told of its end", 70, False)
    asked = any(part.asked for part in parts.values())
    if told.outcome == PREEMPTED and "SIGTERM" in told.reason and not asked:
        # So ranks hear of a launcher that was killed, and of peers that are gone.
        return Ended(FAILED, f"{told.reason}, and nobody has asked for a stop", 70, told.has_begun)
    return told


@dataclass(frozen=True)
class Verdict:
    """What is next after an attempt.

    Attributes:
        end: the exit status of all; None: another attempt.
        words: why.
        pause: seconds before it.
        counts: a plan with `fruitless`, `proven` and `refusals` as they are now.
    """

    end: int | None
    words: str
    pause: int
    counts: Plan


def after(
    plan: Plan,
    ended: Ended,
    known: Mapping[str, Machine],
    group: Sequence[str],
    commits: int,
    machines: Range,
    retries: int,
    stop_requested: bool,
) -> Verdict:
    """What is next. A machine that has left, or is lost, is what it is: no failure of the run.

    Args:
        group: who reach each other now.
        commits: checkpoints that were ever committed.
        retries: so often in a row without a new checkpoint.
    """
    gone = any(one not in group for one in plan.machines)
    asked = {m.part.asked for m in known.values() if m.part and m.part.number == plan.number} - {""}
    if ended.outcome == RECIPE:
        return _refused(plan, ended, group, known, machines)
    proven = plan.machines if ended.has_begun else plan.proven
    counts = replace(plan, proven=proven, commits=commits)
    if ended.outcome in (FINISHED, NO_PROGRESS):
        following = after_attempt(ended, Situation())
        words = following.words
        if ended.outcome == FINISHED and ended.exit == NOT_PUBLISHED:
            words = ended.reason
        return Verdict(following.exit, words, 0, counts)
    if stop_requested:
        return Verdict(STOPPED, "stopped on request", 0, counts)
    if (asked and ended.outcome == PREEMPTED) or (gone and ended.outcome == FAILED):
        fruitless = 0 if commits > plan.commits else plan.fruitless
        words = "on more machines" if asked == {GROWS} else ended.reason
        return Verdict(None, words, 0, replace(counts, fruitless=fruitless))
    fruitless = fruitless_after(plan.fruitless, plan.commits, commits)
    seen = Situation(
        fruitless=fruitless, max_attempts=retries + 1, preempted="no", nodes_answer="yes"
    )
    following = after_attempt(ended, seen)
    counts = replace(counts, fruitless=fruitless)
    if following.action == "launch":
        return Verdict(None, ended.reason, following.pause, counts)
    if following.action == "give-up":
        return Verdict(GIVEN_UP, f"{following.words}: {ended.reason}", 0, counts)
    # What a batch job would be queued again for: the time is over. Here it is over.
    words = ended.reason if following.action == "requeue" else following.words
    return Verdict(STOPPED, words, 0, counts)


def _refused(
    plan: Plan, ended: Ended, group: Sequence[str], known: Mapping[str, Machine], machines: Range
) -> Verdict:
    """What is refused may be one machine's recipe, or the number of machines, which does not divide
    the rows of a step."""
    still_there = [one for one in plan.refusals if set(one) <= set(group)]
    counts = replace(plan, refusals=(*still_there, plan.machines))
    others_did = plan.proven and set(plan.proven) != set(plan.machines)
    others_are_there = together(group, known, machines.most, plan=counts)
    if not others_did or not others_are_there or machines.least == machines.most:
        words = "the same command would fail again: see above, or what the other machines say"
        return Verdict(ended.exit, words, 0, plan)
    words = (
        f"refused on {', '.join(known[one].host if one in known else one for one in plan.machines)}"
    )
    return Verdict(None, f"{words}: {ended.reason}", 0, counts)

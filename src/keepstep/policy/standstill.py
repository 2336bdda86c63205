"""How long nobody may get on before a run hangs: learnt from the run itself. Pure: the clock is
passed in.

A standstill is the time in which a main thread does not get on: from a batch to the next, from the
last one to the step's end. Of a step (an evaluation, a save) the longest is remembered: one of a
hundred quick batches and a slow optimizer step is a slow step.

To call a hang too early costs more than to call it late. So what was seen once may come again, and
take twice as long (the first step compiles; later ones may, for other lengths); and what a learnt
bound has ended once, it does not end again: see `Standstills.suspect`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from keepstep.policy.schedule import high

Phase = Literal["start", "step", "evaluation", "save", "write", "end"]
# So many have to have ended before something is concluded from them. Not in this list, and never
# learnt: waiting for files to be written, which takes as long as the disk likes and has a bound of
# its own (`save_timeout_seconds`); and the end, which comes once.
ENOUGH: Mapping[Phase, int] = {"start": 5, "step": 50, "evaluation": 5, "save": 5}
LAST = 200  # that are remembered of each
SHARE = 0.99  # of them that a usual standstill is as long as
TIMES_USUAL, TIMES_LONGEST = 10, 2
# So many times the least bound. A save makes folders, and NFSv4 stands still for its grace period
# when the server starts anew: 90 seconds, as Linux has it.
LONGER: Mapping[Phase, int] = {"save": 5}
TOLD: Mapping[Phase, str] = {
    "start": "at the start",
    "step": "in a step",
    "evaluation": "in an evaluation",
    "save": "in a save",
    "write": "waiting for a save to be written",
    "end": "at the end",
}


@dataclass
class _Seen:
    """Of one phase: the longest standstill of each of the last ones, and of all."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    longest: float = 0.0


@dataclass(frozen=True)
class Bound:
    """Seconds without progress after which a run hangs.

    Attributes:
        phase: what it was learnt from, or given for.
        is_learnt: whether it lies below the fixed one.
    """

    seconds: float
    phase: Phase
    is_learnt: bool


class Standstills:
    """What a process is at, how long it stands still there, and the bounds that follow.

    Attributes:
        least: seconds; no learnt bound is shorter.
        most: the fixed bound, in seconds: where nothing is learnt, and above what is.
        phase: what the process is at.
        step: optimizer steps completed.
        suspect: the newest step at which a learnt bound has ended an earlier attempt. Nothing that
            is learnt counts until it is passed: perhaps it was no hang. None: there was none.
    """

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most
        self.phase: Phase = "start"
        self.step = 0
        self.suspect: int | None = None
        self._since: float | None = None  # it has got on last
        self._longest = 0.0  # in what is under way
        self._seen: dict[Phase, _Seen] = {phase: _Seen() for phase in TOLD}

    @property
    def soonest(self) -> float:
        """No bound is shorter."""
        return min(self.least, self.most)

    def got_on(self, now: float, at: Phase | None = None) -> None:
        """It has got on.

        Args:
            now: on a steady clock.
            at: what it is at from here on: a step begins anew each time, of the others one that is
                under way goes on. None: as before. After the end nothing else begins.
        """
        seen = self._seen[self.phase]
        if self._since is not None:
            self._longest = max(self._longest, now - self._since)
            seen.longest = max(seen.longest, self._longest)
        self._since = now
        if at is None or self.phase == "end" or (at == self.phase and at != "step"):
            return
        seen.last.append(self._longest)
        self.phase, self._longest = at, 0.0

    def forget(self) -> None:
        """The process was stopped since it has got on last: that time tells nothing."""
        self._since = None

    def bound(self, phases: Collection[Phase]) -> Bound:
        """The longest of these phases' bounds: the slowest of what ranks are at may be right."""
        return max(map(self._bound, phases), key=lambda bound: bound.seconds)

    def _bound(self, phase: Phase) -> Bound:
        seen = self._seen[phase]
        last = list(seen.last)
        is_known = phase in ENOUGH and len(last) >= ENOUGH[phase]
        if not is_known or (self.suspect is not None and self.step <= self.suspect):
            return Bound(self.most, phase, is_learnt=False)
        least = self.least * LONGER.get(phase, 1)
        seconds = max(least, TIMES_USUAL * high(last, SHARE), TIMES_LONGEST * seen.longest)
        return Bound(min(self.most, seconds), phase, is_learnt=seconds < self.most)

    def told(self, phase: Phase, bound: Bound) -> str:
        """Where a rank stands still, and what that was measured by."""
        if not bound.is_learnt:
            return TOLD[phase]
        last = list(self._seen[bound.phase].last)
        seen = f"none of the last {len(last)} stood still for longer than {max(last):.2g} s"
        if bound.phase == phase:
            return f"{TOLD[phase]}, where {seen}"
        return f"{TOLD[phase]} (another rank was {TOLD[bound.phase]}, where {seen})"

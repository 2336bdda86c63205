"""When a checkpoint is copied to a mirror, and what is told of copies that fail. Pure: the clock is
passed in.

    a save ──► is_due: every n-th one; the best and the last always (mirroring.py, finish)
    a copy that failed ──► again after 30 s, 1 min, 2 min … 30 min, by which the store has come back
                           or somebody has read a line: of the 1st, 2nd, 4th, 8th … failure
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

FIRST_WAIT = 30.0  # seconds after a copy that failed: the store's own tries have taken minutes
LONGEST_WAIT = 1800.0


@dataclass(frozen=True)
class Pace:
    """How copies have gone.

    Attributes:
        pause: seconds from the beginning of a copy to the next one's, at least.
        failures: in a row.
        since: when the first of them was, on a steady clock.
        not_before: when the next copy may begin.
    """

    pause: float = 0.0
    failures: int = 0
    since: float = 0.0
    not_before: float = float("-inf")

    def begun(self, now: float) -> Pace:
        """A copy begins."""
        return replace(self, not_before=now + self.pause)

    def done(self) -> Pace:
        """It is there."""
        return replace(self, failures=0)

    def failed(self, now: float) -> Pace:
        """It is not. Tried again: what looks as if it would be so for ever, as a permission that is
        missing, may be given back meanwhile."""
        failures = self.failures + 1
        again = now + min(FIRST_WAIT * 2.0 ** min(failures - 1, 30), LONGEST_WAIT)
        return Pace(
            self.pause,
            failures,
            self.since if self.failures else now,
            max(self.not_before, again),
        )

    @property
    def is_told(self) -> bool:
        """Whether people hear of the newest failure: of a store that fails for a day, a few."""
        return self.failures & (self.failures - 1) == 0


def is_due(saved: Sequence[int], copied: Iterable[int], every: int) -> bool:
    """Whether the newest of these saves is to be copied: the first of an attempt, since nobody
    knows how many are lost before it, and then every n-th.

    Args:
        saved: steps of the attempt's saves so far.
        copied: of which of them there is a copy.
        every: n.
    """
    newest = max(copied, default=None)
    return newest is None or sum(step > newest for step in saved) >= every

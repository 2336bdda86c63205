"""What an attempt's time goes into: every moment of it into one kind, none into two."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keepstep.policy.lineage import Kind
from keepstep.ranks import start_up

_later = False  # an attempt of this process has a time sheet already


class TimeSheet:
    """Seconds since the attempt's process began, by kind. Ranks: any, each its own; any thread.

    Attributes:
        step: the optimizer steps that are completed.
    """

    def __init__(
        self, clock: Callable[[], float] = start_up.now, began: float | None = None
    ) -> None:
        """
        Args:
            began: when the attempt did; None: with the process, or now, where that is a notebook's
                or has made another attempt.
        """
        global _later
        if began is None:
            began = clock() if _later or "ipykernel" in sys.modules else start_up.began()
            _later = True
        self.step = 0
        self._clock, self._since = clock, began
        self._kind: Kind = "startup"
        self._seconds: dict[Kind, float] = {}
        self._lock = threading.Lock()

    def at(self, kind: Kind) -> Kind:
        """From here on it goes into this; returns what it went into before."""
        with self._lock:
            self._lap()
            before, self._kind = self._kind, kind
        return before

    @contextmanager
    def within(self, kind: Kind) -> Iterator[None]:
        """Until the block ends it goes into this, and then into what it went into before."""
        before = self.at(kind)
        try:
            yield
        finally:
            self.at(before)

    def step_ended(self, step: int) -> None:
        """So many steps are completed."""
        with self._lock:
            self._lap()
            self.step = step

    def move(self, seconds: float, of: Kind, to: Kind) -> None:
        """So much of one kind was another, as is known only now."""
        with self._lock:
            self._lap()
            moved = min(seconds, self._seconds.get(of, 0.0))
            self._seconds[of] = self._seconds.get(of, 0.0) - moved
            self._seconds[to] = self._seconds.get(to, 0.0) + moved

    def stopped(self, seconds: float) -> None:
        """So much of what it goes into now, the process was stopped: nothing tells what for."""
        self.move(seconds, self._kind, "unknown")

    def told(self) -> dict[str, float]:
        """Seconds of each kind so far."""
        return self.now()[1]

    def now(self) -> tuple[int, dict[str, float]]:
        """The steps that are completed, and the seconds so far: of one moment."""
        with self._lock:
            self._lap()
            return self.step, {kind: round(s, 3) for kind, s in self._seconds.items()}

    def _lap(self) -> None:
        now = self._clock()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + max(0.0, now - self._since)
        self._since = now

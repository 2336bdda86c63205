"""What goes out beside training, in its order; what does not arrive is kept, and tried again."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until it is tried again


class Courier:
    """Hands parcels over, one after the other, on a thread of its own: no step waits for a server.
    What follows one that has not arrived waits behind it, so that what a kill takes is the end of
    it all, never a part from the middle.

    Args:
        name: where to, in what a person is told.
        send: hands over the oldest ones; returns how many have arrived.
    """

    def __init__(self, name: str, send: Callable[[Sequence[Any]], int]) -> None:
        self._name, self._send = name, send
        self._held: deque[Any] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._arrived = 0
        self._ends = False  # no pause is waited for any more
        self.failure: Exception | None = None

    def put(self, parcel: Any) -> None:
        with self._changed:
            self._held.append(parcel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, patience: float) -> int:
        """Wait until all has arrived, or for so many seconds nothing has; returns how many parcels
        are left. They are tried no more."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
            while self._held:
                before = self._arrived
                if not self._changed.wait_for(lambda: self._arrived > before, patience):  # noqa: B023
                    break
            left = len(self._held)
            self._held.clear()
            self._changed.notify_all()
        return left

    def _run(self) -> None:
        pause = PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held or self._ends)
                oldest = list(self._held)
            if not oldest:
                return
            try:
                count = self._send(oldest)
            except Exception as error:
                self._tell(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._ends, pause)
                    if self._ends:
                        self._changed.wait(PAUSE)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause = PAUSE
            self._tell(None)
            with self._changed:
                for _ in range(min(count, len(self._held))):
                    self._held.popleft()
                self._arrived += count
                self._changed.notify_all()

    def _tell(self, failure: Exception | None) -> None:
        """Of the first failure, and when it is over."""
        before, self.failure = self.failure, failure
        if failure is not None and before is None:
            logger.warning(
                "report_to: %s: %s\n    It is tried again; what it has not got is kept meanwhile.",
                *(self._name, line_of(failure)),
            )
        elif failure is None and before is not None:
            logger.warning("report_to: %s: it answers again", self._name)


def line_of(error: Exception) -> str:
    """What it says, in one line."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

"""How long a process was stopped (SIGSTOP, Slurm's suspend), where that is certain. Pure."""

from __future__ import annotations

LEAST = 2.0  # seconds that a thread comes back too late: less has other reasons
KEPT = 60  # waits, until the main thread has heard that it goes on


class Stopped:
    """Two things together tell: a thread that only waits has come back too late, and the process
    was told to go on (SIGCONT). Either alone may be something else: a call that keeps all threads
    out, a signal to a process that was at work."""

    def __init__(self) -> None:
        self._late, self._waits = 0.0, 0

    def seconds(self, late: float, continued: bool) -> float:
        """After each wait: how long the process was stopped, as is known only now; mostly 0.

        Args:
            late: seconds that the wait took too long.
            continued: whether SIGCONT came since the last wait.
        """
        if late >= LEAST:
            self._late, self._waits = self._late + late, 0
        elif self._late:
            self._waits += 1
            self._late = self._late if self._waits <= KEPT else 0.0
        if not continued:
            return 0.0
        found, self._late = self._late, 0.0
        return found

"""What signals have asked a job for. For Python 3.6 and newer: see job.py."""

import signal
import time

TERM, TIME = "term", "time"
SIGNALS = {signal.SIGTERM: TERM, signal.SIGHUP: TERM, signal.SIGINT: TERM}
SIGNALS.update({signal.SIGUSR1: TIME, signal.SIGUSR2: TIME})
HEARD = {
    # scancel, requeue, preemption, node failure: from here on the job is Slurm's
    TERM: "TERM: this job is to end",
    TIME: "the time limit is near: save, then queue again",
}


class Stop:
    """What signals have asked for. A handler only notes it: it may interrupt anything."""

    def __init__(self):
        self._since = {}
        for number, kind in SIGNALS.items():
            signal.signal(number, lambda *_, kind=kind: self._note(kind))

    def _note(self, kind):
        self._since.setdefault(kind, time.monotonic())

    def kind(self):
        """`term`: Slurm ends the job; `time`: the time limit is near; else empty."""
        return next((kind for kind in (TERM, TIME) if kind in self._since), "")

    def seconds(self):
        """Since it was asked for."""
        return time.monotonic() - self._since[self.kind()] if self.kind() else 0.0


def be_deaf():
    """Nothing that comes from here on is heard."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

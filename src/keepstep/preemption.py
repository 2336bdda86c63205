"""Signal → flag → agreed at a step boundary → save and stop. Imports nothing slow."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

# Ctrl-C reaches a rank from the terminal and again from its launcher: that is one request.
ONE_REQUEST_SECONDS = 2.0

_started = time.time()
_received: list[tuple[int, float]] = []


def install_handlers() -> None:
    """From now on the first signal asks for a stop at the next step boundary.

    Call it before the slow imports, in every rank: a signal that comes earlier ends the process.
    """
    global _started
    _started = time.time()
    for number in SIGNALS:
        signal.signal(number, _handle)


def started() -> float:
    """When this process began its work, in seconds since the epoch."""
    return _started


def requested() -> str | None:
    """The name of the signal that this process has received, None so far."""
    return signal.Signals(_received[0][0]).name if _received else None


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    interrupts = [when for earlier, when in _received if earlier == signal.SIGINT]
    if number == signal.SIGINT and interrupts and now - interrupts[0] > ONE_REQUEST_SECONDS:
        os.write(2, b"keepstep: a second SIGINT: this rank ends at once\n")
        os._exit(128 + number)  # as safe as SIGKILL; a raised error would meet waiting peers
    _received.append((number, now))

"""Signal → flag → agreed at a step boundary → save and stop. Imports nothing slow."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def steady() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Ctrl-C reaches a rank from the terminal and again from its launcher: that is one request.
ONE_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_started = time.time(), steady()
_launcher: int | None = None
_received: list[tuple[int, float]] = []


def install_handlers() -> None:
    """From now on the first signal asks for a stop at the next step boundary.

    Call it before the slow imports, in every rank: a signal that comes earlier ends the process.
    """
    global _started, _launcher
    _started = time.time(), steady()
    for number in SIGNALS:
        signal.signal(number, _handle)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _launcher = os.getppid()
        die_with_parent(signal.SIGTERM)


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent is gone, however it ended."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), number)


def started() -> tuple[float, float]:
    """When this process began its work: in seconds since the epoch, and on the steady clock."""
    return _started


def requested() -> str | None:
    """The signal that this process has received, by name, None so far."""
    if not _received:
        return None
    name = signal.Signals(_received[0][0]).name
    # Without it nobody would end the ranks, or hear of their end.
    return f"{name} (its launcher is gone)" if _launcher not in (None, os.getppid()) else name


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    interrupts = [when for earlier, when in _received if earlier == signal.SIGINT]
    if number == signal.SIGINT and interrupts and now - interrupts[0] > ONE_REQUEST_SECONDS:
        os.write(2, b"keepstep: a second SIGINT: this rank ends at once\n")
        os._exit(128 + number)  # as safe as SIGKILL; a raised error would meet waiting peers
    _received.append((number, now))

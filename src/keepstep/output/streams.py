"""What is printed costs lines at most, never the outcome. Imports nothing slow.

A terminal that was closed (EIO), a reader that is gone (EPIPE), a full disk under a log file
(ENOSPC), a connection that stalls, Ctrl-S, an encoding without the character: Python raises, or
waits for ever, in whatever has printed (a bar, a warning, a traceback, its own end), and one rank
that waits keeps all the others.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import time
from typing import Any

from keepstep.output.said import hear

WAIT_SECONDS = 5.0  # for a terminal or a pipe that takes nothing; from then on lines are lost


def protect() -> None:
    """Put streams in the place of stdout and stderr to which writing neither fails nor waits long.

    Call it before the slow imports: libraries hold on to the streams that they find. Ranks: any.
    """
    _fill_gaps()
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue  # somebody else's: a notebook's, say, or these
        with contextlib.suppress(OSError):  # what it still holds
            if before is not None:
                before.flush()
        setattr(sys, name, _stream(number, before))


def _fill_gaps() -> None:
    """A number that is closed would be given to the next file, and be printed into."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


def _stream(number: int, before: Any) -> io.TextIOWrapper:
    raw = Lossy(number)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,  # what was said before a kill is there
        write_through=getattr(before, "write_through", False),
    )


class Lossy(io.FileIO):
    """A descriptor that takes everything, and writes what it can."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._patience = WAIT_SECONDS
        self._number = number
        self._out = _not_waiting(number)

    def write(self, data: Any) -> int:
        """Write what can be written; says that it was all of it."""
        left = memoryview(data).cast("B")
        hear(self._number, bytes(left))
        size, end = len(left), time.monotonic() + self._patience
        with contextlib.suppress(OSError):  # it is gone, or full: the lines are lost
            while left and self._ready(end):
                try:
                    left = left[os.write(self._out, left) :]
                    self._patience = WAIT_SECONDS
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
        return size

    def _ready(self, end: float) -> bool:
        """Whether it takes something before `end`. Once it has not, it is not waited for again."""
        poll = select.poll()
        poll.register(self._out, select.POLLOUT)
        if poll.poll(max(0.0, end - time.monotonic()) * 1000):
            return True
        self._patience = 0.0
        return False


def _not_waiting(number: int) -> int:
    """The same terminal or pipe, opened anew: a write to it returns at once.

    (The mode belongs to what is open, and that is shared with the shell and the other ranks.)
    """
    if os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return number

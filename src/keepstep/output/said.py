"""What a process prints, as whole lines, for whoever keeps them. Imports nothing slow.

Until somebody does, the newest lines are held: much is said before it is known where to keep it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import Callable

LONGEST = 2**16  # bytes of a line that does not end
EARLY = 2**18  # bytes that are held
ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
Keep = Callable[[bytes], None]


class Lines:
    """Makes lines of what a stream is given: of a bar its last state, nothing that steers."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> list[bytes]:
        """The lines that are whole by now, without their ends."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            self._rest = shown(self._rest)
            if len(self._rest) > LONGEST // 2:
                whole.append(self._rest)
                self._rest = b""
        return [shown(line) for line in whole]

    def rest(self) -> list[bytes]:
        """What has no end yet; nothing is left."""
        rest, self._rest = shown(self._rest), b""
        return [rest] if rest.strip() else []


def shown(line: bytes) -> bytes:
    """What of a line is seen in the end, where carriage returns have it written over."""
    if b"\x1b" in line:
        line = ESCAPES.sub(b"", line)
    if b"\r" not in line:
        return line
    return next((part for part in reversed(line.split(b"\r")) if part.strip()), b"")


class _Ear:
    """What the streams of this process hand on."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.streams: dict[int, Lines] = {}
        self.keep: Keep = self._hold
        self.early: deque[bytes] = deque()
        self.size = 0

    def _hold(self, line: bytes) -> None:
        self.early.append(line)
        self.size += len(line)
        while self.size > EARLY:
            self.size -= len(self.early.popleft())


_ear = _Ear()


def hear(number: int, data: bytes) -> None:
    """A stream was given this. Called by `streams`; raises nothing."""
    lines = _ear.streams.setdefault(number, Lines())
    for line in lines.take(data):
        _ear.keep(line)


def keep_lines(keep: Keep) -> None:
    """Hand all lines to `keep` from now on, those that are held first; it raises nothing and does
    not wait."""
    early, _ear.early = _ear.early, deque()
    _ear.size, _ear.keep = 0, keep
    for line in early:
        keep(line)


def finish_lines() -> None:
    """Hand on what has no end yet."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # none, closed, or full
            stream.flush()
    for lines in _ear.streams.values():
        for line in lines.rest():
            _ear.keep(line)


def _in_child() -> None:
    """A half of a line is the parent's to end."""
    _ear.streams = {}


os.register_at_fork(after_in_child=_in_child)

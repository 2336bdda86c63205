"""How far something is that takes long: pieces are counted; who reads a file has a line now and
then."""

from __future__ import annotations

import time
from collections.abc import Callable

from keepstep.output.units import human_bytes, human_duration

EVERY = 30.0  # seconds
Tell = Callable[[int, int], None]  # is told of the bytes that are done, and of all


def nobody(done: int, total: int) -> None:
    """Who is told where nobody waits."""


def progress_lines(
    tell: Callable[[str], None],
    text: str,
    every: float = EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[int, int | None], None]:
    """Where no bar can be drawn: every half minute a line with rate and time left, none of what
    takes less.

    Args:
        tell: is given each line.
        text: what goes on.
        every: seconds.

    Returns:
        What is to be called with (done, total), in bytes.
    """
    began = last = clock()

    def told(done: int, total: int | None) -> None:
        nonlocal last
        now = clock()
        if now - last < every:
            return
        last = now
        rate = done / (now - began)
        line = f"{text}: {human_bytes(done)}"
        if total is not None:
            line += f" of {human_bytes(total)}"
        line += f", {human_bytes(rate)}/s"
        if total is not None and rate:
            line += f", {human_duration(max(0, total - done) / rate)} left"
        tell(line)

    return told


def counted(tell: Tell, total: int) -> Callable[[int], None]:
    """What is to be called with the bytes of each piece: `tell` is told of all so far."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell(done, total)

    return count

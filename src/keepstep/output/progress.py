"""How far something is that takes long: pieces are counted; who reads a file has a line now and
then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

from keepstep.output.units import human_bytes, human_duration

EVERY = 30.0  # seconds
Tell = Callable[[int, int], None]  # is told of the bytes that are done, and of all


class Phase(NamedTuple):
    """How far something is that has several phases.

    Attributes:
        number: of the phase, from 0.
        done: bytes.
        total: bytes; 0: nobody knows.
    """

    number: int = 0
    done: int = 0
    total: int = 0


Shown = AbstractContextManager[Callable[[int, int | None], None] | None]


@contextmanager
def phases(shows: Sequence[Callable[[], Shown]]) -> Iterator[Callable[[Phase], None]]:
    """One bar after the other, for what has several phases; yields what is told of it.

    Args:
        shows: for each phase what shows it: yields what is called with (done, total), or None.
    """
    with ExitStack() as stack:
        number, tell = 0, stack.enter_context(shows[0]())

        def told(phase: Phase) -> None:
            nonlocal number, tell
            if phase.number not in range(len(shows)):  # torn, or of nobody
                return
            if phase.number != number:
                stack.close()
                number, tell = phase.number, stack.enter_context(shows[phase.number]())
            if tell is not None and phase.total:
                tell(phase.done, phase.total)

        yield told


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


def added_up(tell: Tell, total: int) -> Callable[[int], None]:
    """What is to be called with the bytes of each piece: `tell` is told of all so far."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        tell(done, total)

    return count

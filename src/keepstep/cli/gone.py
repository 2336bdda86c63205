"""A run folder that is gone while its command goes on: moved, removed, or on a file system that is
not mounted now. An empty place is not where a run that has begun is begun anew."""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Callable

from keepstep.output.terminal import complain
from keepstep.run_folder.reader import RunFolder

GONE_SECONDS = 600.0  # for which it is waited for
TOLD_EVERY = 60.0


def say(words: str) -> None:
    """Whoever reads may be gone: a terminal that was closed."""
    try:
        complain(f"keepstep: {words}")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def is_there(run: RunFolder) -> bool:
    """Whether a run has begun in this folder, as far as can be seen now."""
    try:
        return stat.S_ISDIR(os.stat(run.private).st_mode)
    except OSError:
        return False


def gone_words(run: RunFolder) -> str:
    """For people."""
    return (
        f"{run.path} is gone, and the run is not begun anew in its place\n"
        "    Hint: mount its file system, or move it back; to begin anew, end this command and "
        "give it again."
    )


def comes_back(run: RunFolder, is_asked: Callable[[], bool]) -> bool:
    """Wait for it, if it is gone.

    Args:
        is_asked: whether somebody has asked for a stop meanwhile.

    Returns:
        Whether it is there.
    """
    began, told = time.monotonic(), -math.inf
    while not is_there(run):
        now = time.monotonic()
        if is_asked():
            say("stopped between two attempts; run the same command again to go on")
            return False
        if now - began > GONE_SECONDS:
            say(f"not launched again: {run.path} is gone, and the run with it")
            return False
        if now - told > TOLD_EVERY:
            told = now
            say(f"waiting: {gone_words(run)}")
        time.sleep(0.1)
    return True

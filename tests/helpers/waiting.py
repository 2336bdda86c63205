"""Waiting for what another process or thread does: for the thing itself, never for a time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds, for what takes a few on an idle machine. Copies and pushes beside training have a core
# only when nobody else wants it (SCHED_IDLE), and five campaigns run at once.
PATIENCE = 300.0


def wait_for(
    look: Callable[[], T | None],
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
    every: float = 0.01,
) -> T:
    """What `look` returns, once that is true.

    Args:
        process: whose end would mean that it never is.
        log: what a failure shows, from its end.
        every: seconds between two looks.

    Raises:
        AssertionError: the process has ended, or it has taken too long.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = (
            process is not None and process.poll() is not None
        )  # ahead of the look: it may be the last
        if found := look():
            return found
        told = "" if log is None else f":\n{log.read_text()[-6000:]}"
        assert not ended, f"the process has ended before that{told}"
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s{told}"
        time.sleep(every)

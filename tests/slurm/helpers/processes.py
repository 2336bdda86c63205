"""Processes by id: started, found below another one, ended; and waiting with an end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.helpers.waiting import PATIENCE

T = TypeVar("T")


def run(*argv: object, check: bool = True, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is in the error when it fails."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, text=True, stdin=subprocess.DEVNULL, capture_output=True, **kwargs)
    if check and done.returncode:
        command = " ".join(words)
        raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def wait_for(
    what: str, look: Callable[[], T | None], timeout: float = PATIENCE, every: float = 0.1
) -> T:
    """What `look` returns, once that is true.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + timeout
    while not (found := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout} s")
        time.sleep(every)
    return found


def facts(pid: int) -> tuple[int, str] | None:
    """Parent and starting time (ids are given out again); None of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def below(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (known := facts(int(entry.name))):
            children.setdefault(known[0], []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def matching(pids: list[int], pattern: str) -> list[int]:
    """Those whose command line holds a pattern."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if re.search(pattern, line):
                found.append(pid)
    return found


def send(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

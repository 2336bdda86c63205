"""Whether a process of this machine is there, as other processes of the machine see it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, so that no other is taken for it.

    Attributes:
        place: what its id counts in: host, boot, and namespace (containers of one host may have
            process ids of their own).
        pid: its id; they are given out again.
        began: when, in ticks since the boot; an id and this are one process's alone.
    """

    place: str
    pid: int
    began: str


def this_process() -> Process | None:
    """None: nobody else could tell whether it is there (no /proc)."""
    try:
        return Process(_place(), os.getpid(), _stat(os.getpid())[1])
    except OSError:
        return None


def is_gone(process: Process | None) -> bool:
    """Whether it has ended, for certain: False also where that cannot be seen from here."""
    try:
        if process is None or process.place != _place():
            return False
        os.kill(process.pid, 0)  # sends nothing
        state, began = _stat(process.pid)
    except ProcessLookupError:
        return True
    except OSError:  # it ends at this moment, or belongs to somebody else
        return False
    return began != process.began or state in "ZX"


@cache
def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> tuple[str, str]:
    """Its state (a letter), and when it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]

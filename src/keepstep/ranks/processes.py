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
        return Process(_place(), os.getpid(), stat_of(os.getpid())[1])
    except OSError:
        return None


def is_gone(process: Process | None) -> bool:
    """Whether it has ended, for certain: False also where that cannot be seen from here."""
    try:
        if process is None or process.place != _place():
            return False
        os.kill(process.pid, 0)  # sends nothing
        state, began = stat_of(process.pid)
    except ProcessLookupError:
        return True
    except OSError:  # it ends at this moment, or belongs to somebody else
        return False
    return began != process.began or state in "ZX"


@cache
def _place() -> str:
    return f"{socket.gethostname()} {boot_id()} {os.readlink('/proc/self/ns/pid')}"


def boot_id() -> str:
    """Another one after each boot of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def stat_of(pid: int) -> tuple[str, str]:
    """A process's state (a letter), and when it began, in ticks since the boot.

    Raises:
        OSError: it is gone, or there is no /proc.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]

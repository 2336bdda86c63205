"""A training of nothing under a watchdog; one rank has its fate: watched.py FATE RANK FILE.

Before that, which FILE tells, nobody is stuck: on a busy machine a step may take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from keepstep.policy.standstill import Standstills
from keepstep.ranks import collectives, listener, watchdog

FATE, VICTIM = sys.argv[1], int(sys.argv[2])
AT, STEPS = 5, 200
STUCK_AFTER = 3 if FATE in ("loader", "forward") else 600
FASTER = 2  # than it is in earnest
MET = Path(sys.argv[3])
for module in (watchdog, listener):
    for name in ("PERIOD", "LATE", "SILENT", "EXPLAIN"):
        if (seconds := vars(module).get(f"{name}_SECONDS")) is not None:
            setattr(module, f"{name}_SECONDS", seconds / FASTER)


def tell(text: str) -> None:
    """In one write: the ranks' lines must not mix."""
    os.write(1, f"{text}\n".encode())


def give_up(reason: str) -> None:
    tell(f"rank {collectives.rank()} ends: {reason}")


def meets_its_fate(fate: str, step: int) -> None:
    if (fate, VICTIM, AT) != (FATE, collectives.rank(), step):
        return
    tell(f"rank {VICTIM} meets its fate")
    MET.touch()
    if fate in ("SIGSTOP", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, fate))
    elif fate == "raises":
        raise ValueError("no such row")
    else:
        threading.Event().wait()


def train(watched: watchdog.Watchdog) -> None:
    for step in range(STEPS):
        meets_its_fate("loader", step)
        watched.progress()
        dist.all_reduce(torch.ones(1))
        meets_its_fate("forward", step)
        for fate in ("SIGSTOP", "SIGKILL", "raises"):
            meets_its_fate(fate, step)
        dist.all_reduce(torch.ones(1))
        watched.progress()
        time.sleep(0.05)


def hurry(standstills: Standstills) -> None:
    """From the victim's fate on."""
    while not MET.exists():
        time.sleep(0.05)
    standstills.least = standstills.most = STUCK_AFTER


dist.init_process_group("gloo")
watched = watchdog.Watchdog(8, Standstills(600, 600), give_up)
threading.Thread(target=hurry, args=(watched.standstills,), daemon=True).start()
watched.start()
try:
    train(watched)
except Exception as error:
    reason = watched.explain(error)
    watched.stop()
    tell(f"rank {collectives.rank()} fails: {reason}")
    sys.exit(70)
watched.stop()
collectives.leave()
tell("done")

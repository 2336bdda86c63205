"""Python ends cleanly after a watched run: its threads are not inside the store any more."""

from __future__ import annotations

import os
import subprocess
import sys

from keepstep.cli.network import free_port
from tests.helpers.waiting import PATIENCE

# In the store when the run ends, by design; otherwise by bad luck. Python aborted at its end then.
SCRIPT = """
import datetime
import time

import torch.distributed as dist
from keepstep.policy.standstill import Standstills
from keepstep.ranks import collectives, watchdog

def slow(self, listener):
    self._store.wait(["an answer"], datetime.timedelta(seconds=3))

watchdog.PERIOD_SECONDS, watchdog.Watchdog._hear = 0.0, slow
dist.init_process_group("gloo")
watched = watchdog.Watchdog(60, Standstills(60, 60), print)
watched.start()
time.sleep(1)
watched.stop()
collectives.leave()
"""


def test_python_ends_without_an_abort() -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors

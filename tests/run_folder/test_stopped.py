"""A process that was stopped, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from keepstep.run_folder.stopped import KEPT, LEAST, Stopped

PROGRAM = """
import sys, time
from keepstep.ranks import signals
from keepstep.ranks.time_sheet import TimeSheet
from keepstep.run_folder.heartbeat import Lookout

class Look(Lookout):
    def look(self):
        print(sheet.told().get("unknown", 0.0), flush=True)

signals.install_handlers()
sheet = TimeSheet()
sheet.at("step")
Look(None, None, None, lambda: 0, stopped=sheet.stopped).start()
while True:
    time.sleep(0.05)
"""


def test_both_have_to_tell() -> None:
    stopped = Stopped()
    assert stopped.seconds(0.0, False) == 0
    assert stopped.seconds(0.1, True) == 0, "it was at work"
    assert stopped.seconds(30.0, False) == 0, "a call that kept all threads out?"
    assert stopped.seconds(5.0, False) == 0
    assert stopped.seconds(0.0, True) == 35, "its main thread hears of it late"
    assert stopped.seconds(0.0, True) == 0
    assert stopped.seconds(LEAST, True) == LEAST
    stopped.seconds(30.0, False)
    for _ in range(KEPT + 1):
        stopped.seconds(0.0, False)
    assert stopped.seconds(0.0, True) == 0, "another signal, much later"


def test_a_process_that_is_stopped() -> None:
    """What it was stopped for is no time of steps. (Again, if it stood where it did not wait.)"""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert float(process.stdout.readline()) == 0.0
            unknown, began = 0.0, time.monotonic()
            while not unknown and time.monotonic() - began < 300:
                process.stdout.readline()
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(4.0)
                os.kill(process.pid, signal.SIGCONT)
                for _ in range(4):
                    unknown = float(process.stdout.readline())
            assert LEAST <= unknown <= time.monotonic() - began
        finally:
            process.kill()

"""A process beside training: it gives way, and is ended with all that it has begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keepstep.run_folder.background import BackgroundJob

PROGRAM = """
import json, os, sys
from keepstep.run_folder.background import serve

def do(job):
    if job["hangs"]:
        import time
        time.sleep(600)
    return {"policy": os.sched_getscheduler(0), "session": os.getsid(0), "group": os.getpgid(0)}

sys.exit(serve(do))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[float, bool], BackgroundJob]:
    (tmp_path / "program_beside.py").write_text(PROGRAM)

    def started(timeout: float, hangs: bool) -> BackgroundJob:
        return BackgroundJob(
            "program_beside",
            {"hangs": hangs},
            timeout,
            who="nobody",
            what="the program",
            environment={"PYTHONPATH": str(tmp_path)},
        )

    return started


def test_training_comes_first(start: Callable[[float, bool], BackgroundJob]) -> None:
    """By the scheduler's idle class, and in training's own session: between sessions a kernel may
    share out the processor whatever their niceness is."""
    job = start(600, False)
    answer = job.wait()
    assert answer["policy"] == os.SCHED_IDLE
    assert answer["session"] == os.getsid(0)
    assert answer["group"] != os.getpgid(0), "Ctrl-C is for the training"


def test_its_time_is_over(start: Callable[[float, bool], BackgroundJob]) -> None:
    job = start(1.0, True)
    assert job.wait() == {
        "error": "nobody did not answer to the end within 1 s",
        "fatal": False,
    }


def test_its_parent_was_killed_before_it_looked(tmp_path: Path) -> None:
    """While it imports; else it would be left behind, up to its deadline."""
    job = {"hangs": True, "timeout": 500, "parent": os.getppid()}  # not the one that it has
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, input=json.dumps(job), text=True, timeout=600, check=False)
    assert ended.returncode == -signal.SIGKILL

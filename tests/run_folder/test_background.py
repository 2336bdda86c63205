"""A process beside training: it gives way, and is ended with all that it has begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepstep.output.progress import Phase
from keepstep.run_folder.background import BackgroundJob
from keepstep.run_folder.how_far import HowFar

PROGRAM = """
import json, os, subprocess, sys, threading, time
from keepstep.run_folder.background import serve
from keepstep.run_folder.how_far import HowFar

def do(job):
    if job["hangs"]:
        time.sleep(600)
    if job["begins more"]:  # until all of it has left its class
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        threads = [*map(int, os.listdir("/proc/self/task")), child.pid]
        while {os.sched_getscheduler(thread) for thread in threads} != {os.SCHED_OTHER}:
            time.sleep(0.01)
        child.kill()
        return {"threads": len(threads)}
    if "phases" in job:
        far = HowFar.of(job)
        far.tell(1, 5, 10)
        with open(job["phases"]) as told:  # a FIFO: until it has been seen
            told.read()
        far.tell(2)
        return {}
    return {"policy": os.sched_getscheduler(0), "session": os.getsid(0), "group": os.getpgid(0)}

sys.exit(serve(do))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., BackgroundJob]:
    (tmp_path / "program_beside.py").write_text(PROGRAM)

    def started(timeout: float, **job: object) -> BackgroundJob:
        return BackgroundJob(
            "program_beside",
            {"hangs": False, "begins more": False, **job},
            timeout,
            who="nobody",
            what="the program",
            environment={"PYTHONPATH": str(tmp_path)},
        )

    return started


def until_over(job: BackgroundJob) -> dict[str, Any]:
    """As training does: nobody waits for it."""
    while (answer := job.poll()) is None:
        time.sleep(0.01)
    return answer


def test_training_comes_first(start: Callable[..., BackgroundJob]) -> None:
    """By the scheduler's idle class, and in training's own session: between sessions a kernel may
    share out the processor whatever their niceness is."""
    answer = until_over(start(600))
    assert answer["policy"] == os.SCHED_IDLE
    assert answer["session"] == os.getsid(0)
    assert answer["group"] != os.getpgid(0), "Ctrl-C is for the training"


def test_what_is_waited_for_does_not_give_way(start: Callable[..., BackgroundJob]) -> None:
    """On a machine that others keep busy, it would not end before they do."""
    assert until_over(start(600, waited_for=True))["policy"] == os.SCHED_OTHER


def test_who_begins_to_wait_has_it_hurry(start: Callable[..., BackgroundJob]) -> None:
    """All its threads, and what it has started."""
    if os.geteuid() != 0:
        pytest.skip("not root: nothing leaves the idle class")
    answer = start(600, **{"begins more": True}).wait()
    assert answer["threads"] >= 3, answer


def test_its_time_is_over(start: Callable[..., BackgroundJob]) -> None:
    job = start(1.0, hangs=True)
    assert job.wait() == {
        "error": "nobody did not answer to the end within 1 s",
        "fatal": False,
    }


def test_it_tells_how_far_it_is(start: Callable[..., BackgroundJob], tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "seen")
    job, told = start(300, phases=str(fifo)), []

    def tell(phase: Phase) -> None:
        if phase.number == 1 and not told:
            told.append(phase)
            fifo.write_text("")

    assert job.wait(tell=tell) == {}
    assert told == [Phase(1, 5, 10)]
    assert job.wait() == {}, "asked again"


def test_what_tells_nothing(tmp_path: Path) -> None:
    """No such memory on this machine, nothing written so far, or half of it."""
    nowhere = HowFar.of({})
    nowhere.tell(1, 2, 3)
    assert (nowhere.read(), nowhere.handed_on) == (Phase(), ())
    nowhere.close()
    torn = HowFar.made()
    assert torn.descriptor is not None
    assert torn.read() == Phase()
    os.pwrite(torn.descriptor, b"\1" * 5, 0)
    assert torn.read() == Phase()
    torn.tell(2, 4, 8)
    assert torn.read() == Phase(2, 4, 8)
    torn.close()
    torn.tell(2, 5, 8)
    assert torn.read() == Phase()


def test_one_that_cannot_be_started_leaves_nothing_open(
    start: Callable[..., BackgroundJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        start(60)
    assert os.listdir("/proc/self/fd") == before


def test_its_parent_was_killed_before_it_looked(tmp_path: Path) -> None:
    """While it imports; else it would be left behind, up to its deadline."""
    job = {"hangs": True, "timeout": 500, "parent": os.getppid()}  # not the one that it has
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, input=json.dumps(job), text=True, timeout=600, check=False)
    assert ended.returncode == -signal.SIGKILL

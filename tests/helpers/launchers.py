"""Starts launchers as a user's shell does, and waits for what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE, wait_for

TIMEOUT = PATIENCE
HOOKS = ROOT / "tests/slurm/helpers/hooks"
_started: list[psutil.Process] = []


def hear_signals() -> None:
    """In a new process: a shell's background jobs ignore INT, and what nohup starts HUP; both hand
    that on, and neither could be tested."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(
    command: list[str], log: Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """
    Args:
        env: beside this process's own.
    """
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=hear_signals,
        )
    watch(process.pid)
    return process


def faults(file: Path, **values: object) -> dict[str, str]:
    """The environment of a launch in which that goes wrong: see hooks/sitecustomize.py. What the
    file holds when an attempt's ranks begin counts for it."""
    file.write_text(json.dumps(values))
    return {"PYTHONPATH": str(HOOKS), "KEEPSTEP_FAULTS": str(file)}


def watch(pid: int) -> None:
    """See to it that a process and its children do not outlive the test."""
    _started.append(psutil.Process(pid))


def clear() -> None:
    """End what a test has left behind."""
    while _started:
        process = _started.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*process.children(recursive=True), process]:
                one.kill()


def end(process: subprocess.Popen[bytes], log: Path, timeout: float = TIMEOUT) -> tuple[int, str]:
    try:
        return process.wait(timeout), log.read_text()
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-6000:]}") from None


def wait_until(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    wait_for(lambda: text in log.read_text(), process, log)

"""A process is gone when it has ended, and is never taken for another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from keepstep.ranks.processes import Process, is_gone, this_process
from tests.helpers.waiting import wait_for

CODE = """
from keepstep.ranks.processes import this_process
p = this_process()
print(p.place, p.pid, p.began, sep="|", flush=True)
input()
"""


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], Process]]:
    command, pipe = [sys.executable, "-c", CODE], subprocess.PIPE
    running = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe)
    assert running.stdout is not None
    place, pid, began = running.stdout.readline().strip().split("|")
    yield running, Process(place, int(pid), began)
    running.kill()
    running.communicate()


def test_while_it_lives_and_once_it_has_ended(child: tuple[subprocess.Popen[str], Process]) -> None:
    running, process = child
    assert process.pid == running.pid
    assert not is_gone(process)
    running.kill()
    wait_for(lambda: is_gone(process))  # a zombie: nobody has waited for it
    running.wait()
    assert is_gone(process)


def test_an_id_that_was_given_out_again() -> None:
    own = this_process()
    assert own is not None
    assert own.pid == os.getpid()
    assert not is_gone(own)
    assert is_gone(replace(own, began="1"))


def test_what_cannot_be_seen_from_here_is_not_gone(
    child: tuple[subprocess.Popen[str], Process],
) -> None:
    """Another machine, another boot, another container's ids."""
    running, process = child
    running.kill()
    running.wait()
    assert is_gone(process)
    assert not is_gone(replace(process, place=f"{process.place} elsewhere"))
    assert not is_gone(None)

"""The parts of a start, by name."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from keepstep.ranks import start_up
from keepstep.ranks.start_up import StartUp


def test_what_lies_between_two_ends_is_the_time_of_the_later_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = StartUp(10.0)
    for moment, part in ((14.0, "imports"), (14.5, "model"), (16.5, "choice"), (17.0, "model")):
        monkeypatch.setattr(start_up, "now", lambda moment=moment: moment)
        start.ended(part)
    assert start.seconds == {"imports": 4.0, "model": 1.0, "choice": 2.0}
    assert sum(start.seconds.values()) == 17.0 - 10.0


def test_a_process_begins_when_the_kernel_says() -> None:
    before = start_up.now()
    code = "from keepstep.ranks import start_up; print(start_up.began())"
    began = float(subprocess.check_output([sys.executable, "-c", code], text=True))
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - tick <= began <= start_up.now()
    assert start_up.began() < before
    assert abs(time.clock_gettime(time.CLOCK_BOOTTIME) - start_up.now()) < 60

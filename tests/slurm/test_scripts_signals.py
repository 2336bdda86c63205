"""A job hears of its end at any moment: by job.py, since bash loses signals. No Slurm is needed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.helpers.fakes import Fakes
from tests.slurm.helpers.processes import wait_for

AGAIN_AND_AGAIN = "RETRY_SECONDS=0\nMAX_ATTEMPTS=1000"
EACH = {
    "srun of the nodes' names": ("srun", "--job-name=prepare"),
    "srun of an attempt": ("srun", "--job-name=attempt-2"),
    "scontrol of the job": ("scontrol", "show job"),
    "scontrol of a node": ("scontrol", "show node"),
}


def failing(folder: Path) -> Fakes:
    """A job whose attempts fail at once: most of its time passes between two of them."""
    return Fakes(folder, "exit 1", AGAIN_AND_AGAIN)


def ended_by_slurm(fakes: Fakes, before: int) -> None:
    """With no further attempt but one that was on its way as the signal came."""
    code, output = fakes.end()
    assert code == 143, output
    assert output.count("TERM: this job is to end") == 1
    assert len(fakes.launches()) <= before + 1, output


@pytest.mark.parametrize("call", EACH)
def test_told_to_end_while_it_asks_others(tmp_path: Path, call: str) -> None:
    fakes = failing(tmp_path)
    program, words = EACH[call]
    file = fakes.bin / program
    tell = f'[[ ! -s $FAKE/step || "$*" != *"{words}"* ]] || kill -TERM "$(<"$FAKE/pid")"'
    file.write_text(file.read_text().replace("bash\n", f"bash\n{tell}\n", 1))
    fakes.start()
    ended_by_slurm(fakes, before=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_without_end(tmp_path: Path, number: int) -> None:
    """Whatever the job is at, one of them comes then; all together say one thing."""
    fakes = failing(tmp_path)
    process = fakes.start()
    fakes.wait_for_launch()
    before = len(fakes.launches())
    while process.poll() is None and not fakes.requeues():
        process.send_signal(number)
        time.sleep(0.0005)
    code, output = fakes.end()
    assert code == 143, output
    assert len(fakes.launches()) <= before + 1
    assert fakes.requeues() == (number == signal.SIGUSR1)
    assert output.count("the time limit is near") == (number == signal.SIGUSR1)
    assert output.count("TERM: this job is to end") == 1


def test_told_to_end_after_the_time_limit(tmp_path: Path) -> None:
    """Slurm does not wait until the job has queued itself again."""
    fakes = Fakes(tmp_path, "trap '' USR1; while :; do beat; sleep 0.1; done", "GRACE_SECONDS=1")
    process = fakes.start()
    fakes.wait_for_launch()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        process.send_signal(number)
    code, output = fakes.end()
    assert code == 143, output
    assert "not saved in time: this attempt is ended" in output
    assert fakes.requeues() == 0


def test_all_processes_of_the_job_are_told(tmp_path: Path) -> None:
    """As Slurm does; what the attempt says at its end is written down."""
    body = "trap 'told=1' TERM\n: >$FAKE/ready\nwhile [[ -z ${told:-} ]]; do sleep 0.1; done\n"
    fakes = Fakes(tmp_path, f"{body}echo 'my last words'; commit 5; exit 75")
    process = fakes.start()
    wait_for("the attempt", (fakes.folder / "ready").exists, 300)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = fakes.end()
    assert code == 143, output
    assert "my last words" in output
    assert "my last words" in (fakes.private / "logs/7.0.1.log").read_text()
    (event,) = map(json.loads, (fakes.private / "events.jsonl").read_text().splitlines()[1:])
    assert (event["event"], event["exit"], event["step"]) == ("launch", 75, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_before_it_listens(tmp_path: Path, number: int) -> None:
    """While the site's own is read: the job is over, and nothing has begun."""
    fakes = Fakes(tmp_path, "exit 1", ': >"$FAKE/reads"; for i in {1..3000}; do sleep 0.1; done')
    process = fakes.start()
    wait_for("site.env", (fakes.folder / "reads").exists, 300)
    process.send_signal(number)
    code, output = fakes.end()
    assert code == -number, output
    assert fakes.calls == []


@pytest.fixture
def several() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.long
def test_told_to_end_at_any_moment(tmp_path: Path, several: ThreadPoolExecutor) -> None:
    """At random, with more at work than there are processors."""

    def one(number: int) -> None:
        fakes = failing(tmp_path / str(number))
        process = fakes.start()
        fakes.wait_for_launch()
        time.sleep(random.random() * 2)
        before = len(fakes.launches())
        process.send_signal(signal.SIGTERM)
        ended_by_slurm(fakes, before)

    list(several.map(one, range(200)))

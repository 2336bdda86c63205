"""The loop of docs/mirror.md, on machines that are lost one after the other."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
from pathlib import Path

import psutil

from keepstep.run_folder.reader import RunFolder
from tests.helpers.launchers import TIMEOUT, end, faults, start, wait_until
from tests.helpers.recipes import argv
from tests.helpers.waiting import wait_for
from tests.project.documents import blocks


def kill(pid: int) -> None:
    """A machine's power is gone."""
    machine = psutil.Process(pid)
    for process in [machine, *machine.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # helpers of the script come and go
            process.kill()


def ranks_of(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "keepstep.train" in " ".join(process.cmdline()[:4]):
                found.append(process)
    return found


def test_until_it_is_finished(demo: Path, tmp_path: Path) -> None:
    """Lost with its disk, killed but not lost, asked to stop: each time the same lines."""
    (loop,) = [b.text for b in blocks("bash") if b.note == "run on machines that are lost"]
    flags = argv(demo, tmp_path / "run", save_steps=6, eval_steps=6, max_steps=60)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs))
    text = loop.replace("recipe.yaml", str(recipe)).replace("sleep 30", "sleep 0.1")
    mirror = f"export KEEPSTEP_MIRROR={(tmp_path / 'mirror').as_uri()}\n"
    command, log = ["bash", "-c", mirror + text], tmp_path / "log"

    # A copy has the processor when nobody else wants it: the run must not be over before.
    first = start(command, log, env=faults(tmp_path / "faults", step_seconds=4, **{"from": 8}))
    wait_until(log, "mirrored checkpoint-", first)
    kill(first.pid)
    first.wait(TIMEOUT)
    shutil.rmtree(tmp_path / "run")

    second = start(command, log, env=faults(tmp_path / "faults", hold=55))
    wait_until(log, "carrying on from checkpoint-", second)
    for rank in ranks_of(second.pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # its launcher was faster
            rank.kill()
    twice = re.compile("(?s)carrying on from.*carrying on from.*  loss ")
    wait_for(lambda: twice.search(log.read_text()), second, log)
    for process in psutil.Process(second.pid).children():
        process.send_signal(signal.SIGTERM)
    code, output = end(second, log)
    assert code == 0, output
    assert "Stopped on request (SIGTERM" in output
    stopped = RunFolder(tmp_path / "run").checkpoints()[-1].step
    shutil.rmtree(tmp_path / "run")

    last = start(command, log)
    code, output = end(last, log)
    assert code == 0, output
    assert f"carrying on from checkpoint-{stopped}" in output
    assert "Finished: 60 steps." in output

"""`launch/train.sh --retries N`: a workstation's run that comes back by itself."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.helpers.launchers import TIMEOUT, end, faults, start, wait_until
from tests.helpers.recipes import argv
from tests.helpers.waiting import wait_for

STEPS = 44


def recipe_of(demo: Path, folder: Path, **fields: object) -> Path:
    flags = argv(demo, folder / "run", **{"eval_steps": 4, "max_steps": STEPS, **fields})
    pairs = zip(flags[::2], flags[1::2], strict=True)
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs))
    return path


def below(process: subprocess.Popen[bytes], what: str) -> list[psutil.Process]:
    """What the command has started: `ranks`, their `launcher`, its `script`."""
    words = {"ranks": "-m keepstep.train", "launcher": "accelerate-launch", "script": "bash"}[what]
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(one.cmdline()[:4]):
                found.append(one)
    return found


def kill(processes: list[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in (folder / "run").glob("checkpoint-*")]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    state = json.loads((folder / f"run/checkpoint-{STEPS}/trainer_state.json").read_text())
    return [(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e]


@pytest.mark.parametrize("first", [3, pytest.param(0, marks=pytest.mark.long)])
def test_killed_again_and_again(demo: Path, tmp_path: Path, first: int) -> None:
    """A rank, the launcher, everything but the command, its script, and ranks in a save."""
    recipe = recipe_of(demo, tmp_path / "killed", save_steps=4)
    folder, log, file = tmp_path / "killed", tmp_path / "log", tmp_path / "faults"
    command = ["launch/train.sh", str(recipe), "--retries", "3"]
    process = start(command, log, env=faults(file, hold=STEPS - 4))

    def everything() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    def goes_on(newest: int) -> bool:
        return max([0, *steps_of(folder)]) > newest

    def launched_again(times: int) -> bool:
        return log.read_text().count("launching again") > times

    kills: list[Callable[[], list[psutil.Process]]] = [
        lambda: below(process, "ranks")[1:],
        lambda: below(process, "launcher"),
        everything,
        lambda: below(process, "script"),
    ]
    for number, victims in enumerate(kills[first:]):
        newest = max([0, *steps_of(folder)])
        wait_for(partial(goes_on, newest), process, log)
        if victims is kills[-1]:  # the next attempt stands still in its first save
            faults(file, place="save", seconds=TIMEOUT)
        kill(victims())
        wait_for(partial(launched_again, number), process, log)
    wait_for(lambda: Path(f"{file}.fired").exists(), process, log)
    faults(file)
    kill(everything())

    code, output = end(process, log)
    assert code == 0, output
    assert output.count("launching again from checkpoint-") == 5 - first, output
    assert f"Finished: {STEPS} steps." in output

    straight = recipe_of(demo, tmp_path / "straight", save_steps=4)
    code, told = end(start(["launch/train.sh", str(straight)], log), log)
    assert code == 0, told
    assert losses_of(folder) == losses_of(tmp_path / "straight")
    ends = [tmp_path / name / f"run/checkpoint-{STEPS}" for name in ("killed", "straight")]
    weights = [(path / "model.safetensors").read_bytes() for path in ends]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.long
def test_a_stop_is_no_failure(demo: Path, tmp_path: Path, number: int) -> None:
    """It saves, and is not launched again."""
    recipe = recipe_of(demo, tmp_path / "one", save_steps=4, max_steps=10000)
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe), "--retries", "3"], log)
    wait_until(log, "step     2/10000  loss", process)
    process.send_signal(number)
    code, output = end(process, log)
    assert code == 75, output
    assert "launching again" not in output
    status = json.loads((tmp_path / "one/run/.keepstep/status.json").read_text())
    assert status["global_step"] in steps_of(tmp_path / "one")

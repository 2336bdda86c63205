"""Saves by the clock and on request, deadlines, and stops that do not wait for an evaluation."""

from __future__ import annotations

import errno
import json
import re
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.auto_interval import length_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.faulty_disk import faulty_disk
from tests.helpers.ranks import PROGRAMS, Ranks, Run
from tests.helpers.recipes import argv
from tests.helpers.waiting import PATIENCE, wait_for

SHIM = PROGRAMS / "shimmed.py"
LONG = {"max_steps": 100_000, "eval_strategy": "no", "keep_ranking": "recency"}
FIRST = {"max_steps": 8, "save_steps": 2, "eval_strategy": "no", "keep_ranking": "recency"}


def status(run: Path) -> dict:
    return json.loads((run / ".keepstep/status.json").read_text())


def keepstep(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("strategy", cases(["cpu_zero3", "ddp"], long=["ddp"]))
def test_saves_by_the_clock_and_on_request(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    command = argv(demo, run, **LONG, save_steps=90_000, save_interval_seconds=2)
    started = ranks.start(command, strategy=strategy)
    started.wait_for(r"(?s)saved checkpoint-.*saved checkpoint-")
    count = started.output.count("saved checkpoint-")
    assert "asked for" in keepstep("save-now", str(run))
    wait_for(lambda: not (run / ".keepstep/save-now").exists())
    started.wait_for("(?s)" + "saved checkpoint-.*" * (count + 1))
    keepstep("stop", str(run))
    assert started.wait() == [75, 75]
    assert "Stopped on request (keepstep stop)" in started.output
    assert (status(run)["outcome"], status(run)["reason"]) == ("preempted", "keepstep stop")
    assert RunFolder(run).checkpoints()[-1].step == status(run)["global_step"]
    ended = CliRunner().invoke(app, ["stop", str(run)])
    assert ended.exit_code == 2
    assert "its last attempt has ended" in ended.stdout


@pytest.mark.parametrize("fault", cases(["none", "slow"], long=["slow"]))
def test_a_deadline_is_kept(ranks: Ranks, demo: Path, tmp_path: Path, fault: str) -> None:
    """As long as saves were seen to last: the shim makes every part take two seconds."""
    run = tmp_path / "run"
    ranks.run([fault, *argv(demo, run, **FIRST)], script=SHIM)
    seconds, margin = (12, 5) if fault == "none" else (20, 5)
    later = datetime.fromtimestamp(time.time() + 3600).isoformat()
    fields = LONG | {"save_steps": 90_000, "deadline": later, "stop_margin_seconds": margin}
    started = ranks.start([f"{fault}+{seconds}", *argv(demo, run, **fields)], script=SHIM)
    assert started.wait() == [75, 75]
    (moment,) = re.findall(r"the job ends at ([\d.]+)", started.output)
    deadline = float(moment)
    told = "Stopped in time for the deadline (deadline, time_limit, or the job's end) after step"
    assert told in started.output
    last = RunFolder(run).checkpoints()[-1]
    assert last.step == status(run)["global_step"] > 8
    committed = (last.path / "manifest.json").stat().st_mtime
    assert deadline - seconds < committed < deadline
    saves = RunFolder(run).commits()
    needed = max(map(length_of, saves)) + 2 * saves[-1]["longest_step"] + margin
    assert deadline - committed < needed + 0.1, "not too early either"


@pytest.mark.parametrize("strategy", cases(["cpu_zero3", "cpu_zero2"], long=["cpu_zero2"]))
def test_saves_by_what_they_cost(ranks: Ranks, demo: Path, tmp_path: Path, strategy: str) -> None:
    """`auto`: one after the other, on all ranks; killed, the next attempt knows what they cost."""
    run = tmp_path / "run"
    auto = {"save_interval_seconds": "auto", "save_min_seconds": 0.5, "max_save_overhead": 0.2}
    command = argv(demo, run, **LONG, save_steps=90_000, **auto)
    started = ranks.start(command, strategy=strategy)
    started.wait_for(r"auto: the first save comes after 0.5 s(?s:.*)auto: a save about every")
    started.wait_for("(?s)" + "saved checkpoint-.*" * 3)
    started.kill(signal.SIGKILL, ranks=[0, 1])
    started.wait()
    again = ranks.start(command, strategy=strategy)
    again.wait_for(r"auto: a save about every [\d.]+ s(?s:.*)saved checkpoint-")
    assert "carrying on from checkpoint-" in again.output
    assert "the first save comes" not in again.output
    keepstep("stop", str(run))
    assert again.wait() == [75, 75]
    *saves, last = RunFolder(run).commits()
    assert {save["why"] for save in saves} == {"interval"}
    assert last["why"] == "stop"
    steps_saved = [save["step"] for save in saves if save["attempt"] == 1]
    assert steps_saved == sorted(set(steps_saved)), "one at a time"
    assert "was not saved" not in started.output + again.output
    told = keepstep("ls", str(run), "--verbose")
    assert "save_interval_seconds: auto: at last" in told
    assert "interval" in told


@pytest.mark.parametrize("strategy", cases(["cpu_zero3", "ddp"], long=["ddp"]))
def test_a_signal_during_evaluation(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    """It is broken off at its next batch, on every rank; the step is saved without a metric."""
    run = tmp_path / "run"
    command = argv(demo, run, max_steps=8, per_device_eval_batch_size=1)
    started = ranks.start(["longer", *command], strategy=strategy, script=SHIM)
    started.wait_for("evaluation of step 4 begins")
    started.kill(signal.SIGTERM, ranks=[1])
    assert started.wait() == [75, 75]
    assert "eval_loss" not in started.output
    (checkpoint,) = RunFolder(run).checkpoints()
    assert (checkpoint.step, checkpoint.manifest.metrics) == (4, {})
    again = ranks.run(["none", *command], strategy=strategy, script=SHIM)
    assert "carrying on from checkpoint-4" in again.output
    assert [c.step for c in RunFolder(run).checkpoints()] == [4, 8]
    assert RunFolder(run).checkpoint(4).manifest.metrics["eval_loss"] > 0, "made up"


def test_requests_in_the_last_steps_evaluation(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """It is the longest there is, and hears what steps hear: it is saved in its middle, then broken
    off; the run has not finished."""
    run = tmp_path / "run"
    command = argv(demo, run, max_steps=4, per_device_eval_batch_size=1)
    started = ranks.start(["longer", *command], script=SHIM)
    started.wait_for("evaluation of step 4 begins")
    keepstep("save-now", str(run))
    wait_for((run / "checkpoint-4").exists)
    assert None in started.poll()
    assert "eval_loss" not in started.output
    keepstep("stop", str(run))
    assert started.wait() == [75, 75]
    assert "eval_loss" not in started.output
    ended = status(run)
    assert (ended["outcome"], ended["reason"]) == ("preempted", "keepstep stop")
    assert (ended["global_step"], RunFolder(run).checkpoints()[-1].step) == (4, 4)
    assert RunFolder(run).requests() == ()


@pytest.mark.long
def test_a_run_folder_that_fails_or_does_not_answer(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """Looks and signs of life are made beside training; a stop is heard once it answers again."""
    with faulty_disk(tmp_path / "disk") as disk:
        run = disk.folder / "run"
        started = ranks.start(argv(demo, run, **LONG, save_steps=90_000))
        started.wait_for(r"step +3/\d+  loss")
        disk.fail("getattr", "run/.keepstep/stop", errno.EIO)
        started.wait_for("the run folder: looking for stop: Input/output error")
        disk.hang("*", "run/.keepstep/*")
        fired = len(disk.fired)
        while len(disk.fired) == fired:
            assert None in started.poll()
        before = steps(started)
        deadline = time.monotonic() + PATIENCE
        while steps(started) < before + 15:  # the thread beside training hangs meanwhile
            assert None in started.poll(), started.output[-3000:]
            assert time.monotonic() < deadline, "training waits for the folder"
            time.sleep(0.1)
        disk.heal()
        keepstep("stop", str(run))
        assert started.wait() == [75, 75]
        assert "Stopped on request (keepstep stop)" in started.output
        assert RunFolder(run).checkpoints()[-1].step == status(run)["global_step"]


def steps(run: Run) -> int:
    return max(map(int, re.findall(r"step +(\d+)/", run.output)))


def test_old_requests_are_void(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".keepstep").mkdir(parents=True)
    (run / ".keepstep/stop").touch()
    ranks.run(argv(demo, run, **FIRST))
    assert status(run)["outcome"] == "finished"

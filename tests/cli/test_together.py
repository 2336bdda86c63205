"""`launch/train.sh --nnodes MIN:MAX` of one machine: what it refuses, waits for, and hands on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.run_folder.machines import MachinesFolder
from keepstep.run_folder.reader import RunFolder
from tests.cli.test_again import ATTEMPT, MOVED, Attempts, ask_to_stop
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE, wait_for

LONG = pytest.mark.long
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    made = Attempts(tmp_path)
    made.environment |= {"KEEPSTEP_PROCESSES": "1", "KEEPSTEP_JOIN_SECONDS": "3"}
    return made


def start(attempts: Attempts, plan: str, nnodes: str) -> subprocess.Popen[str]:
    return attempts.start(plan, 3, "-m", "keepstep.cli.together", nnodes)


def run_of(attempts: Attempts) -> RunFolder:
    return RunFolder(attempts.folder / "run")


@pytest.mark.parametrize("status", [0, *(pytest.param(n, marks=LONG) for n in (2, 75, 76))])
def test_handed_on(attempts: Attempts, status: int) -> None:
    if status == 76:
        said = '{"outcome": "no_progress", "reason": "three crashes in a row", "exit": 76}'
        (attempts.folder / "said").write_text(said)
    process = start(attempts, str(status), "1")
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, told
    assert attempts.made() == [":1"]
    assert run_of(attempts).owner() == MachinesFolder(run_of(attempts)).plan().token
    files = [sign.has_left for sign in MachinesFolder(run_of(attempts)).signs().values()]
    assert files == [True]


def wait_for_mark(attempts: Attempts, process: subprocess.Popen[str]) -> None:
    wait_for(
        lambda: any(s.beat > 1 for s in MachinesFolder(run_of(attempts)).signs().values()), process
    )


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, None, *(pytest.param(n, marks=LONG) for n in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_stop_while_too_few_are_there(attempts: Attempts, how: signal.Signals | None) -> None:
    """None: `keepstep stop`."""
    process = start(attempts, "0", "2:3")
    wait_for_mark(attempts, process)
    ask_to_stop(attempts, process, how)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, told
    assert "stopped" in told
    assert not (attempts.folder / "attempts").exists()
    assert not run_of(attempts).request("stop").exists()


def test_what_it_waits_for(attempts: Attempts) -> None:
    """Another command of this machine is refused; a stop from before is not obeyed."""
    run_of(attempts).request("stop").write_text("")
    process = start(attempts, "0", "2:3")
    assert process.stderr is not None
    line = process.stderr.readline()
    if "warning: this run folder looks like" in line:
        line = process.stderr.readline()
    assert "waiting: 1 of 2 machines are there" in line
    other = start(attempts, "0", "2:3")
    _, told = other.communicate(timeout=PATIENCE)
    assert other.returncode == 2
    assert f"is being trained on this machine already (process {process.pid})" in told
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_two_commands_of_one_machine_at_the_same_moment(attempts: Attempts) -> None:
    """One of them waits for another machine, and the other one is refused."""
    pair = [start(attempts, "0", "2:3") for _ in range(2)]
    wait_for(lambda: any(process.poll() is not None for process in pair))
    waiting, refused = sorted(pair, key=lambda process: process.poll() is not None)
    _, told = refused.communicate(timeout=300)
    assert refused.returncode == 2
    assert f"is being trained on this machine already (process {waiting.pid})" in told
    assert waiting.poll() is None
    waiting.kill()
    waiting.communicate(timeout=300)


def test_a_run_that_is_gone_is_waited_for(attempts: Attempts) -> None:
    attempts.program(attempts.folder / "attempt", ATTEMPT.replace("exit $", f"{MOVED}exit $"))
    process = start(attempts, "70 0", "1")
    assert process.stderr is not None
    assert any("is not begun anew in its place" in line for line in process.stderr)
    (attempts.folder / "away").rename(run_of(attempts).path)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert attempts.made() == [":1", ":1"]


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (["--nnodes", "3:1"], {}, "3:1 is no range of machines"),
        (["--nnodes", "0"], {}, "0 is no range of machines"),
        (["--nnodes=two"], {}, "'two' is neither N nor MIN:MAX"),
        (["--nnodes"], {}, "'none' is neither N nor MIN:MAX"),
        (["--nnodes="], {}, "'none' is neither N nor MIN:MAX"),
        (["--nnodes=1:2", "--retries", "x"], {}, "--retries: x is no number"),
        (["--nnodes=1:2", "--node_local", "true"], {}, "a run folder that all see"),
        (["--nnodes=1:2", "--output_dir="], {}, "names no output_dir"),
        (["--nnodes=1:2"], {"KEEPSTEP_JOIN_SECONDS": "1"}, "1 is no number of seconds"),
        (["--nnodes=1:2"], {"KEEPSTEP_LAUNCH_ARGS": "--num_machines 2"}, "unset KEEPSTEP_LAUNCH"),
        (["--nnodes=1:2"], {"KEEPSTEP_EXIT_FILE": "/dev/null"}, "Slurm has given a job its nodes"),
        (["--nnodes=1:2"], {"KEEPSTEP_EVALUATE": "x"}, "an evaluation is one machine's"),
    ],
)
def test_refused(flags: list[str], variables: dict[str, str], said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\n")
    result = subprocess.run(
        ["launch/train.sh", str(recipe), *flags],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "run").exists()

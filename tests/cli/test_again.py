"""`launch/train.sh --retries N` decides: a script of a few lines takes the launcher's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.cli import gpus
from tests.helpers.launchers import hear_signals
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE, wait_for

# Each attempt ends as the next line of `plan` says: an exit status, `+` behind it for a checkpoint
# before; `said` is what the run itself tells of its end.
ATTEMPT = """#!/bin/bash
cd "$(dirname "$0")"
echo "$CUDA_VISIBLE_DEVICES:$KEEPSTEP_PROCESSES" >>attempts
line=$(sed -n "$(wc -l <attempts)p" plan)
if [[ $line == *+ ]]; then
  commit='{"time": "2026-11-27T04:00:00.000+00:00", "attempt": 1, "event": "commit", "step": 10}'
  echo "$commit" >>run/.keepstep/events.jsonl
fi
[[ ! -e said ]] || cp said "$KEEPSTEP_SCRATCH/status.json"
exit ${line%+}
"""
AT_ONCE = "from keepstep.cli import again; again.Supervisor.retry_seconds = 0; again.main()"


class Attempts:
    """A folder with a recipe, a run, and what takes the launcher's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run/.keepstep").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "recipe.yaml").write_text(f"output_dir: {folder}/run\n")
        self.program(folder / "attempt", ATTEMPT)
        self.environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, plan: str, retries: int, *how: str) -> subprocess.Popen[str]:
        (self.folder / "plan").write_text("\n".join(plan.split()) + "\n")
        command = [sys.executable, *(how or ("-c", AT_ONCE)), str(retries)]
        return subprocess.Popen(
            [*command, str(self.folder / "attempt"), str(self.folder / "recipe.yaml")],
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=hear_signals,
        )

    def result(self, plan: str, retries: int) -> tuple[int, str]:
        process = self.start(plan, retries)
        _, told = process.communicate(timeout=300)
        return process.returncode, told

    def made(self) -> list[str]:
        return (self.folder / "attempts").read_text().split()


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    return Attempts(tmp_path)


@pytest.mark.parametrize("status", [0, 2, 75])
def test_handed_on(attempts: Attempts, status: int) -> None:
    assert attempts.result(f"{status} 0", 3)[0] == status
    assert len(attempts.made()) == 1


def test_no_progress_is_handed_on(attempts: Attempts) -> None:
    said = {"outcome": "no_progress", "reason": "three crashes in a row", "exit": 76}
    (attempts.folder / "said").write_text(json.dumps(said))
    assert attempts.result("76 0", 3)[0] == 76
    assert len(attempts.made()) == 1


def test_what_failed_is_launched_again(attempts: Attempts) -> None:
    code, told = attempts.result("70 137 139 0", 3)
    assert code == 0, told
    assert len(attempts.made()) == 4
    assert "retry 3 of 3, no new checkpoint" in told


def test_given_up(attempts: Attempts) -> None:
    """Of the attempts in a row; a new checkpoint begins the count anew."""
    code, told = attempts.result("70 70 70+ 70 137 70 0", 2)
    assert code == 76, told
    assert len(attempts.made()) == 6
    assert "3 attempts in a row without a new checkpoint" in told


def test_what_another_command_saves_is_no_progress(attempts: Attempts) -> None:
    """Launched twice: the second one is refused, and gives up however long the first trains."""
    said = {"outcome": "failed", "reason": "is being trained", "global_step": None, "exit": 70}
    (attempts.folder / "said").write_text(json.dumps(said))
    code, told = attempts.result("70+ 70+ 70+ 0", 2)
    assert code == 76, told
    assert len(attempts.made()) == 3


def test_a_model_that_is_not_published_is_trained(attempts: Attempts) -> None:
    said = {"outcome": "finished", "reason": "the Hub did not answer", "exit": 70}
    (attempts.folder / "said").write_text(json.dumps(said))
    code, told = attempts.result("70 0", 3)
    assert code == 70
    assert len(attempts.made()) == 1
    assert "the Hub did not answer" in told
    assert "keepstep push" in told


def wait_for_mark(attempts: Attempts, process: subprocess.Popen[str]) -> None:
    mark = attempts.folder / "run/.keepstep/retry-waits"
    wait_for(lambda: mark.exists() and mark.read_text(), process)


def ask_to_stop(
    attempts: Attempts, process: subprocess.Popen[str], how: signal.Signals | None
) -> None:
    """None: by `keepstep stop`, which says that it is heard at once."""
    if how is None:
        keepstep = str(Path(sys.executable).parent / "keepstep")
        stop = [keepstep, "stop", str(attempts.folder / "run")]
        answer = subprocess.run(stop, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "ends now" in answer.stdout + answer.stderr
    else:
        process.send_signal(how)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, None])
def test_a_stop_during_the_pause(attempts: Attempts, how: signal.Signals | None) -> None:
    """None: `keepstep stop`, also where the attempt before has told of its end."""
    (attempts.folder / "run/.keepstep/status.json").write_text("{}")
    pause = "from keepstep.cli import again; again.Supervisor.retry_seconds = 1000; again.main()"
    process = attempts.start("70 0", 3, "-c", pause + "  # keepstep.cli.again")
    wait_for_mark(attempts, process)
    ask_to_stop(attempts, process, how)
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, told
    assert len(attempts.made()) == 1
    assert "stopped between two attempts" in told
    assert not list((attempts.folder / "run/.keepstep").glob("retry-waits"))
    assert not (attempts.folder / "run/.keepstep/stop").exists()


MOVED = """
[[ $(wc -l <attempts) != 1 ]] || mv run away
"""


def gone(attempts: Attempts, plan: str) -> subprocess.Popen[str]:
    """A command that waits for its run folder, which was moved away in the first attempt."""
    attempts.program(attempts.folder / "attempt", ATTEMPT.replace("exit $", f"{MOVED}exit $"))
    process = attempts.start(plan, 3)
    assert process.stderr is not None
    for line in process.stderr:
        if "is not begun anew in its place" in line:
            return process
    raise AssertionError("it was begun anew")


def test_a_run_that_is_gone_is_not_begun_anew(attempts: Attempts) -> None:
    """A file system that is not mounted now, say; what was saved there is still known."""
    process = gone(attempts, "70+ 0")
    assert len(attempts.made()) == 1
    (attempts.folder / "away").rename(attempts.folder / "run")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert len(attempts.made()) == 2


def test_a_stop_while_the_run_is_gone(attempts: Attempts) -> None:
    process = gone(attempts, "70 0")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 75, told
    assert len(attempts.made()) == 1


def test_a_run_that_does_not_come_back(attempts: Attempts) -> None:
    (attempts.folder / "plan").write_text("70\n0\n")
    briefly = f"from keepstep.cli import gone; gone.GONE_SECONDS = 0.0; {AT_ONCE}"
    attempts.program(attempts.folder / "attempt", ATTEMPT.replace("exit $", f"{MOVED}exit $"))
    process = attempts.start("70 0", 3, "-c", briefly)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 70, told
    assert "not launched again" in told
    assert len(attempts.made()) == 1


@pytest.mark.parametrize("how", ["rm -rf $TMPDIR", "rm -rf $TMPDIR && touch $TMPDIR"])
def test_the_folder_of_temporary_files_is_gone(attempts: Attempts, how: str) -> None:
    """As where something tidies /tmp: the next attempt is launched all the same."""
    attempts.environment["TMPDIR"] = str(attempts.folder / "temporary")
    (attempts.folder / "temporary").mkdir()
    attempts.program(attempts.folder / "attempt", ATTEMPT.replace("exit $", f"{how}\nexit $"))
    code, told = attempts.result("70 75", 3)
    assert (code, len(attempts.made())) == (75, 2), told


def test_what_cannot_be_launched(attempts: Attempts) -> None:
    """Too many processes, say: an attempt that has failed."""
    attempts.program(attempts.folder / "attempt", ATTEMPT.replace("exit $", "chmod -x $0\nexit $"))
    code, told = attempts.result("70 0", 2)
    assert code == 76, told
    assert "it could not be launched: [Errno 13]" in told


SMI = """#!/bin/bash
[[ $* != *--list-gpus* ]] || exit 0
[[ ! -s {folder}/attempts || " {gone} " != *" ${{!#}} "* ]] || exit 15
echo uuid
"""


def test_a_gpu_is_lost(attempts: Attempts) -> None:
    """Three of four are refused, as they do not divide the rows of a step: then it is two."""
    attempts.program(attempts.folder / "bin/nvidia-smi", SMI.format(folder=attempts.folder, gone=2))
    attempts.environment |= {
        "PATH": f"{attempts.folder}/bin:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "KEEPSTEP_PROCESSES": "4",
    }
    code, told = attempts.result("70 2 0", 3)
    assert code == 0, told
    assert attempts.made() == ["0,1,2,3:4", "0,1,3:3", "0,1:2"]
    assert "2 does not answer" in told


def test_no_gpu_is_left(attempts: Attempts) -> None:
    attempts.program(
        attempts.folder / "bin/nvidia-smi", SMI.format(folder=attempts.folder, gone="0 1")
    )
    path = f"{attempts.folder}/bin:{os.environ['PATH']}"
    attempts.environment |= {"PATH": path, "CUDA_VISIBLE_DEVICES": "0,1"}
    code, told = attempts.result("70 0", 3)
    assert code == 70
    assert "no GPU answers" in told


def test_a_gpu_that_hangs(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = "#!/bin/bash\nexec sleep 60\n"  # the other one answers without it
    attempts.program(attempts.folder / "bin/nvidia-smi", smi)
    monkeypatch.setenv("PATH", f"{attempts.folder}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "SECONDS", 1)
    environment: dict[str, str] = {}
    assert gpus.narrowed(["MIG-0", "1"], environment)[0] == ["MIG-0"]
    assert environment == {"CUDA_VISIBLE_DEVICES": "MIG-0"}


def test_several_machines_keep_their_gpus() -> None:
    environment = {"KEEPSTEP_LAUNCH_ARGS": "--num_machines 2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert gpus.gpus_in_use(environment) == []


@pytest.mark.parametrize("number", [["x"], ["-1"], []])
def test_no_number(number: list[str]) -> None:
    command = ["launch/train.sh", "launch/recipes/demo.yaml", "--retries", *number]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert f"--retries: {number[0] if number else 'none'} is no number" in result.stderr
    assert "--retries 5" in result.stderr

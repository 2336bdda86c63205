"""What submit.sh submits, and what the batch script decides. No Slurm is needed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT
from tests.slurm.helpers.cluster import SLURM_VARIABLE
from tests.slurm.helpers.fakes import Fakes

SCRIPTS = [ROOT / "slurm/train.sbatch", *sorted(ROOT.glob("slurm/*.sh"))]
SCRIPTS += sorted(ROOT.glob("launch/*.sh"))
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)


# --- submit.sh


def submit(folder: Path, *flags: str, site: str = "", **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not SLURM_VARIABLE.match(k)}
    (folder / "site.env").write_text(site)
    return subprocess.run(
        [ROOT / "slurm/submit.sh", *flags],
        cwd=folder,
        env={**kept, "KEEPSTEP_SITE": str(folder / "site.env"), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def recipe(tmp_path: Path, demo: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {demo}/model\ndataset_name: {demo}/data/train.jsonl\n"
        f"output_dir: {tmp_path}/run\nmax_steps: 40\nsave_steps: 10\n"
    )
    return path


@pytest.mark.parametrize(
    ("name", "flags", "site"),
    [
        ("two-nodes", ["--nodes", "2"], ""),
        (
            "a-range-with-gpus",
            ["--nodes", "2-4", "--gpus-per-node", "8", "--time", "1-00:00:00"],
            "SITE_SBATCH=(--partition=gpu --account=mine)",
        ),
    ],
)
def test_dry_run(tmp_path: Path, recipe: Path, name: str, flags: list[str], site: str) -> None:
    """What stands above the script; `KEEPSTEP_GOLDEN=write` writes what is expected anew."""
    done = submit(
        tmp_path,
        str(recipe),
        *flags,
        "--dry-run",
        "--learning_rate",
        "1e-3",
        "--seed",
        "3",
        site=site,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace(str(tmp_path), "/shared").replace(str(ROOT), "/keepstep")
    directives, _, body = text.partition("#\n# One run")
    assert (ROOT / "slurm/train.sbatch").read_text().endswith(body)
    file, text = GOLDEN / f"{name}.txt", directives
    if os.environ.get("KEEPSTEP_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "0"], "--nodes: 0 is neither N nor MIN-MAX"),
        (["--nodes", "3-2"], "--nodes: 3-2 is no range"),
        (["--nodes"], "--nodes needs a value"),
        (["--gpus-per-node", "x"], "--gpus-per-node: x is no number"),
        (["--time", "soon"], "--time: soon is no time limit of sbatch"),
        (["another.yaml"], "another.yaml: there is a recipe already"),
        (["--hub_token", "hf_secret"], "--hub_token would stand in files"),
        (["--max_step", "3"], "unknown flag --max_step"),
        (["--save_total_limit", "1"], "save_total_limit: 1 keeps the newest checkpoint only"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, recipe: Path, flags: list[str], message: str
) -> None:
    done = submit(tmp_path, str(recipe), *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_save_interval_too_long_for_the_job(tmp_path: Path, recipe: Path) -> None:
    flags = ["--save_interval_seconds", "3600", "--time", "1:30:00", "--dry-run"]
    done = submit(tmp_path, str(recipe), *flags)
    assert done.returncode == 0
    assert "a save every 3600 s in jobs of 5400 s" in done.stderr


# --- the batch script


def test_finished(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "echo hello; commit 40; status finished null")
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches() == ["launch n1,n2 7.0.1 2 address-of-n1 10218"]
    assert "from checkpoint 0" in output
    assert "hello" in output
    assert "hello" in (fakes.private / "logs/7.0.1.log").read_text()
    *_, event = map(json.loads, (fakes.private / "events.jsonl").read_text().splitlines())
    assert (event["owner"], event["nodes"], event["step"]) == ("7.0.1", "n1,n2", 40)
    assert fakes.owner() == "7.0.1"
    assert not [call for call in fakes.calls if "requeue" in call]


def test_a_wrong_recipe_is_not_tried_twice(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "echo 'the recipe has a problem'; exit 2")
    code, output = fakes.runs()
    assert code == 2, output
    assert len(fakes.launches()) == 1


def test_the_budget_counts_attempts_without_progress(tmp_path: Path) -> None:
    """The third attempt commits, and the count begins anew."""
    fakes = Fakes(tmp_path, "((number != 2)) || commit 10; exit 1", "MAX_ATTEMPTS=2")
    code, output = fakes.runs()
    assert code == 76, output
    assert len(fakes.launches()) == 4
    ports = [launch.split()[-1] for launch in fakes.launches()]
    assert len(set(ports)) == 4, "no straggler of an earlier attempt joins a later one"
    status = json.loads((fakes.private / "status.json").read_text())
    assert status["outcome"] == "no_progress"
    assert "2 attempts in a row without a new checkpoint" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_what_the_run_says_counts_not_the_exit_status(tmp_path: Path) -> None:
    """srun tells of whichever process has ended first; an old status tells nothing."""
    body = "((number == 1)) && { token=7.0.0 status finished null; exit 1; }\n"
    fakes = Fakes(tmp_path, body + "commit 1; status finished null; exit 143")
    code, output = fakes.runs()
    assert code == 0, output
    assert len(fakes.launches()) == 2


def test_the_time_limit(tmp_path: Path) -> None:
    body = "while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done\n"
    body += 'cp $run/.keepstep/stop "$FAKE/asked"; commit 5; status preempted "SIGUSR1 to rank 0"'
    fakes = Fakes(tmp_path, body)
    process = fakes.start()
    fakes.wait_for_launch()
    process.send_signal(signal.SIGUSR1)
    code, output = fakes.end()
    assert code == 143, output
    assert "queue again: the time is over, at checkpoint 5" in output
    assert (fakes.folder / "asked").read_text() == "7.0.1", "for this attempt and no other"
    assert "scontrol requeue 7" in fakes.calls


def test_the_time_limit_when_nothing_can_be_saved(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "trap '' USR1; exec sleep 60", "GRACE_SECONDS=1")
    process = fakes.start()
    fakes.wait_for_launch()
    process.send_signal(signal.SIGUSR1)
    code, output = fakes.end()
    assert code == 143, output
    assert "not saved in time: this attempt is ended" in output
    assert "scontrol requeue 7" in fakes.calls


def test_the_deadline_of_the_run_itself(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    code, output = fakes.runs()
    assert code == 143, output
    assert "scontrol requeue 7" in fakes.calls


def test_its_user_stops_it(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'keepstep stop'; exit 75")
    code, output = fakes.runs()
    assert code == 75, output
    assert "to go on: slurm/submit.sh recipe.yaml" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_slurm_ends_it(tmp_path: Path) -> None:
    """scancel: from there on nothing is submitted again."""
    fakes = Fakes(tmp_path, "sleep 1.5; commit 5; status preempted 'SIGTERM to rank 0'; exit 75")
    process = fakes.start()
    fakes.wait_for_launch()
    process.terminate()
    code, output = fakes.end()
    assert code == 143, output
    assert "ended after" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_preempted(tmp_path: Path) -> None:
    """With a grace time Slurm tells the steps, and the batch shell nothing."""
    fakes = Fakes(tmp_path, "commit 5; status preempted 'SIGTERM to rank 0'; exit 75")
    fakes.says_of_job("Restarts=0 PreemptTime=2026-11-25T10:00:00")
    code, output = fakes.runs()
    assert code == 143, output
    assert "queue again: preempted by another job" in output


def test_requeue_is_refused(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    fakes.requeue_is("echo 'Requested operation is presently disabled' >&2; exit 1")
    code, output = fakes.runs()
    assert code == 75, output
    assert "to go on: slurm/submit.sh recipe.yaml" in output


def test_the_controller_is_away(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    away = "echo 'Unable to contact slurm controller' >&2; exit 1"
    back = "kill -TERM $(cat $FAKE/pid)"
    fakes.requeue_is(f"[[ -e $FAKE/tried ]] && {back} || {{ touch $FAKE/tried; {away}; }}")
    code, output = fakes.runs()
    assert code == 143, output
    assert fakes.calls.count("scontrol requeue 7") == 2


def test_without_scontrol(tmp_path: Path) -> None:
    """As in a container: attempts are made, and the way to go on is told."""
    body = "((number == 1)) && { commit 5; exit 1; }; status preempted 'the deadline'; exit 75"
    fakes = Fakes(tmp_path, body)
    fakes.without_scontrol()
    code, output = fakes.runs()
    assert code == 75, output
    assert [launch.split()[1] for launch in fakes.launches()] == ["n1,n2", "n1,n2"]
    assert "to go on:" in output


def test_a_node_is_dead(tmp_path: Path) -> None:
    """With a range the others go on; without one they wait, and then the job is queued again."""
    body = "commit 9; status finished null"
    fakes = Fakes(tmp_path / "range", body, ranged=True)
    (fakes.folder / "dead-n1").touch()
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches()[0].startswith("launch n2 7.0.1 1 address-of-n2")

    fakes = Fakes(tmp_path / "fixed", body, "NODE_WAIT_SECONDS=2")
    (fakes.folder / "dead-n1").touch()
    code, output = fakes.runs()
    assert code == 143, output
    assert "1 of 2 nodes answer (n2), 2 are needed: waiting" in output
    assert "queue again: nodes are missing" in output
    assert fakes.launches() == []


def test_nodes_keep_their_order(tmp_path: Path) -> None:
    """Slurm numbers the tasks by it, and task 0 must be where the others look for it."""
    fakes = Fakes(tmp_path, "commit 9; status finished null", ranged=True, nodes=4)
    (fakes.folder / "slow-n1").touch()
    (fakes.folder / "dead-n3").touch()
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches()[0].startswith("launch n1,n2,n4 7.0.1 3 address-of-n1")


def test_nodes_that_never_answer_use_up_the_budget(tmp_path: Path) -> None:
    """Over restarts of the job: else it would be queued again for ever."""
    fakes = Fakes(tmp_path, "", "NODE_WAIT_SECONDS=0\nMAX_ATTEMPTS=3")
    (fakes.folder / "dead-n2").touch()
    codes = [fakes.runs(restarts)[0] for restarts in range(3)]
    assert codes == [143, 143, 76]
    assert fakes.requeues() == 2
    assert json.loads((fakes.private / "status.json").read_text())["outcome"] == "no_progress"


def test_stopped_between_two_attempts(tmp_path: Path) -> None:
    """`keepstep stop`, while nobody is there to hear of it."""
    fakes = Fakes(tmp_path, 'touch "$run/.keepstep/stop"; exit 1')
    code, output = fakes.runs()
    assert code == 75, output
    assert len(fakes.launches()) == 1
    assert not (fakes.private / "stop").exists()


def test_cancelled_between_two_attempts(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "kill -TERM $(cat $FAKE/pid); exit 1")
    code, output = fakes.runs()
    assert code == 143, output
    assert len(fakes.launches()) == 1
    assert fakes.requeues() == 0


def test_an_owner_that_cannot_be_read_is_nobody_elses(tmp_path: Path) -> None:
    """A network filesystem may fail for a moment."""
    body = 'mv "$run/.keepstep/owner" "$FAKE/kept"; sleep 1; mv "$FAKE/kept" "$run/.keepstep/owner"'
    fakes = Fakes(tmp_path, f"{body}; commit 4; status finished null")
    code, output = fakes.runs()
    assert code == 0, output


def test_a_request_to_be_queued_again_is_nobody_elses(tmp_path: Path) -> None:
    """The controller is away, and meanwhile the job has been queued again, and runs elsewhere."""
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    fakes.requeue_is(f"echo '7.1.1' >{fakes.private}/owner; echo 'Job is pending'; exit 1")
    code, output = fakes.runs()
    assert code == 1, output
    assert fakes.requeues() == 1
    assert "the run belongs to 7.1.1 now" in output


def test_a_controller_that_stays_away(tmp_path: Path) -> None:
    """Asked at intervals, at a time limit as well, and not for ever."""
    body = "while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done; commit 5\n"
    fakes = Fakes(tmp_path, body + "status preempted SIGUSR1", "REQUEUE_SECONDS=3")
    fakes.requeue_is("echo 'Unable to contact slurm controller' >&2; exit 1")
    process = fakes.start()
    fakes.wait_for_launch()
    process.send_signal(signal.SIGUSR1)
    code, output = fakes.end()
    assert code == 75, output
    assert 2 <= fakes.requeues() <= 4


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("exit=2 status failed 'settings have changed'; exit 1", 2),
        ("commit 5; exit=70 status finished 'not published'; exit 1", 70),
    ],
)
def test_the_exit_status_that_the_run_names(tmp_path: Path, body: str, expected: int) -> None:
    fakes = Fakes(tmp_path, body)
    code, output = fakes.runs()
    assert code == expected, output
    assert len(fakes.launches()) == 1


@pytest.mark.parametrize("first", ["beat", "true"], ids=["stall", "startup"])
def test_a_heart_that_stands_still(tmp_path: Path, first: str) -> None:
    body = f"((number == 1)) && {{ {first}; exec sleep 60; }}; commit 3; status finished null"
    fakes = Fakes(tmp_path, body, "STALL_SECONDS=1\nSTARTUP_SECONDS=2")
    code, output = fakes.runs()
    assert code == 0, output
    assert "no step for" in output
    assert "scancel --signal=KILL 7.5" in fakes.calls
    assert len(fakes.launches()) == 2


# --- leftovers


@pytest.mark.parametrize("theirs", ["7.2.1", "8.0.1", "0123456789ab host 12 3.0"])
def test_a_leftover_shell_leaves_the_run_alone(tmp_path: Path, theirs: str) -> None:
    """This one was requeued once (round 1); somebody else has the run by now."""
    fakes = Fakes(tmp_path, "commit 40; status finished null")
    (fakes.private / "owner").write_text(theirs + "\n")
    code, output = fakes.runs(restarts=1)
    assert code == 1, output
    assert f"the run belongs to {theirs.split()[0]} now" in output
    assert fakes.owner() == theirs
    assert fakes.launches() == []


@pytest.mark.parametrize("theirs", ["6.3.9", "8.0.1", "0123456789ab host 12 3.0", ""])
def test_a_job_that_begins_takes_the_run(tmp_path: Path, theirs: str) -> None:
    fakes = Fakes(tmp_path, "commit 40; status finished null")
    (fakes.private / "owner").write_text(theirs + "\n")
    assert fakes.runs()[0] == 0
    assert fakes.owner() == "7.0.1"


def test_superseded_in_the_middle(tmp_path: Path) -> None:
    """Its node was cut off; it sees that the run goes on elsewhere, and ends what it has begun."""
    fakes = Fakes(tmp_path, "while :; do beat; sleep 0.1; done")
    fakes.start()
    fakes.wait_for_launch()
    (fakes.private / "owner").write_text("7.1.0\n")
    code, output = fakes.end()
    assert code == 1, output
    assert "the run belongs to 7.1.0 now" in output
    assert not (fakes.private / "events.jsonl").exists(), "not its to write"


def test_left_behind(tmp_path: Path) -> None:
    """Slurm has queued the job again, and nobody has begun yet: no further attempt from here."""
    fakes = Fakes(tmp_path, "commit 5; echo 'x Restarts=1 y' >\"$FAKE/job\"; exit 1")
    code, output = fakes.runs()
    assert code == 1, output
    assert "this shell was left behind" in output
    assert len(fakes.launches()) == 1


def test_a_node_ends_what_was_left_over(tmp_path: Path) -> None:
    """Processes of other attempts of this run; not those of the owner, nor of another run."""
    fakes = Fakes(tmp_path, "")
    (fakes.private / "owner").write_text("7.1.1\n")
    run = str(fakes.run)

    def sleeper(owner: str, run: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "KEEPSTEP_OWNER": owner, "KEEPSTEP_RUN": run}
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=env)

    like = run[:-3] + "r.n"  # no pattern, but a name
    old, current, other = sleeper("7.0.3", run), sleeper("7.1.1", run), sleeper("7.0.3", like)
    try:
        subprocess.run(["bash", fakes.job / "node.sh", "prepare", "7.1.1"], check=True, timeout=20)
        assert old.wait(1) == -signal.SIGKILL
        assert current.poll() is other.poll() is None
    finally:
        for process in (old, current, other):
            process.kill()
            process.wait()

"""Jobs on a real Slurm, several nodes: what befalls them, and that they come back by themselves."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from keepstep.run_folder.parts import whole_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers import unreadable
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.helpers.warm import Warm
from tests.slurm.helpers.cluster import Cluster
from tests.slurm.helpers.job import HOOKS, LAUNCHER, RANK, Job
from tests.slurm.helpers.processes import wait_for


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes, without anything happening to it."""
    run = tmp_path_factory.mktemp("undisturbed")
    ranks.run(argv(demo, run, max_steps=40, eval_steps=10, save_steps=10))
    return run


def test_a_rank_a_launcher_and_the_controller_are_killed(job: Job, undisturbed: Path) -> None:
    """Back in the same allocation, and the weights are those of the undisturbed run.

    The site has jobs begin without the user's environment.
    """
    job.holds(20)
    job.submit("--nodes=2", sbatch="--export=NONE")
    refused = job.try_to_submit("--nodes", "2")
    assert refused.returncode == 2
    assert re.search(rf"job {job.number} of this run is (RUNNING|PENDING) already", refused.stderr)
    job.says(r"saved checkpoint-10")
    job.holds(30, rank=0)
    job.happens("SIGKILL to the rank on n2")
    job.signal("n2", RANK, signal.SIGKILL)
    job.says(r"carrying on from checkpoint-10")
    job.cluster.controller_kill()
    job.note("slurmctld is killed")
    job.says(r"saved checkpoint-20")
    job.cluster.controller_start()
    job.note("slurmctld is back")
    job.faults(step_seconds=0.15)
    job.happens("SIGKILL to the launcher on n1")
    job.signal("n1", LAUNCHER, signal.SIGKILL)
    job.says(r"carrying on from checkpoint-(2\d|3[01])\n")  # at 30 it stands still
    job.says(r"\] finished")
    told = job.ends("COMPLETED")
    assert (told["ExitCode"], told["Restarts"]) == ("0:0", "0")
    launches = [(e["owner"], e["outcome"]) for e in job.events("launch")]
    assert [owner for owner, _ in launches] == [f"{job.number}.0.{t}" for t in (1, 2, 3)]
    assert launches[-1][1] == job.run.attempts()[-1].outcome == "finished"
    assert job.run.attempts()[0].job == {"job": str(job.number), "nodes": "n[1-2]", "restarts": 0}
    assert "\x1b" not in job.log
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


def test_a_node_loses_power_in_mid_step(job: Job, undisturbed: Path) -> None:
    """Slurm queues the job again, on the node that was spare. (n1 has more cores than they.)"""
    job.holds(20)
    job.submit("--nodes", "2", cores="--exclusive")
    job.says(r"saved checkpoint-10")
    job.faults(step_seconds=0.15)
    job.happens("n2 loses power")
    job.cluster.crash("n2")
    job.says(r"attempt on n1,n3, 2 processes")
    job.says(r"carrying on from checkpoint-1\d")
    told = job.ends("COMPLETED")
    assert told["Restarts"] == "1"
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


def test_a_range_of_nodes_shrinks_during_a_save_and_grows_again(job: Job) -> None:
    """Three nodes, and one dies while its rank writes: on with two, without queueing."""
    job.holds(20, rank=2)
    job.submit("--nodes", "2-3")
    job.says(r"attempt on n1,n2,n3, 3 processes")
    job.fired("save 20")
    job.holds(30)
    job.happens("n3 loses power")
    job.cluster.crash("n3")
    job.says(r"attempt on n1,n2, 2 processes")
    job.says(r"resharded checkpoint-10: 3 x ZeRO-3 → 2 x ZeRO-3")
    assert job.cluster.job(job.number)["Restarts"] == "0"
    job.says(r"saved checkpoint-20")
    job.cluster.boot("n3")
    job.faults(step_seconds=0.15)
    job.cluster.slurm("scontrol", "requeue", job.number)
    job.happens("n3 is back; scontrol requeue")
    job.says(r"attempt on n1,n2,n3, 3 processes")
    job.says(r"resharded checkpoint-\d+: 2 x ZeRO-3 → 3 x ZeRO-3")
    job.ends("COMPLETED")
    job.intact()
    logs = [file.read_text() for file in job.attempt_logs()]
    announced = [re.findall(r"trained; (\d+) rows a step \((\d) x", log) for log in logs]
    begun = [one for one in announced if one]
    assert [len(one) for one in begun] == [1] * len(begun), "by one process of each attempt"
    assert [rows for ((rows, _),) in begun] == ["12"] * len(begun), "whoever computes them"
    assert [ranks for ((_, ranks),) in begun[:3]] == ["3", "2", "3"]
    # Slurm's: after a minute it repeats what it has told the step in which a node died, and numbers
    # the steps of a requeued job from 0. An attempt that this ends is made up for.
    late = [log for log in logs[2:-1] if re.search(r"STEP \d+\.\d+ ON \S+ CANCELLED", log)]
    assert len(logs) == 3 + len(late) <= 4


def test_a_node_is_cut_off_and_trains_on(job: Job) -> None:
    """The whole of an attempt, healthy, on a node that Slurm has given up."""
    job.faults(step_seconds=1.0)
    job.submit("--nodes", "1", processes=2, fields={"save_steps": 5, "eval_steps": 5})
    first = job.says(r"attempt on (n\d),").group(1)
    job.says(r"saved checkpoint-5")
    job.happens(f"{first} is cut off")
    job.cluster.cut(first)
    old = job.cluster.find(first, RANK)
    assert len(old) == 2
    second = job.says(r"attempt on (n\d),").group(1)
    assert second != first
    job.says(r"carrying on from checkpoint-\d+")
    told = r"belongs to a newer attempt \(\d+\.1\.1\)"
    wait_for("the old one's word", lambda: re.search(told, job.log))
    taken = job.events("attempt")[-1]["time"]
    job.faults(step_seconds=0.05)
    job.ends("COMPLETED")
    job.cluster.heal(first)
    job.note(f"{first} is healed")
    commits = job.events("commit")
    assert max(e["step"] for e in commits if e["attempt"] == 1) > 5, "it has trained on"
    assert {e["attempt"] for e in commits if e["time"] > taken} == {2}
    wait_for("the old ones' end", lambda: not job.cluster.find(first, RANK))
    assert [a.outcome for a in job.run.attempts()] == [None, "finished"]
    job.intact()


@pytest.mark.long
def test_in_a_container_without_slurm(job: Job, undisturbed: Path) -> None:
    """The launcher and its ranks are inside, what looks after them is outside."""
    image = f"export KEEPSTEP_IMAGE={Path(sys.executable).parent}"
    image += f" KEEPSTEP_HOME={job.cluster.own / 'home'}"  # each node's own
    job.submit("--nodes=2", more=f"{image}\nSITE_CONTAINER=({HOOKS / 'container'})")
    job.says(r"saved checkpoint-10")
    job.happens("SIGKILL to the rank on n2")
    job.signal("n2", RANK, signal.SIGKILL)
    job.says(r"carrying on from checkpoint-10")
    job.says(r"saved checkpoint-20")
    job.happens("the time limit is near")
    job.usr1()
    job.says(r"carrying on from checkpoint-2\d")
    job.says(r"\] finished")
    told = job.ends("COMPLETED")
    assert (told["ExitCode"], told["Restarts"]) == ("0:0", "1")
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


@pytest.mark.long
def test_rank_0_is_cut_off_from_its_peer(job: Job, undisturbed: Path) -> None:
    job.submit("--nodes", "2")
    job.says(r"saved checkpoint-10")
    job.happens("n1, with the batch shell and rank 0, is cut off")
    job.cluster.cut("n1")
    job.says(r"attempt on n2,n3, 2 processes")
    job.says(r"carrying on from checkpoint-1\d")
    job.ends("COMPLETED")
    job.cluster.heal("n1")
    owners = {e["attempt"] for e in job.events("commit") if e["step"] > 10}
    assert owners == {2}
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


def test_frozen_ranks_are_found_and_named(job: Job, undisturbed: Path) -> None:
    """One: its peer notices. All of them: nobody is left to notice but the job's own shell."""
    job.holds(20)
    job.submit("--nodes", "2", more="STALL_SECONDS=15")
    job.says(r"saved checkpoint-10")
    job.holds(30)
    job.happens("SIGSTOP to the rank on n2")
    job.signal("n2", RANK, signal.SIGSTOP)
    job.says(r"rank 1 on n2 gave no sign of life for 8 s")
    job.says(r"carrying on from checkpoint-1\d")
    job.says(r"saved checkpoint-20")
    job.faults(step_seconds=0.15)
    job.happens("SIGSTOP to all ranks")
    for node in ("n1", "n2"):
        job.signal(node, RANK, signal.SIGSTOP)
    job.says(r"no step for \d+ s: this attempt is ended")
    job.says(r"carrying on from checkpoint-2\d")
    assert job.ends("COMPLETED")["Restarts"] == "0"
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


def test_the_time_limit_comes_at_a_bad_moment(job: Job, undisturbed: Path) -> None:
    """Before the first step, during a save, during an evaluation: saved, queued again, on."""
    job.faults(step_seconds=0.15, place="start", seconds=600)
    job.submit("--nodes", "2")
    job.fired("start")
    job.happens("USR1 before the first step")
    job.usr1()
    job.says(r"Stopped .* after step 1;")
    job.says(r"queue again: the time is over, at checkpoint 1$|queue again.*checkpoint 1\n")
    job.holds(10)  # until the signal is heard
    job.says(r"carrying on from checkpoint-1\n")
    job.fired("save 10")
    job.happens("USR1 during a save")
    job.usr1()
    job.says(r"saved checkpoint-10")
    job.says(r"Stopped (on request|in time)")
    job.says(r"queue again")
    job.faults(step_seconds=0.15, place="evaluation", step=20, seconds=600)
    job.says(r"carrying on from checkpoint-(1\d|20)\n")  # made up, if that is what was due there
    job.fired("evaluation 20")
    job.happens("USR1 during an evaluation")
    job.usr1()
    job.says(r"Stopped .* after step 20;")
    job.says(r"queue again")
    job.says(r"carrying on from checkpoint-20\n")
    told = job.ends("COMPLETED")
    assert told["Restarts"] == "3"
    assert [a.outcome for a in job.run.attempts()] == ["preempted"] * 3 + ["finished"]
    assert [a.resumed_from for a in job.run.attempts()][:2] == [0, 1]
    assert final_digests(job.run.path, 40) == final_digests(undisturbed, 40)
    job.intact()


@pytest.mark.long
def test_slurms_own_time_limit(job: Job) -> None:
    """The signal 75 s ahead of it. (Set once training goes on, however long that took to begin.)"""
    job.faults(step_seconds=0.5)
    job.submit(
        *("--nodes", "2", "--time", "30"),
        sbatch="--signal=B:USR1@75",
        fields={"max_steps": 2000, "save_steps": 1000, "eval_steps": 1000},
    )
    begun = time.monotonic()
    job.says(r"step +3/2000")
    minutes = int((time.monotonic() - begun) / 60) + 2
    job.happens(f"the time limit is {minutes} minutes now")
    job.cluster.slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    job.says(r"the time limit is near: save, then queue again")
    job.says(r"Stopped (on request|in time)")
    job.says(r"queue again: the time is over, at checkpoint [1-9]")
    wait_for("a place in the queue", lambda: job.cluster.job(job.number)["Restarts"] == "1")
    job.cluster.slurm("scancel", job.number)
    job.ends("CANCELLED")


def test_preempted_by_another_job_and_cancelled(job: Job) -> None:
    job.submit("--nodes", "1", fields={"max_steps": 400, "save_steps": 200, "eval_steps": 200})
    job.says(r"step +3/400")
    job.happens("a job of the partition `high` wants all nodes")
    high = job.cluster.slurm(
        *("sbatch", "--parsable", "--output=/dev/null", "-p", "high", "-N3", "-n3"),
        *("--wrap", "sleep 2"),
    )
    job.says(r"Stopped on request .*SIG(TERM|USR1)")
    job.says(r"queue again: preempted by another job")
    job.says(r"carrying on from checkpoint-\d+")
    over = "the other job's end"
    wait_for(over, lambda: job.cluster.job(int(high))["JobState"] == "COMPLETED")
    job.says(r"step +\d+/400")
    job.happens("scancel")
    job.cluster.slurm("scancel", job.number)
    # Slurm sends SIGTERM to the ranks and to the job's script, which sends them SIGUSR1: either
    # may come first.
    job.says(r"Stopped on request .*SIG(TERM|USR1)")
    told = job.ends("CANCELLED")
    assert told["Restarts"] == "1"
    assert [a.outcome for a in job.run.attempts()] == ["preempted", "preempted"]
    assert len(job.steps()) == 2
    job.intact()


def test_a_run_that_always_dies_comes_to_an_end(job: Job) -> None:
    job.faults(place="step", step=3, die=True)
    job.submit("--nodes", "1", fields={"max_attempts_without_progress": 1})
    job.says(r"No progress: ")  # of the second attempt
    job.says(r"\] no progress: see above")
    told = job.ends("FAILED")
    assert told["ExitCode"] == "76:0"
    assert told["Restarts"] == "0"
    assert [e["outcome"] for e in job.events("launch")] == ["failed", "no_progress"]
    assert RunFolder(job.run.path).attempts()[-1].outcome == "no_progress"


@pytest.mark.long
def test_a_run_that_goes_back_does_so_within_its_job(job: Job, demo: Path, tmp_path: Path) -> None:
    made = {name: str(value) for name, value in unreadable.make(demo, tmp_path / "made").items()}
    job.submit("--nodes", "2", fields={"on_nonfinite": "rewind", **made})
    job.says(r"going back: the loss of rank \d is not finite")
    told = job.ends("COMPLETED")
    assert told["Restarts"] == "0"
    assert [e["outcome"] for e in job.events("launch")] == ["rewound", "finished"]
    newest = job.run.checkpoints()[-1]
    assert newest.step == 40
    assert unreadable.ROW in newest.manifest.dealt["skipped"]


def test_stopped_by_its_user_and_not_allowed_to_requeue(job: Job) -> None:
    """While it is queued; at the time limit, where a job may not queue again; by a signal."""
    job.submit("--nodes", "1", processes=2, sbatch="--hold", fields={"max_steps": 400})
    asked = job.command("stop", str(job.run.path))
    assert f"asked for: job {job.number} ends before its next attempt" in asked
    job.cluster.slurm("scontrol", "release", job.number)
    job.says(r"\] stopped on request")
    assert job.ends("FAILED")["ExitCode"] == "75:0"
    assert job.run.attempts() == []
    job.submit("--nodes", "1", processes=2, sbatch="--no-requeue", fields={"max_steps": 400})
    job.says(r"step +3/400")
    job.happens("USR1, and the site forbids to requeue")
    job.usr1()
    job.says(r"scontrol requeue: .*disabled")
    job.says(r"to go on: cd .* 'slurm/submit.sh' .*'--nodes' '1'")
    assert job.ends("FAILED")["ExitCode"] == "75:0"
    job.submit("--nodes", "1", processes=2, fields={"max_steps": 400})
    job.says(r"carrying on from checkpoint-\d+")
    job.says(r"step +\d+/400")
    job.happens("scancel --signal=TERM")
    job.cluster.slurm("scancel", "--signal=TERM", job.number)
    # One at a time: the other may be heard a step later, when all have agreed.
    job.says(r"\] stopped on request: SIGTERM to rank [01]")
    assert job.ends("FAILED")["ExitCode"] == "75:0"
    assert [a.outcome for a in job.run.attempts()] == ["preempted", "preempted"]


def test_submitted_by_hand(job: Job) -> None:
    """With a recipe: it prepares itself where it begins."""
    job.by_hand("--nodes=1", "--cpus-per-task=2", processes=2, fields={"max_steps": 10})
    job.ends("COMPLETED")
    assert job.run.checkpoints()[-1].step == 10
    frozen = {file.name for file in (job.run.private / "job").iterdir()}
    assert {"recipe.yaml", "train.sbatch", "id", "site.env"} <= frozen


@pytest.mark.long
def test_submitted_by_hand_and_queued_again(job: Job) -> None:
    """It goes on with what it began with, whatever has become of the recipe."""
    job.by_hand("--nodes=2", "--cpus-per-task=1")
    job.says(r"saved checkpoint-10")
    (job.folder / "recipe.yaml").write_text((job.folder / "recipe.yaml").read_text() + "seed: 7\n")
    job.happens("scontrol requeue")
    job.cluster.slurm("scontrol", "requeue", job.number)
    job.says(r"carrying on from checkpoint-\d+")
    job.says(r"step +\d+/40")
    job.happens("a late signal of Slurm's, to all ranks")
    job.cluster.slurm("scancel", "--signal=TERM", job.number)
    job.says(r"\] a signal for a step of an earlier round: once more")
    told = job.ends("COMPLETED")
    assert told["Restarts"] == "1"
    assert job.run.checkpoints()[-1].step == 40
    assert [e["outcome"] for e in job.events("launch")][-1] == "finished"


@pytest.mark.long
def test_names_and_first_interfaces_lead_nowhere(
    awkward: Cluster, warm: Warm, demo: Path, tmp_path: Path
) -> None:
    """As Debian names a host, and with a network that the nodes do not share."""
    job = Job(awkward, warm, tmp_path, demo)
    job.submit("--nodes=2", fields={"max_steps": 10})
    job.says(r"step +10/10")
    job.ends("COMPLETED")
    assert job.run.checkpoints()[-1].step == 10


@pytest.mark.long
def test_many_runs_and_one_at_a_time(job: Job) -> None:
    """Each is a job of its own, and finishes."""
    runs = [RunFolder(job.folder / name) for name in "abc"]
    lines = [f"--output_dir {run.path} --learning_rate {n}e-4" for n, run in enumerate(runs, 1)]
    (job.folder / "runs").write_text("\n".join(lines))
    done = job.try_to_submit("--runs", str(job.folder / "runs"), "--at_most", "1", processes=2)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"Job (\d+) trains", done.stdout)
    assert len(numbers) == 3
    atonce = 0
    while queue := job.cluster.slurm("squeue", "-h", "-o", "%i %T").splitlines():
        atonce = max(atonce, sum("RUNNING" in line for line in queue))
        time.sleep(0.5)
    assert atonce == 1
    assert [run.checkpoints()[-1].step for run in runs] == [40] * 3


@pytest.mark.long
def test_the_batch_host_of_a_range_dies(job: Job) -> None:
    """Slurm neither ends nor requeues it (--no-kill): the guard on the other nodes does."""
    job.submit("--nodes", "2-3")
    job.says(r"attempt on n1,n2,n3, 3 processes")
    job.says(r"saved checkpoint-10")
    job.happens("n1, with the batch shell, loses power")
    job.cluster.crash("n1")
    job.says(r"attempt on n2,n3, 2 processes")
    job.says(r"resharded checkpoint-1\d: 3 x ZeRO-3 → 2 x ZeRO-3")
    assert job.ends("COMPLETED")["Restarts"] == "1"
    job.intact()


def test_a_node_is_lost_with_its_own_disk(job: Job, undisturbed: Path) -> None:
    """The run folder is each node's own, and a mirror holds what the nodes have together: first a
    rank dies, then the node of the main process, for ever, with its disk."""
    job.on_own_disks()
    mirror = job.folder / "mirror"
    job.holds(20)
    job.submit(
        *("--nodes", "2"),
        fields={"node_local": True, "mirror": mirror.as_uri()},
        cores="--exclusive",
        more=f"JOB_FOLDERS={job.folder}/jobs",
    )
    job.says(r"saved checkpoint-10")
    # Behind the next save slowly: it is copied when nobody else wants the processor.
    job.faults(**{"step_seconds": 2.0, "from": 20})
    job.happens("SIGKILL to the rank on n2")
    job.signal("n2", RANK, signal.SIGKILL)
    job.says(r"carrying on from checkpoint-10")
    job.says(r"mirrored checkpoint-\d+")
    job.faults(step_seconds=0.15)
    job.happens("n1 is lost with its disk")
    job.cluster.crash("n1")
    job.cluster.lose_disk("n1")
    job.says(r"attempt on n2,n3, 2 processes")
    job.says(r"mirror: checkpoint-\d+ brought from")
    job.says(r"carrying on from checkpoint-\d+")
    told = job.ends("COMPLETED")
    assert told["Restarts"] == "1"
    parts = [
        RunFolder(job.cluster.disk(node) / job.run.path.name).checkpoint(40)
        for node in ("n2", "n3")
    ]
    assert all(part.manifest.is_part and part.faults(deep=True) == [] for part in parts)
    whole = whole_of(parts[0]).manifest.files
    for name, digest in final_digests(undisturbed, 40).items():
        if name not in ("model.safetensors", "weights_layout.json"):  # gathered, on one node
            assert whole[name].xxh3_128 == digest
    job.cluster.lose_disk("n3")

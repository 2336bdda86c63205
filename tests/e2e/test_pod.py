"""What becomes of a run in pods that are evicted, killed and lost, by the manifests' own rules."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.cli.network import free_port
from keepstep.run_folder.reader import RunFolder
from tests.helpers.launchers import faults
from tests.helpers.pods import USER, Job, Pod, copied, image, obstacle, verdict
from tests.helpers.recipes import argv
from tests.helpers.waiting import wait_for
from tests.kubernetes.manifests import FILES, job_spec

STEPS = 40


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter: pytest's own are root's."""
    reason = obstacle()
    if reason:
        pytest.skip(f"no pods on this machine: {reason}")
    with tempfile.TemporaryDirectory(prefix="keepstep-pod-", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


def job(name: str, folder: Path, demo: Path, processes: int, **fields: object) -> Job:
    """A manifest's Job, with the demo for a recipe, on CPU."""
    copied(demo, folder / "demo")
    values = {"KEEPSTEP_PROCESSES": str(processes)}
    compiled = copied(os.environ["TORCH_EXTENSIONS_DIR"], folder / "extensions")
    values["TORCH_EXTENSIONS_DIR"] = str(compiled)
    made = Job(job_spec(name), folder, values)
    short = {"max_steps": STEPS, "save_steps": 10, "eval_steps": 10}
    flags = argv(folder / "demo", Path("/"), **short | fields)
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    del pairs["--output_dir"]  # the manifest names it
    config = made._own("config")
    (config / "recipe.yaml").write_text("".join(f"{n[2:]}: {v}\n" for n, v in pairs.items()))
    return made


def run_of(made: Job) -> RunFolder:
    return RunFolder(made.folder / "runs/mine")


def probed(pod: Pod, made: Job) -> str:
    """What the liveness probe says of a pod that is well."""
    done = pod.run(made.probe())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def starts(made: Job) -> list[int]:
    """The step at which each attempt began to train."""
    return [a.resumed_from for a in run_of(made).attempts()]


@pytest.mark.parametrize("name", FILES)
def test_what_the_rules_say(name: str) -> None:
    rules = job_spec(name)["podFailurePolicy"]["rules"]
    for code in (2, 76):
        assert verdict(rules, code, disrupted=False) == "FailJob"
        assert verdict(rules, code, disrupted=True) == "FailJob"
    for code in (70, 137, 143, 1):
        assert verdict(rules, code, disrupted=False) == "Count"
        assert verdict(rules, code, disrupted=True) == "Ignore"
    assert verdict(rules, 75, disrupted=False) == "Ignore"
    assert verdict(rules, None, disrupted=True) == "Ignore"  # a node that is lost


def test_evicted_then_killed_for_lack_of_memory(folder: Path, demo: Path) -> None:
    """As the image's entry point, not as root: TERM is a save and 75, KILL costs steps since."""
    made = job("one-pod.yaml", folder, demo, 1)
    made.values |= faults(folder / "faults", hold=2)  # a probe takes seconds on a busy machine
    first = made.start()
    first.wait_until("step  2/40  loss")
    assert first.init().cmdline()[0] == "tini"
    assert {p.uids().real for p in first.ranks()} == {USER}
    root = first.run(["findmnt", "--noheadings", "--output", "VFS-OPTIONS", "/"]).stdout
    assert "ro" in root.strip().split(",")  # what is written is written into the volumes
    wait_for(lambda: "the last sign of life was " in probed(first, made))  # a second late, at most
    code = first.evict(made.grace)
    assert code == 75, first.log.read_text()
    assert made.judge(first, code) == "Again"
    stopped = run_of(made).checkpoints()[-1].step

    faults(folder / "faults", hold=35)
    second = made.start()
    second.wait_until(f"carrying on from checkpoint-{stopped}")
    second.wait_until("loss")
    second.kill_all()
    code = second.ended()
    assert code == 137, second.log.read_text()
    assert made.judge(second, code) == "Again"

    saved = run_of(made).checkpoints()[-1].step
    faults(folder / "faults")
    last = made.start()
    code = last.ended()
    assert code == 0, last.log.read_text()
    assert made.judge(last, code) == "Complete"
    assert starts(made) == [0, stopped, saved]
    assert (made.failed, made.made) == (1, 3)
    assert "Finished: 40 steps." in last.log.read_text()


@pytest.mark.long
def test_a_pods_life(folder: Path, demo: Path) -> None:
    """Evicted three times, killed at the grace's end, a rank killed, its node lost: it ends.

    Installed from what the Dockerfile copies, into an environment of its own.
    """
    made = job("one-pod.yaml", folder, demo, 2, max_steps=150)
    made.commands = image(folder)
    codes: list[int | None] = []
    for number, fate in enumerate(["evicted"] * 3 + ["too late", "rank", "node", "none"]):
        pod = made.start()
        if fate != "none":
            pod.wait_until("carrying on from" if number else "loss")
            pod.wait_until("loss" if fate == "evicted" else "saved checkpoint-")
        if fate == "evicted":
            code = pod.evict(made.grace)
        elif fate == "too late":
            for rank in pod.ranks():
                rank.suspend()  # it hangs, and cannot save
            code = pod.evict(grace=2)
        elif fate == "rank":
            pod.ranks()[1].kill()
            code = pod.ended()
        elif fate == "node":
            pod.lose_node()
            code = pod.ended()
        else:
            code = pod.ended()
        codes.append(code)
        saved = run_of(made).checkpoints()
        verdict_now = made.judge(pod, code)
        assert verdict_now == ("Complete" if fate == "none" else "Again"), pod.log.read_text()
        if fate == "evicted":  # nothing is lost: what was made is saved
            assert saved[-1].step == run_of(made).attempts()[-1].reached
    assert codes == [75, 75, 75, 137, 70, None, 0]
    assert made.failed == 1  # the rank alone: disruptions do not count
    attempts = run_of(made).attempts()
    assert len(attempts) == 7
    assert [a.resumed_from for a in attempts] == sorted(a.resumed_from for a in attempts)
    assert attempts[-1].reached == 150


@pytest.mark.long
def test_a_wrong_recipe_fails_the_job(folder: Path, demo: Path) -> None:
    made = job("one-pod.yaml", folder, demo, 1, no_such_field=1)
    pod = made.start()
    code = pod.ended()
    assert code == 2, pod.log.read_text()
    assert made.judge(pod, code) == "Failed"


@pytest.mark.long
def test_a_pod_without_a_volume(folder: Path, demo: Path) -> None:
    """The next one has nothing but the mirror."""
    made = job("one-pod-mirror.yaml", folder, demo, 1, max_steps=300, save_steps=30, eval_steps=30)
    made.values["KEEPSTEP_MIRROR"] = made._own("mirror").as_uri()
    first = made.start()
    first.wait_until("mirrored checkpoint-")
    code = first.evict(made.grace)
    assert code == 75, first.log.read_text()
    last = made.start()
    code = last.ended()
    assert code == 0, last.log.read_text()
    assert "carrying on from checkpoint-" in last.log.read_text()
    assert made.judge(last, code) == "Complete"


@pytest.mark.long
def test_two_pods(folder: Path, demo: Path) -> None:
    """One is evicted, and both save; one is lost, and both begin anew; pod 0 has finished: so has
    the job."""
    made = job("indexed-job.yaml", folder, demo, 2)
    made.names = ("keepstep-0.keepstep",)
    told = next(e for e in _environment(made) if e["name"] == "KEEPSTEP_LAUNCH_ARGS")
    told["value"] = told["value"].replace("29500", str(free_port()))

    pods = [made.start(index) for index in (0, 1)]
    pods[0].wait_until("step  2/40  loss")
    assert pods[1].evict(made.grace) == 75, pods[1].log.read_text()
    assert pods[0].ended() == 75, pods[0].log.read_text()
    assert [made.judge(pod, 75) for pod in pods] == ["Again", "Again"]
    stopped = run_of(made).checkpoints()[-1].step

    pods = [made.start(index) for index in (0, 1)]
    pods[0].wait_until(f"carrying on from checkpoint-{stopped}")
    pods[0].wait_until("loss")
    pods[1].lose_node()
    code = pods[0].ended()
    assert code == 70, pods[0].log.read_text()
    assert made.judge(pods[0], code) == made.judge(pods[1], None) == "Again"

    pods = [made.start(index) for index in (0, 1)]
    assert pods[0].ended() == 0, pods[0].log.read_text()
    assert made.judge(pods[0], 0) == "Complete"
    assert pods[1].ended() == 0
    assert made.failed == 1
    assert run_of(made).attempts()[-1].reached == STEPS


def _environment(made: Job) -> list[dict[str, str]]:
    (container,) = made.spec["template"]["spec"]["containers"]
    found: list[dict[str, str]] = container["env"]
    return found

"""Two lines in a person's own script: killed, and carried on bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers import launchers, unreadable
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, ROOT, Ranks
from tests.helpers.waiting import PATIENCE

SCRIPT = PROGRAMS / "two_lines.py"
ALONE: dict[str, Any] = {"strategy": "ddp", "processes": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": ALONE,
    "zero2": {"strategy": "cpu_zero2", "processes": 2},
    "zero3": {"strategy": "cpu_zero3", "processes": 2},
}


def losses(run: Path) -> dict[int, float]:
    state = json.loads((run / "checkpoint-12/trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def status(run: Path) -> dict:
    return json.loads((run / ".keepstep/status.json").read_text())


def command(run: Path, demo: Path, **fields: object) -> list[str]:
    return [str(run), str(demo), json.dumps(fields)]


@pytest.mark.parametrize("case", cases(CASES, long=["zero2"]))
def test_killed_at_a_step_and_in_a_save_and_carried_on(
    ranks: Ranks, demo: Path, workspace: Path, case: str
) -> None:
    how, straight, broken = CASES[case], workspace / f"api-{case}", workspace / f"api-{case}-broken"
    whole = ranks.run(command(straight, demo), script=SCRIPT, **how)
    assert "begins at 0: " in whole.output

    first = ranks.start(command(broken, demo, hold=6), script=SCRIPT, **how)
    first.wait_for("step  6/12  loss")
    first.kill(signal.SIGKILL)
    first.wait()
    second = ranks.start(command(broken, demo, kill=8), script=SCRIPT, **how)
    second.wait_for("killed in the save of step 8")
    second.kill(signal.SIGKILL)
    second.wait()
    assert RunFolder(broken).checkpoints()[-1].step == 4
    third = ranks.start(command(broken, demo, hold=10), script=SCRIPT, **how)
    third.wait_for("step 10/12  loss")
    third.kill(signal.SIGTERM, ranks=[how["processes"] - 1])
    assert set(third.wait()) == {75}
    assert status(broken)["outcome"] == "preempted"
    fourth = ranks.run(command(broken, demo), script=SCRIPT, **how)

    stopped = RunFolder(broken).checkpoint(12).manifest.parent
    entries = re.findall(r"begins at (\d+): (\d+) (\d+)", third.output + fourth.output)
    assert {(int(step), int(at)) for step, _, at in entries} == {(4, 4), (stopped, stopped)}
    assert all(int(count) > 0 for _, count, _ in entries)
    assert final_digests(broken, 12) == final_digests(straight, 12)
    assert losses(broken) == losses(straight)
    told = re.findall(r"rank (\d): committed (\d+) True", whole.output)
    everybody = {(str(rank), str(step)) for rank in range(how["processes"]) for step in (4, 8, 12)}
    assert set(told) == everybody
    assert "committed" not in re.sub("committed [0-9]+ True", "", whole.output)


def test_a_script_hears_that_its_run_goes_back(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """As an error: what it would do next, it would do with a model that is spoilt."""
    made, run = tmp_path / "made", tmp_path / "run"
    unreadable.make(demo, made)
    for word, codes in (("rewound", [70]), ("finished", [0])):
        started = ranks.start(command(run, made, on_nonfinite="rewind"), script=SCRIPT, **ALONE)
        assert started.wait() == codes, started.output[-3000:]
        assert ("RewindError: the loss of rank 0 is not finite" in started.output) == (
            word == "rewound"
        )
        assert status(run)["outcome"] == word
    assert status(run)["exit"] == 0
    assert unreadable.ROW in RunFolder(run).checkpoints()[-1].manifest.dealt["skipped"]


def test_on_fewer_processes(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """The rows of a step are shared out anew: the run had 8, and one process has 4 at a time."""
    run = workspace / "api-resized"
    first = ranks.start(command(run, demo, hold=11), script=SCRIPT, strategy="cpu_zero3")
    first.wait_for("saved checkpoint-4")
    first.kill(signal.SIGKILL)
    first.wait()
    second = ranks.run(command(run, demo), script=SCRIPT, strategy="cpu_zero3", processes=1)
    assert "resharded checkpoint-" in second.output
    assert "as many rows as before" in second.output
    last = RunFolder(run).checkpoint(12).manifest
    assert (last.samples, last.world_size, last.settings["rows_per_step"]) == (96, 1, 8)


def test_a_finished_run_is_loaded_and_not_trained(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    run = workspace / "api-finished"
    first = ranks.run(command(run, demo), script=SCRIPT, **ALONE)
    before = final_digests(run, 12)
    again = ranks.run(command(run, demo), script=SCRIPT, **ALONE)
    assert "This run is finished, at step 12 of 12: there is nothing to train." in again.output
    assert "rank 0: finished at 12" in again.output
    assert "  loss " not in again.output
    assert final_digests(run, 12) == before
    evaluations = [
        re.findall(r"eval_loss (\d\.\d+)", done.output)[-1] for done in (first, again)
    ]  # of `trainer.evaluate()` at the end
    assert evaluations[0] == evaluations[1]


def test_a_run_that_stopped_early_is_loaded_and_not_trained(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    """Else a script would go on with the model as it was given, and the run's name."""
    run, fields = workspace / "api-early", {"early_stopping_patience": 1, "greater_is_better": True}
    first = ranks.run(command(run, demo, **fields), script=SCRIPT, **ALONE)
    again = ranks.run(command(run, demo, **fields), script=SCRIPT, **ALONE)
    assert "This run is finished, at step 8 of 12: there is nothing to train." in again.output
    assert "rank 0: finished at 8" in again.output
    assert "  loss " not in again.output
    evaluations = [
        re.findall(r"eval_loss (\d\.\d+)", done.output)[-1] for done in (first, again)
    ]  # of `trainer.evaluate()` at the end
    assert evaluations[0] == evaluations[1]


def test_a_callback_that_fails(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """Its own error is met, and the run says how far it had come."""
    run = workspace / "api-callback"
    failed = ranks.start(command(run, demo, **{"raise": 6}), script=SCRIPT, **ALONE)
    assert failed.wait() != [0]
    assert "RuntimeError: a person's own mistake" in failed.output
    told = status(run)
    assert (told["outcome"], told["global_step"], told["exit"]) == ("failed", 6, 70)
    assert "a person's own mistake" in told["reason"]
    again = ranks.run(command(run, demo), script=SCRIPT, **ALONE).output
    assert "carrying on from checkpoint-4" in again
    assert "finished at 12" in again


def test_a_finished_run_that_has_saved_nothing(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """A script that saves its model after train() would save it untrained."""
    run, fields = workspace / "api-unsaved", {"max_steps": 2, "save_strategy": "no"}
    assert "finished at 2" in ranks.run(command(run, demo, **fields), script=SCRIPT, **ALONE).output
    again = ranks.start(command(run, demo, **fields), script=SCRIPT, **ALONE)
    assert again.wait() != [0]
    assert "SelectionError: this run is finished, at step 2, and has saved nothing" in again.output
    anew = ranks.run(command(run, demo, train=False, **fields), script=SCRIPT, **ALONE).output
    assert "begins at 0: " in anew
    assert "finished at 2" in anew


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (False, "begins at 0: "),
        ("best", "carrying on from checkpoint-12"),
        (8, "carrying on from checkpoint-8"),
        ("PATH", "carrying on from checkpoint-4"),
    ],
)
def test_what_train_is_given(
    ranks: Ranks, demo: Path, workspace: Path, given: object, told: str
) -> None:
    run = workspace / f"api-given-{given}"
    ranks.run(command(run, demo), script=SCRIPT, **ALONE)
    value = str(run / "checkpoint-4") if given == "PATH" else given
    again = ranks.run(command(run, demo, max_steps=13, train=value), script=SCRIPT, **ALONE)
    assert told in again.output
    assert "rank 0: finished at 13" in again.output


@pytest.mark.parametrize(
    "launcher", cases(["python", "torchrun", "accelerate"], long=["python", "torchrun"])
)
def test_launched_as_scripts_are(demo: Path, workspace: Path, launcher: str) -> None:
    run, log = workspace / f"api-{launcher}", workspace / f"api-{launcher}.log"
    config = ROOT / "accelerate_configs/cpu_zero2.yaml"
    prefix = {
        "python": [sys.executable],
        "torchrun": [*(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--num_processes", "2", "--main_process_port", "0"),
        ],
    }[launcher]
    # At step 9, where checkpoint-8 was begun, checkpoint-4 has been saved.
    started = launchers.start([*prefix, str(SCRIPT), *command(run, demo, hold=9)], log)
    launchers.wait_until(log, "saved checkpoint-4", started)
    os.kill(started.pid, signal.SIGTERM)
    launchers.end(started, log)
    assert status(run)["outcome"] == "preempted"
    assert "Stopped on request (SIGTERM to rank 0" in log.read_text()
    again = launchers.start([*prefix, str(SCRIPT), *command(run, demo)], log)
    code, output = launchers.end(again, log)
    assert code == 0, output
    assert "carrying on from checkpoint-" in output
    assert status(run)["outcome"] == "finished"


INPUTS = {
    "first": (
        "object",
        "adapter",
        "metrics",
        "stream",
        "optimizers",
        "no-evaluation",
        "half-adapter",
    ),
    "others": ("adapted", "collator", "formatting", "several", "optimizer-class"),
}


@pytest.mark.parametrize("which", cases(INPUTS, long=["others"]))
def test_whatever_a_script_gives(demo: Path, workspace: Path, which: str) -> None:
    """Interrupted in the same process, and carried on by a new trainer, bit for bit."""
    folder, log = workspace / f"inputs-{which}", workspace / f"inputs-{which}.log"
    script = ["-m", "tests.rank_programs.inputs"]
    program = [sys.executable, *script, str(folder), str(demo), *INPUTS[which]]
    started = launchers.start(program, log)
    code, output = launchers.end(started, log, timeout=2 * PATIENCE)  # twenty-one trainings
    assert code == 0, output[-6000:]
    told = dict(re.findall(r"case ([\w-]+): (.*)", output))
    ranking = {case: "recency" if case == "no-evaluation" else "metric" for case in INPUTS[which]}
    assert told == {
        case: f"('preempted', 3, 'finished') True {ranking[case]}" for case in INPUTS[which]
    }

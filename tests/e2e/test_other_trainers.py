"""`CheckpointMixin` over other Trainers: killed at a random step, and carried on bit for bit."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from keepstep import RunFolder
from tests.helpers import unreadable
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, Ranks, Run

PROGRAM = PROGRAMS / "other_trainers.py"
STEPS = 8
ONE, ZERO2, ZERO3 = ("ddp", 1), ("cpu_zero2", 2), ("cpu_zero3", 2)
EVERY = [*itertools.product(("trainer", "sft", "dpo", "reward"), (ONE, ZERO2, ZERO3))]
SOME = [("dpo", ZERO3), ("reward", ZERO2), ("trainer", ONE)]


def start(
    ranks: Ranks,
    kind: str,
    demo: Path,
    run: Path,
    how: tuple[str, int],
    stop: int = 0,
    **fields: Any,
) -> Run:
    strategy, processes = how
    argv = [kind, str(demo), str(stop), str(run), json.dumps(fields)]
    return ranks.start(argv, script=PROGRAM, strategy=strategy, processes=processes)


def finish(run: Run) -> None:
    codes = run.wait()
    assert set(codes) == {0}, run.output[-6000:]


def losses(run: Path) -> list[dict[str, Any]]:
    """The log of the whole run, without what depends on the clock."""
    state = json.loads((run / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    times = ("_runtime", "_per_second", "_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(times)}
        for entry in state["log_history"]
    ]


def kill_and_carry_on(
    ranks: Ranks, kind: str, demo: Path, folder: Path, how: tuple[str, int], stop: int
) -> int:
    """Both runs end alike: weights, optimizer, scheduler, random numbers and log. Gives the step
    that the second attempt began at."""
    finish(start(ranks, kind, demo, folder / "straight", how))
    print(f"killed in step {stop}, or soon after")
    killed = start(ranks, kind, demo, folder / "killed", how, stop)
    assert -9 in killed.wait(), killed.output[-6000:]
    finish(start(ranks, kind, demo, folder / "killed", how))
    assert final_digests(folder / "killed", STEPS) == final_digests(folder / "straight", STEPS)
    assert losses(folder / "killed") == losses(folder / "straight")
    return RunFolder(folder / "killed").attempts()[-1].resumed_from


@pytest.mark.parametrize(("kind", "how"), cases(EVERY, long={*EVERY} - {*SOME}))
def test_killed_and_carried_on(
    ranks: Ranks, demo: Path, tmp_path: Path, kind: str, how: tuple[str, int]
) -> None:
    stop = random.randint(3, STEPS)  # the first checkpoint is that of step 2
    assert kill_and_carry_on(ranks, kind, demo, tmp_path, how, stop) >= 2


def test_fewer_processes_go_on_with_the_same_rows(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    """Also at the end of an epoch, where the micro-batches of a step differ in their rows."""
    finish(start(ranks, "dpo", still_demo, tmp_path / "straight", ZERO2))
    killed = start(ranks, "dpo", still_demo, tmp_path / "killed", ZERO2, 4)
    assert -9 in killed.wait(), killed.output[-6000:]
    finish(start(ranks, "dpo", still_demo, tmp_path / "killed", ("cpu_zero2", 1)))
    newest = RunFolder(tmp_path / "killed").choose()
    assert newest is not None
    assert (newest.step, newest.manifest.world_size) == (STEPS, 1)
    whole = RunFolder(tmp_path / "straight").checkpoint(STEPS).manifest
    assert newest.manifest.samples == whole.samples == 2 * 19 + 2 * 8
    whole_steps = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    finish(start(ranks, "dpo", still_demo, tmp_path / "at once", ONE, **whole_steps))
    found, expected, at_once = (
        [entry["loss"] for entry in losses(tmp_path / run) if "loss" in entry]
        for run in ("killed", "straight", "at once")
    )
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-3)
    assert at_once == pytest.approx(expected, rel=2e-3), "a step's loss is the mean over its rows"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["trainer", "dpo", "reward"])
@pytest.mark.parametrize("how", [("ddp", 2), ZERO3])
def test_any_trainer_goes_back(
    ranks: Ranks, demo: Path, tmp_path: Path, kind: str, how: tuple[str, int]
) -> None:
    """Also one whose loss is a mean over rows: then a step's is one over those that are left."""
    unreadable.make(demo, tmp_path / "made")
    run = tmp_path / "run"
    first = start(ranks, kind, tmp_path / "made", run, how, on_nonfinite="rewind")
    assert set(first.wait()) == {70}, first.output[-3000:]
    assert "RewindError: the loss of rank" in first.output
    finish(start(ranks, kind, tmp_path / "made", run, ONE, on_nonfinite="rewind"))
    assert unreadable.ROW in RunFolder(run).checkpoints()[-1].manifest.dealt["skipped"]
    told = [entry["loss"] for entry in losses(run) if "loss" in entry]
    assert len(told) == STEPS
    assert all(map(math.isfinite, told))


def test_grpo_carries_on_between_two_generations(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """In a later epoch, too: the same prompts, the same completions, the same weights."""
    assert kill_and_carry_on(ranks, "grpo", demo, tmp_path, ONE, stop=7) > 3


def test_what_no_checkpoint_holds_is_refused_when_the_trainer_is_made(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    run = start(ranks, "dpo", demo, tmp_path / "run", ONE, sync_ref_model=True)
    assert run.wait() == [70]
    assert "sync_ref_model: the reference model that MyDPOTrainer changes" in run.output
    assert not (tmp_path / "run").exists()

"""A run that hangs ends in the time that its own steps, evaluations and saves have taught; what is
slow and right, before that is known or where it cannot be known, ends nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import events
from tests.helpers.ranks import PROGRAMS, Ranks, Run
from tests.helpers.recipes import argv

SCRIPT = PROGRAMS / "still.py"
# Nobody waits for ten minutes here: what ends a run is learnt.
FIELDS: dict[str, Any] = {"hang_min_seconds": 1, "hang_timeout_seconds": 600, "max_steps": 1000}
EAGER: dict[str, Any] = {"hang_min_seconds": 3}
WHERE = {
    "forward": ("in a step", 60, {"eval_steps": 500, "save_steps": 500}),
    "loader": ("in a step", 60, {"eval_steps": 500, "save_steps": 500}),
    "worker": ("in a step", 62, {"eval_steps": 500, "save_steps": 500}),
    "evaluation": ("in an evaluation", 7, {"eval_steps": 1, "save_steps": 500}),
    "save": ("in a save", 7, {"eval_steps": 1, "save_steps": 1}),
}


def start(ranks: Ranks, demo: Path, run: Path, still: str, **fields: Any) -> Run:
    command = argv(demo, run, **FIELDS | fields)
    return ranks.start([still, *command], script=SCRIPT, strategy="ddp")


EVERY = [(where, victim) for where in WHERE for victim in (0, 1)]
FEW = [("forward", 1), ("save", 1)]


@pytest.mark.parametrize(
    ("where", "victim"), cases(EVERY, long=[case for case in EVERY if case not in FEW])
)
def test_a_stuck_rank_is_named_in_learnt_time(
    ranks: Ranks, still_demo: Path, tmp_path: Path, where: str, victim: int
) -> None:
    at, step, fields = WHERE[where]
    if where == "worker":
        fields = fields | {"dataloader_num_workers": 1}
    run = start(ranks, still_demo, tmp_path, f"{where}:{victim}:{step}:0", **fields)
    assert run.wait() == [70, 70]
    assert f"rank {victim} stands still" in run.output
    named = rf"rank {victim} on \S+ made no progress for \S+ s {at}, where none of the last \d+ "
    status = json.loads((tmp_path / ".keepstep/status.json").read_text())
    assert re.match(named, status["reason"]), status
    assert "hang_min_seconds" in status["reason"], "what to do about it"
    assert len(re.findall(f"keepstep: {named}", run.output)) == 2, "both say so"
    (hang,) = events(RunFolder(tmp_path), "hang")
    assert hang["phase"] == at.split()[-1]
    assert hang["step"] == status["global_step"]


def test_what_is_slow_and_right_ends_nothing(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    """The first evaluation, a callback of an early step; and, when there have been saves enough:
    waiting for the one before, and for the last one."""
    slow = "eager,evaluation:1:1:8,callback:0:1:8,write:1:6:8,write:1:8:8"
    fields = {"hang_min_seconds": 6, "max_steps": 8, "eval_steps": 1, "save_steps": 1}
    run = start(ranks, still_demo, tmp_path, slow, **fields)
    assert run.wait() == [0, 0]
    assert run.output.count("stands still") == 4
    assert "made no progress" not in run.output, "it ends seconds after the word is given"
    assert [c.step for c in RunFolder(tmp_path).checkpoints()][-1] == 8


@pytest.mark.long
def test_a_slow_disk_in_the_foreground_ends_nothing(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    fields = EAGER | {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "async_save": "off"}
    run = start(ranks, still_demo, tmp_path, "eager,write:1:7:20,write:0:8:20", **fields)
    assert run.wait() == [0, 0]
    assert run.output.count("stands still") == 2
    assert "made no progress" not in run.output


def test_what_has_ended_an_attempt_does_not_end_the_next(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    """Perhaps it was no hang: until that step is passed, the fixed bound alone counts."""
    fields = EAGER | {"max_steps": 8, "eval_steps": 1, "save_steps": 100}
    run = start(ranks, still_demo, tmp_path, "eager,evaluation:1:6:0", **fields)
    assert run.wait() == [70, 70]
    (hang,) = events(RunFolder(tmp_path), "hang")
    assert hang["step"] == 6
    run = start(
        ranks, still_demo, tmp_path, f"eager,evaluation:1:6:{3 * hang['seconds']}", **fields
    )
    assert run.wait() == [0, 0]
    assert "at step 6 an earlier attempt was stuck, by learnt time" in run.output
    assert "rank 1 stands still" in run.output


@pytest.mark.long
def test_with_the_defaults_a_hang_costs_a_minute(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    """(Twenty seconds for the slowest step of this machine would cost more: see `TIMES_USUAL`.)"""
    fields = {"hang_min_seconds": 60, "hang_timeout_seconds": 1800, "save_steps": 500}
    run = start(ranks, still_demo, tmp_path, "forward:1:110:0", **fields, eval_steps=500)
    assert run.wait() == [70, 70]
    assert re.search(r"rank 1 on \S+ made no progress for 60 s in a step, where", run.output)

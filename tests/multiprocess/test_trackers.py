"""One tracker run per run, over a kill, a stop and going back: the real trackers, read by their own
readers, and their points counted."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.tracking import tracked_of
from tests.helpers import trackers
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

TRACKED = PROGRAMS / "tracked.py"  # signals on the way to step 5


@pytest.fixture(scope="module")
def followed(ranks: Ranks, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three attempts: killed on the way to step 5, with a checkpoint of step 3; stopped after step
    5; and finished."""
    run = RunFolder(tmp_path_factory.mktemp("followed") / "run")
    around = run.path.parent
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(around), "WANDB_SILENT": "true"}
    env["WANDB_DISABLE_GIT"] = "true"
    fields = {"save_steps": 3, "eval_steps": 3, "max_steps": 8, "async_save": "off"}
    words = argv(demo, run.path, **fields)
    words += ["--report_to", "tensorboard", "wandb"]
    for phase, name, status in (
        ("forward", "SIGKILL", [-signal.SIGKILL]),
        ("forward", "SIGTERM", [75]),
        ("none", "SIGTERM", [0, 0]),
    ):
        begun = ranks.start(
            [phase, "0", name, *words],
            script=TRACKED,
            strategy="ddp",
            processes=len(status),
            env=env,
        )
        assert begun.wait() == status, begun.output
    return {"run": run, "around": around}


def test_one_curve(followed: dict[str, Any]) -> None:
    run, around, every = followed["run"], followed["around"], list(range(1, 9))
    assert [a.resumed_from for a in run.attempts()] == [0, 3, 5]
    (folder,) = (run.path / "runs").iterdir()
    assert folder.name == run.run_id()
    curves = trackers.tensorboard(folder)
    assert [step for step, _ in curves["train/loss"]] == every
    assert [step for step, _ in curves["eval/loss"]] == [3, 6, 8]
    assert [step for step, _ in curves["train/train_runtime"]] == [8]
    saves = [step for step, _ in curves["keepstep/save_stall_seconds"]]
    assert saves == [3, 5, 6, 8]
    assert [step for step, _ in curves["keepstep/attempt"]] == [1, 4, 6]
    assert all(len({s for s, _ in points}) == len(points) for points in curves.values())

    (own, rows), *others = trackers.wandb_rows(around, killed=1).items()
    assert (own, others) == (run.run_id(), [])
    assert len(list(around.glob("wandb/offline-run-*"))) == 3
    assert trackers.steps_of(rows, "train/loss") == every
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert trackers.steps_of(rows, "eval/loss") == [3, 6, 8]
    names = {name for row in rows for name in row if not name.startswith("_")}
    for name in names - {"train/global_step"}:
        assert trackers.twice(trackers.steps_of(rows, name)) == []
    # W&B writes after a while: had it nothing of the first attempt, its losses are made up for.
    assert trackers.steps_of(rows, "keepstep/save_bytes") in (saves, saves[1:])
    seen = dict(curves["train/loss"])
    told = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert told == pytest.approx(seen)
    assert set(tracked_of(run).reached.values()) == {8}
    for name in ("goodput", "save_gb_per_second", "save_lag_seconds", "disk_free_bytes"):
        assert f"keepstep/{name}" in curves
        assert f"keepstep/{name}" in names
    goodput = [row["keepstep/goodput"] for row in rows if "keepstep/goodput" in row]
    assert all(0 < share < 1 for share in goodput)

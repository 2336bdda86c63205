"""The resumed run is the same run: what is easily lost on the way, and the weights bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

ALONE: dict[str, Any] = {"strategy": "ddp", "processes": 1}
STOPPED = PROGRAMS / "stopped.py"  # signals at step 4, or on the way to step 5
# No loss falls by 90 %: every evaluation halves the learning rate, and is one without a better one
# for early stopping. Iterators that stay, and those of a resumed run, are not begun as often.
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": '{"factor": 0.5, "patience": 0, "threshold": 0.9}',
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "early_stopping_patience": 50,
    "eval_steps": 1,
    "save_steps": 4,
    "max_steps": 8,
}


def told(run: Path, step: int) -> dict[str, Any]:
    """What the evaluations left behind."""
    folder = run / f"checkpoint-{step}"
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluated = [(e["step"], e["eval_loss"]) for e in state["log_history"] if "eval_loss" in e]
    counted = state["stateful_callbacks"]["EarlyStoppingCallback"]
    manifest = RunFolder(run).checkpoint(step).manifest
    loss, due = manifest.metrics["eval_loss"], manifest.evaluation_due
    return {"evaluated": evaluated, "best": state["best_metric"]} | {
        **{"counted": counted, "loss": loss, "due": due},
        **{"files": {n: e for n, e in manifest.files.items() if n != "trainer_state.json"}},
    }


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, demo: Path, workspace: Path) -> Path:
    run = workspace / "plateau"
    ranks.run(argv(demo, run, **PLATEAU), **ALONE)
    return run


@pytest.mark.parametrize(
    ("phase", "stops_at", "last"),
    [
        # an evaluation that is due is cancelled
        pytest.param("forward", 5, 8, marks=pytest.mark.long),
        ("evaluation", 4, 4),  # … is broken off, the last one of the run
        pytest.param("evaluation", 4, 8, marks=pytest.mark.long),
    ],
)
def test_an_evaluation_that_a_stop_cancelled_is_made_up(
    ranks: Ranks,
    demo: Path,
    workspace: Path,
    undisturbed: Path,
    phase: str,
    stops_at: int,
    last: int,
) -> None:
    run = workspace / f"plateau-{phase}-{last}"
    command = argv(demo, run, **PLATEAU | {"max_steps": last})
    stopped = ranks.start([phase, "0", "SIGTERM", *command], script=STOPPED, **ALONE)
    assert stopped.wait() == [75]
    checkpoint = RunFolder(run).checkpoints()[-1]
    assert (checkpoint.step, checkpoint.manifest.evaluation_due) == (stops_at, True)
    assert checkpoint.manifest.metrics == {}
    resumed = ranks.run(command, **ALONE)
    assert f"step {stops_at} was not evaluated to the end: that is made up now" in resumed.output
    assert f"Finished: {last} steps." in resumed.output
    assert told(run, last) == told(undisturbed, last)
    assert RunFolder(run).checkpoint(stops_at).manifest.metrics["eval_loss"] > 0


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_it_is_made_up_by_several_ranks(
    ranks: Ranks, demo: Path, workspace: Path, schedule: str
) -> None:
    straight, broken = workspace / f"zero-{schedule}-straight", workspace / f"zero-{schedule}"
    fields = PLATEAU | {"lr_scheduler_type": schedule}
    if schedule == "linear":
        del fields["lr_scheduler_kwargs"]
    ranks.run(argv(demo, straight, **fields))
    command = argv(demo, broken, **fields)
    stopped = ranks.start(["forward", "1", "SIGTERM", *command], script=STOPPED)
    assert stopped.wait() == [75, 75]
    assert RunFolder(broken).checkpoint(5).manifest.evaluation_due
    ranks.run(command)
    assert told(broken, 8) == told(straight, 8)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 75)])
def test_an_epoch_s_evaluation_is_not_lost(
    ranks: Ranks, demo: Path, workspace: Path, number: str, code: int
) -> None:
    """Evaluated by epochs, of four steps, and saved by steps."""
    rows = (demo / "data/train.jsonl").read_text().splitlines(keepends=True)[:16]
    (workspace / "epochs.jsonl").write_text("".join(rows))
    fields = PLATEAU | {
        "dataset_name": workspace / "epochs.jsonl",
        "eval_strategy": "epoch",
        "save_steps": 2,
        "max_steps": 12,
        "keep_ranking": "recency",
    }
    straight, broken = workspace / f"epochs-{number}-straight", workspace / f"epochs-{number}"
    ranks.run(argv(demo, straight, **fields), **ALONE)
    command = argv(demo, broken, **fields)
    stopped = ranks.start(["evaluation", "0", number, *command], script=STOPPED, **ALONE)
    assert stopped.wait() == [code]
    ranks.run(command, **ALONE)
    assert told(broken, 12) == told(straight, 12)

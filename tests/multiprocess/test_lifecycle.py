"""Branches, drift, warm starts, early stopping and crash loops of real runs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}


def status(run: Path) -> dict:
    return json.loads((run / ".keepstep/status.json").read_text())


def test_drift_is_refused_field_by_field(ranks: Ranks, demo: Path, workspace: Path) -> None:
    run = workspace / "drift"
    ranks.run(argv(demo, run, **SHORT))
    changed = argv(demo, run, **SHORT | {"max_steps": 6, "learning_rate": 1e-3, "seed": 7})
    refused = ranks.start(changed)
    assert refused.wait() == [2, 2]
    assert "settings have changed since checkpoint-4 was made" in refused.output
    assert re.search(r"learning_rate: 0\.004 → 0\.001\n +seed: 42 → 7", refused.output)
    assert "allow_drift: [learning_rate, seed]" in refused.output
    assert status(run)["exit"] == 2
    refused = ranks.start(argv(demo, run, **SHORT | {"attn_implementation": "eager"}))
    assert refused.wait() == [2, 2]
    assert "attn_implementation: sdpa → eager" in refused.output
    changed += ["--attn_implementation", "sdpa"]  # which the model had taken by itself
    accepted = ranks.run([*changed, "--allow_drift", "learning_rate", "seed"])
    assert "carrying on from checkpoint-4; 6 steps are planned now, not 4" in accepted.output
    state = json.loads((run / "checkpoint-6/trainer_state.json").read_text())
    rates = {e["step"]: e["learning_rate"] for e in state["log_history"] if "loss" in e}
    assert 0 < rates[6] < 1e-3 < rates[3] <= 4e-3  # a quarter of what it was


def test_another_interval_holds_at_once(ranks: Ranks, demo: Path, workspace: Path) -> None:
    run = workspace / "interval"
    ranks.run(argv(demo, run, **SHORT))
    ranks.run(argv(demo, run, max_steps=8, save_steps=4, eval_steps=4))
    assert [c.step for c in RunFolder(run).checkpoints()] == [2, 4, 8]


def test_evaluated_more_often_than_saved_and_rewound(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    run = workspace / "branches"
    fields = {"eval_steps": 1, "save_steps": 3, "max_steps": 9}
    ranks.run(argv(demo, run, **fields))
    folder = RunFolder(run)
    assert [c.step for c in folder.checkpoints()] == [3, 6, 9]
    losses = {c.step: c.manifest.metrics["eval_loss"] for c in folder.checkpoints()}
    assert os.readlink(run / "best") == f"checkpoint-{min(losses, key=losses.__getitem__)}"
    state = json.loads((run / "checkpoint-9/trainer_state.json").read_text())
    seen = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert losses == {step: seen[step] for step in losses}
    assert state["best_model_checkpoint"] is None  # it would be an absolute path

    back = argv(demo, run, **fields, resume_from_checkpoint="3", learning_rate=1e-3)
    ranks.killed([*back, "--allow_drift", "learning_rate", "--async_save", "off"], 7)
    again = ranks.run([*back, "--allow_drift", "learning_rate"])  # the same command
    assert "resume_from_checkpoint: 3 was done by an earlier attempt" in again.output
    assert "carrying on from checkpoint-6" in again.output
    lineage = {c.step: (c.manifest.attempt, c.manifest.parent) for c in folder.checkpoints()}
    assert lineage == {3: (1, None), 6: (2, 3), 9: (3, 6)}


@pytest.mark.parametrize("kind", cases(["full", "lora"], long=["full"]))
def test_weights_without_state(ranks: Ranks, demo: Path, workspace: Path, kind: str) -> None:
    run = workspace / f"weights-{kind}"
    fields = {**SHORT, "save_only_model": True, **(LORA if kind == "lora" else {})}
    ranks.run(argv(demo, run, **fields))
    assert not list(run.glob("checkpoint-4/global_step*"))
    more = argv(demo, run, **fields | {"max_steps": 6})
    refused = ranks.start(more)
    assert refused.wait() == [2, 2]
    assert "checkpoint-4 holds weights, not the state to go on from" in refused.output
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in refused.output

    other = workspace / f"warm-{kind}"
    warm = argv(demo, other, **SHORT, **(LORA if kind == "lora" else {}), eval_on_start=True)
    warm += ["--resume_weights_only", "--resume_from_checkpoint", str(run / "checkpoint-4")]
    started = ranks.run(warm)
    assert "starting at step 0 with the weights of checkpoint-4" in started.output
    first = json.loads((other / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    (at_start,) = [e["eval_loss"] for e in first if "eval_loss" in e and e["step"] == 0]
    recorded = RunFolder(run).checkpoint(4).manifest.metrics["eval_loss"]
    assert at_start == pytest.approx(recorded, abs=1e-4)
    assert [c.manifest.parent for c in RunFolder(other).checkpoints()] == [None, None]


def test_early_stopping_goes_on_counting(ranks: Ranks, demo: Path, workspace: Path) -> None:
    run = workspace / "patience"
    fields = {"learning_rate": 0, "save_steps": 1, "eval_steps": 1}
    command = argv(demo, run, **fields, early_stopping_patience=4)
    ranks.killed(argv(demo, run, **fields, early_stopping_patience=9), 4)
    resumed = ranks.run(command)
    assert "Finished: 5 steps." in resumed.output  # the first evaluation, and four no better
    assert status(run)["outcome"] == "finished"
    again = ranks.run(command)
    assert "This run is finished, at step 5 of 12" in again.output


def test_the_best_value_is_one_of_the_metric_that_ranks(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    """No loss is below an accuracy: the run would end after two evaluations."""
    run = workspace / "renamed"
    fields = {"save_steps": 1, "eval_steps": 1, "early_stopping_patience": 2, "max_steps": 8}
    first = argv(demo, run, **fields, metric_for_best_model="mean_token_accuracy")
    ranks.killed(first, 4, strategy="ddp", processes=1)
    resumed = ranks.run(argv(demo, run, **fields), strategy="ddp", processes=1)
    assert "Finished: 8 steps." in resumed.output
    ((step, found),) = re.findall(
        r"(?s)carrying on from checkpoint-(\d+).*eval_loss ranks from here on, another did before: "
        r"the best so far is ([\d.]+), of step",
        resumed.output,
    )
    log = json.loads((run / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    losses = {e["step"]: e["eval_loss"] for e in log if "eval_loss" in e}
    best = min(loss for at, loss in losses.items() if at <= int(step))
    assert float(found) == pytest.approx(best, rel=1e-5)


def test_a_crash_loop_steps_back_and_ends(ranks: Ranks, demo: Path, workspace: Path) -> None:
    run = workspace / "loop"
    fields = {**SHORT, "max_attempts_without_progress": 1, "async_save": "off"}
    ranks.killed(argv(demo, run, **fields), 2)
    attempt = ranks.killed(argv(demo, run, **fields), 2)
    assert "carrying on from checkpoint-2" in attempt.output
    attempt = ranks.start(argv(demo, run, **fields))
    assert attempt.wait() == [76, 76]
    assert "checkpoint-2: resumed 1 time without progress" in attempt.output
    assert status(run)["outcome"] == "no_progress"
    assert [c.step for c in RunFolder(run).checkpoints()] == [2]  # nothing was lost


def test_a_finished_run_whose_last_steps_are_not_saved(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    run = workspace / "best-only"
    fields = {"save_strategy": "best", "eval_steps": 1, "learning_rate": 0.05, "max_steps": 5}
    first = ranks.run(argv(demo, run, **fields))
    assert "Finished: 5 steps." in first.output
    (saved, *_) = [c.step for c in RunFolder(run).checkpoints()][::-1]
    assert saved < 5
    again = ranks.run(argv(demo, run, **fields))
    assert "This run is finished, at step 5 of 5: there is nothing to train." in again.output
    assert "  loss " not in again.output
    assert (status(run)["outcome"], status(run)["global_step"]) == ("finished", 5)
    more = ranks.run(argv(demo, run, **fields | {"max_steps": 6}))
    assert f"carrying on from checkpoint-{saved}; 6 steps are planned now" in more.output
    assert "Finished: 6 steps." in more.output


def test_finished_without_a_checkpoint_is_not_finished_for_another_recipe(
    ranks: Ranks, demo: Path, workspace: Path
) -> None:
    run = workspace / "none-saved"
    alone: dict[str, Any] = {"strategy": "ddp", "processes": 1}
    unsaved = {"save_strategy": "no", "eval_strategy": "no", "save_total_limit": "null"}
    first = ranks.run(argv(demo, run, **SHORT | unsaved), **alone)
    assert "Finished: 4 steps." in first.output
    saving = ranks.run(argv(demo, run, **SHORT, learning_rate=1e-3), **alone)
    assert "is finished" not in saving.output
    assert [c.step for c in RunFolder(run).checkpoints()] == [2, 4]


def test_a_recipe_that_a_library_refuses(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """One attempt without progress is allowed; once it is repaired, the run begins."""
    run = workspace / "refused"
    fields = {
        **SHORT,
        "max_attempts_without_progress": 1,
        "lr_scheduler_type": "polynomial",  # asks for what DeepSpeed's optimizers do not have
    }
    wrong = argv(demo, run, **fields, optim="rmsprop", optim_args="alpha=-1")
    refused = ranks.start(wrong)
    assert refused.wait() == [2, 2], refused.output
    assert "keepstep: the recipe has a problem:" in refused.output
    assert "Invalid alpha value: -1.0" in refused.output
    assert "[refused]" in refused.output
    assert "Traceback" not in refused.output
    assert status(run)["exit"] == 2
    shares = {"max_steps": -1, "num_train_epochs": 0.3, "save_steps": 0.6, "eval_steps": 0.4}
    apart = ranks.start(argv(demo, run, **fields | shares))
    assert apart.wait() == [2, 2], apart.output
    assert "is no multiple of eval_steps: 0.4" in apart.output
    repaired = ranks.run(argv(demo, run, **fields))
    assert "Finished: 4 steps." in repaired.output

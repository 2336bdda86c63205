"""A loss that is not a number, on one rank: the run ends, says whose, and saved none of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers import unreadable
from tests.helpers.campaigns import cases
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

SCRIPT = PROGRAMS / "poisoned.py"
FIELDS = {
    **{"max_steps": 10, "save_steps": 2, "save_total_limit": 9, "eval_strategy": "no"},
    **{"keep_ranking": "recency", "logging_steps": 100, "per_device_train_batch_size": 3},
}
CASES = [("ddp", "loss"), ("cpu_zero2", "norm"), ("cpu_zero3", "loss"), ("ddp", "norm")]


def events(run: Path, name: str) -> list[dict]:
    lines = (run / ".keepstep/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize(
    ("strategy", "kind"), cases(CASES, long=[("cpu_zero3", "loss"), ("ddp", "norm")])
)
@pytest.mark.parametrize("step", cases([5, 6, 10], long=[5, 10]))
def test_stops(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, kind: str, step: int
) -> None:
    """Also of a step that is saved (6), and of the last one (10)."""
    out, watch = tmp_path / "run", tmp_path / "watch"
    command = [str(watch), kind, str(step), "1", *argv(demo, out, **FIELDS)]
    run = ranks.start(command, strategy=strategy, script=SCRIPT)
    assert run.wait() == [2, 2], run.output[-3000:]
    assert "Traceback" not in run.output
    whose = "the loss of rank 1 is" if kind == "loss" else "the gradient norm is"
    assert f"{whose} not finite" in run.output
    status = json.loads((out / ".keepstep/status.json").read_text())
    assert status["outcome"] == "failed"
    assert f"in step {step}; it had these rows of the training set" in status["reason"]
    newest = step - 2 if step % 2 == 0 else step - 1
    assert [c.step for c in RunFolder(out).checkpoints()] == [*range(2, newest + 1, 2)]
    assert f"checkpoint-{newest} is from before" in status["reason"]
    (told,) = events(out, "nonfinite")
    assert told["ranks"] == ([1] if kind == "loss" else [])
    assert len(told["rows"]) == (3 if kind == "loss" else 6)
    assert re.search("on_nonfinite: ignore", status["reason"])


def test_ignored(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """What is saved then is never gone on from by itself, and never all that is kept."""
    out = tmp_path / "run"
    fields = FIELDS | {"on_nonfinite": "ignore", "save_total_limit": 1}
    fields |= {"logging_steps": 2}
    command = [str(tmp_path / "watch"), "loss", "5", "1", *argv(demo, out, **fields)]
    run = ranks.run(command, strategy="ddp", script=SCRIPT)
    assert run.output.count("the loss of rank 1 is not finite") == 1
    assert "warning: checkpoint-10 is not finite" in run.output
    assert "loss nan" in run.output
    assert "loss 0.0000" not in run.output
    assert [(c.step, c.manifest.is_finite) for c in RunFolder(out).checkpoints()] == [
        (4, True),
        (10, False),
    ]
    found = RunFolder(out).choose("auto")
    assert found is not None
    assert found.step == 4


@pytest.mark.long
def test_a_spike_that_is_ignored_hides_nothing(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Of a gradient whose norm nobody knows: its step is a spike, and spoils the weights."""
    out, spikes = tmp_path / "run", {"spike_sigma": 100, "spike_window": 5}
    command = [str(tmp_path / "watch"), "both", "8", "1", *argv(demo, out, **FIELDS | spikes)]
    run = ranks.start(command, strategy="cpu_zero0", script=SCRIPT)
    assert run.wait() == [2, 2], run.output[-3000:]
    (spike,), (told,) = events(out, "spike"), events(out, "nonfinite")
    assert (spike["step"], spike["action"]) == (8, "ignore")
    assert (told["step"], told["what"], told["action"]) == (8, "weights", "stop")
    assert "on_spike: ignore: training goes on" in run.output


def test_an_evaluation_that_is_not_finite_is_no_mean_of_what_is(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """The Trainer leaves such batches out: a checkpoint that fails at them would rank best."""
    made = unreadable.make(demo, tmp_path)
    fields = FIELDS | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    fields |= {"keep_ranking": "metric"}
    fields |= {"model_name_or_path": made["model_name_or_path"], "on_nonfinite": "ignore"}
    fields |= {"eval_dataset_name": made["dataset_name"]}
    run = ranks.run(argv(demo, tmp_path / "run", **fields), strategy="ddp")
    assert "eval_loss nan  (not finite: it ranks nothing)" in run.output
    folder = RunFolder(tmp_path / "run")
    assert [c.metrics.get("eval_loss") for c in folder.checkpoints()] == [None]
    assert folder.best() is None


def test_stage_3_goes_on_after_a_step_that_it_skips(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """DeepSpeed 0.19.8 would end in a "tracing error" before anybody has heard of the NaN."""
    made = unreadable.make(demo, tmp_path)
    fields = FIELDS | {"on_nonfinite": "ignore", "max_steps": 12} | made  # an epoch, and more
    run = ranks.run(argv(demo, tmp_path / "run", **fields), strategy="cpu_zero3")
    told = events(tmp_path / "run", "nonfinite")[0]
    assert told["step"] < 12
    assert unreadable.ROW in told["rows"]
    assert "Finished: 12 steps" in run.output


def test_what_is_saved_is_not_a_copy_from_before(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [str(tmp_path / "watch"), "stale", "0", "0", *argv(demo, out, **FIELDS)]
    run = ranks.start(command, strategy="ddp", script=SCRIPT)
    assert run.wait() == [70, 70]
    assert [c.step for c in RunFolder(out).checkpoints()] == [2]
    status = json.loads((out / ".keepstep/status.json").read_text())
    assert "has made steps since checkpoint-2" in status["reason"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "cpu_zero2", "cpu_zero3"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_rate_of_0_is_no_copy_from_before(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, optim: str
) -> None:
    """SGD's files are the same at every step then; AdamW counts."""
    fields = FIELDS | {"learning_rate": 0, "lr_scheduler_type": "constant", "optim": optim}
    fields |= {"weight_decay": 0, "warmup_steps": 0}
    for steps in (6, 10):
        run = ranks.run(argv(demo, tmp_path, **fields | {"max_steps": steps}), strategy=strategy)
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [2, 4, 6, 8, 10], run.output

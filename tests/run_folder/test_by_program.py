"""A run folder as a program looks at it: list, choose, verify. No torch."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from keepstep import Checkpoint, DamagedError, ManifestError, Policy, RunFolder, SelectionError
from tests.helpers.folders import commit, identify


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The best is at 20; 30 is on an abandoned branch, 25 the newest."""
    identify(tmp_path, limit=3, ranking="metric", metric="eval_loss")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 0.5)):
        commit(tmp_path, step, metrics={"eval_loss": loss, "eval_accuracy": loss / 4})
    commit(tmp_path, 25, attempt=2, parent=20, metrics={})
    return RunFolder(str(tmp_path))


def test_checkpoints_are_listed(run: RunFolder) -> None:
    found = run.checkpoints()
    assert [c.step for c in found] == [10, 20, 25, 30]
    assert found[1].metrics == {"eval_loss": 1.0, "eval_accuracy": 0.25}
    assert found[2].metrics == {}
    assert found[0].path == run.path / "checkpoint-10"
    assert run.checkpoint(20) == found[1]
    with pytest.raises(KeyError):
        run.checkpoint(21)
    found[1].metrics["eval_loss"] = 0.0
    assert found[1].metrics["eval_loss"] == 1.0, "a copy"


def test_the_best_and_the_latest(run: RunFolder) -> None:
    assert run.best() == run.checkpoint(20)
    accuracy = Policy(metric="eval_accuracy", greater_is_better=True)
    assert run.best(accuracy) == run.checkpoint(10)
    assert run.best(Policy()) is None
    assert run.latest() == run.checkpoint(25), "30 is on an abandoned branch"


def test_a_choice_is_what_a_resume_takes(run: RunFolder) -> None:
    assert run.choose() == run.choose("latest") == run.checkpoint(25)
    assert run.choose("best") == run.choose(20) == run.choose("20") == run.checkpoint(20)
    assert run.choose("never") is None
    for nothing in (15, "sometimes", -1):
        with pytest.raises(SelectionError, match="there are checkpoints at: 30, 25, 20, 10"):
            run.choose(nothing)
    (run.path / "checkpoint-25/rng_state_1.pth").unlink()
    assert run.choose() == run.checkpoint(20), "the newest valid one"
    with pytest.raises(SelectionError, match=r"checkpoint-25, which is damaged: rng_state_1\.pth"):
        run.choose("latest")
    assert run.latest() == run.checkpoint(25), "its files are not looked at"


def test_a_checkpoint_is_verified(run: RunFolder) -> None:
    best, newest = run.choose("best"), run.checkpoint(25)
    assert best is not None
    best.verify(deep=True)
    weights = best.path / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    best.verify()
    assert best.faults() == []
    assert best.faults(deep=None) == best.faults(deep=True) != []
    (best.path / "rng_state_0.pth").unlink()
    with pytest.raises(DamagedError, match=r"checkpoint-20 is damaged: .* is missing$") as raised:
        best.verify()
    assert (raised.value.path, raised.value.step) == (best.path, 20)
    assert raised.value.faults == ("rng_state_0.pth is missing",)
    shutil.rmtree(run.checkpoint(25).path)  # as a run at work prunes
    with pytest.raises(DamagedError, match=r"^checkpoint-25: it is not there any more: a run at"):
        newest.verify()
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.path, again.faults) == (
        str(raised.value),
        best.path,
        raised.value.faults,
    )


def test_a_checkpoint_at_a_path(run: RunFolder) -> None:
    (run.path / "best").symlink_to("checkpoint-20")
    assert Checkpoint.at(run.path / "best") == Checkpoint.at(str(run.path / "checkpoint-20"))
    assert Checkpoint.at(run.path / "best").path.name == "checkpoint-20"
    with pytest.raises(ManifestError, match=r"holds no readable manifest\.json"):
        Checkpoint.at(run.path)
    (run.path / "checkpoint-10/manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match="holds no readable"):
        Checkpoint.at(run.path / "checkpoint-10")


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new")
    assert (run.checkpoints(), run.best(), run.latest(), run.retention()) == ([], None, None, [])
    assert run.choose() is None
    with pytest.raises(SelectionError, match="best cannot be had; there are none"):
        run.choose("best")
    assert not run.path.exists(), "nothing is made by looking"

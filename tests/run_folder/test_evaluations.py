"""What was measured of a checkpoint afterwards lies beside its manifest, and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepstep.policy.manifest import MANIFEST_NAME
from keepstep.policy.strict import with_check
from keepstep.publish.bundle import freeze
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, add_evaluation, rows_evaluated
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.attempts import METRIC, Launch


def add(checkpoint: Checkpoint, **metrics: float) -> None:
    add_evaluation(Storage(), checkpoint.path, checkpoint.manifest, metrics, {"": "5 rows"})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    launch = Launch(tmp_path / "run")
    launch.save(2, 1.0)
    launch.save(4)  # its evaluation was broken off
    launch.end("preempted", 4)
    return launch.folder


def test_ranking_and_links_follow(run: RunFolder) -> None:
    assert run.best().step == 2
    text = (run.checkpoint(4).path / MANIFEST_NAME).read_text()
    add(run.checkpoint(4), eval_loss=0.5, eval_nan=float("nan"))
    assert run.checkpoint(4).metrics == {"eval_loss": 0.5}, "the same folder, looked at before"
    assert run.best().step == 4
    Keeper(run, METRIC, Storage()).point()
    assert (run.path / "best").readlink() == Path("checkpoint-4")
    assert (run.checkpoint(4).path / MANIFEST_NAME).read_text() == text
    assert run.faults(run.checkpoint(4), deep=True) == []
    frozen = freeze(run.checkpoint(4), run.path / "frozen", Storage())
    assert frozen.manifest.metrics == {"eval_loss": 0.5}, "publishing follows"


def test_the_manifest_counts_before_it_and_what_is_newer_before_the_older(run: RunFolder) -> None:
    add(run.checkpoint(2), eval_loss=9.0, eval_other_loss=3.0)
    add(run.checkpoint(2), eval_third_loss=4.0, eval_other_loss=2.0)
    expected = {"eval_loss": 1.0, "eval_other_loss": 2.0, "eval_third_loss": 4.0}
    assert run.checkpoint(2).metrics == expected


def test_each_set_keeps_the_digest_of_its_rows(run: RunFolder) -> None:
    four = run.checkpoint(4)
    assert rows_evaluated(four.path, four.manifest) == {}
    add(four, eval_loss=0.5)
    more = {"law": "7 rows, ab"}
    add_evaluation(Storage(), four.path, four.manifest, {"eval_law_loss": 1.0}, more)
    assert rows_evaluated(four.path, four.manifest) == {"": "5 rows", **more}
    assert rows_evaluated(four.path, run.checkpoint(2).manifest) == {}, "of another checkpoint"


@pytest.mark.parametrize("damage", ["torn", "changed", "of another", "no metrics", "a folder"])
def test_what_cannot_be_believed_is_passed_by_and_told(run: RunFolder, damage: str) -> None:
    four = run.checkpoint(4)
    add(four, eval_loss=0.5)
    path = four.path / EVALUATIONS_NAME
    text = path.read_text()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "of another":
        path.write_text(text.replace('"attempt": 1', '"attempt": 2'))
        values = json.loads(path.read_text())
        del values["check"]
        path.write_text(with_check(json.dumps(values)))
    elif damage == "no metrics":
        path.write_text(with_check(json.dumps({"metrics": {"eval_loss": "low"}})))
    else:
        path.write_text(text[:-9] if damage == "torn" else text.replace("0.5", "0.1"))
    again = RunFolder(run.path)
    assert again.checkpoint(4).metrics == {}
    assert again.best().step == 2
    assert list(notes_on(again)) == [f"checkpoint-4/{EVALUATIONS_NAME}"]


def test_a_lost_manifest_is_still_known(run: RunFolder) -> None:
    add(run.checkpoint(4), eval_loss=0.5)
    (run.path / "checkpoint-4" / MANIFEST_NAME).unlink()
    assert list(RunFolder(run.path).lost_manifests()) == ["checkpoint-4"]


def test_of_a_checkpoint_that_was_pruned_nothing_is_written(run: RunFolder) -> None:
    four = run.checkpoint(4)
    four.path.rename(run.path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        add(four, eval_loss=0.5)
    assert not four.path.exists()

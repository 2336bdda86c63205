"""What bears the name of a checkpoint that is to come: a stranger's, a broken one, a pinned one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.policy.selection import SelectionError
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.reader import RunFolder, read_checkpoint
from keepstep.run_folder.storage import Storage
from tests.helpers.attempts import Launch
from tests.helpers.folders import commit, events, left_behind

THREE = Policy(3, "recency")


def run_of(path: Path, *steps: int) -> Launch:
    launch = Launch(path, THREE)
    for step in steps:
        launch.save(step)
    return launch


@pytest.mark.parametrize("lost", [10, 20, 30])
def test_a_checkpoint_that_lost_its_manifest(tmp_path: Path, lost: int) -> None:
    """It is the run's own: set aside with the reason, whichever it is, and its step free again."""
    run_of(tmp_path, 10, 20, 30)
    (tmp_path / f"checkpoint-{lost}/manifest.json").unlink()
    folder = RunFolder(tmp_path)
    assert folder.lost_manifests() == {f"checkpoint-{lost}": "it has lost its manifest.json"}
    assert folder.strangers() == {}
    again = Launch(tmp_path, THREE)
    assert again.step == (20 if lost == 30 else 30)
    aside = folder.quarantine / f"checkpoint-{lost}-attempt-2"
    assert sorted(p.name for p in aside.iterdir()) == ["rank0.pt", "rank1.pt"]
    assert "lost its manifest" in aside.with_name(f"{aside.name}.txt").read_text()
    assert folder.lost_manifests() == {}
    again.save(lost + 30)
    (event,) = events(folder, "quarantine")
    assert event["step"] == lost


def test_the_only_one_lost_its_manifest(tmp_path: Path) -> None:
    """The run does not silently start again; nor has it to, with `never`."""
    run_of(tmp_path, 10)
    (tmp_path / "checkpoint-10/manifest.json").unlink()
    with pytest.raises(SelectionError, match=r"checkpoint-10: it has lost its manifest\.json"):
        Launch(tmp_path)
    again = Launch(tmp_path, request="never")
    again.save(10)
    assert again.steps() == [10]


def test_it_loses_its_manifest_while_the_run_goes_on(tmp_path: Path) -> None:
    """A branch reaches the step of one that was whole at the start."""
    run_of(tmp_path, 10, 20)
    back = Launch(tmp_path, THREE, request="10")
    (tmp_path / "checkpoint-20/manifest.json").write_text("{")
    (tmp_path / "checkpoint-20/rank0.pt").unlink()
    back.save(20)
    assert back.steps() == [10, 20]
    assert (back.folder.quarantine / "checkpoint-20-attempt-2").is_dir()


def test_parts_of_it_are_gone_as_well(tmp_path: Path) -> None:
    run_of(tmp_path, 10, 20)
    for name in ("manifest.json", "rank1.pt"):
        (tmp_path / "checkpoint-20" / name).unlink()
    assert Launch(tmp_path).step == 10
    assert not (tmp_path / "checkpoint-20").exists()


def strangers(run: Path, how: str) -> Path:
    """Something at the name of checkpoint-40 that the run has not put there."""
    place = run / "checkpoint-40"
    if how == "file":
        place.write_text("mine")
    elif how == "link":
        (run / "elsewhere").mkdir()
        place.symlink_to("elsewhere")
    elif how == "dangling link":
        place.symlink_to("nowhere")
    elif how == "another run's":
        commit(run, 40)
    elif how == "in the place of a pruned one":
        run_of(run, 40, 50, 60, 70)
        shutil.copytree(run / "checkpoint-70", place, ignore=lambda *_: ["manifest.json"])
    elif how == "in the place of a lost one, and larger":
        run_of(run, 40)
        shutil.rmtree(place)
        place.mkdir()
        (place / "large").write_bytes(b"x" * 1000)
    else:
        place.mkdir()
        (place / "model.bin").write_text("mine")
    return place


@pytest.mark.parametrize(
    "how",
    [
        *("folder", "file", "link", "dangling link", "another run's"),
        *("in the place of a pruned one", "in the place of a lost one, and larger"),
    ],
)
def test_a_stranger_is_told_is_never_touched_and_costs_no_other_step(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_of(tmp_path, 10, 20)
    place = strangers(tmp_path, how)
    before = seen(place)
    launch = Launch(tmp_path, THREE, request="never")
    assert any("checkpoint-40 is not touched" in m for m in caplog.messages)
    assert "checkpoint-40" in launch.folder.in_the_way()
    with pytest.raises(FileExistsError, match=r"in the way, and not this run's: '.*checkpoint-40'"):
        launch.save(40)
    assert left_behind(launch.folder) == []
    launch.save(41)
    assert 41 in launch.steps()
    Launch(tmp_path, THREE, request="latest").save(45)
    assert seen(place) == before


def seen(place: Path) -> object:
    if place.is_symlink():
        return os.readlink(place)
    if place.is_file():
        return place.read_text()
    return {p.name: p.read_bytes() for p in place.iterdir()}


def test_a_pinned_checkpoint_whose_step_a_branch_saves_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pin says: whatever happens. It is kept whole, elsewhere; the pin is not the new one's."""
    first = run_of(tmp_path, 10, 20)
    Keeper(first.folder, THREE, Storage()).pin(20)
    pinned = first.folder.checkpoint(20).manifest
    back = Launch(tmp_path, THREE, request="10")
    back.save(20)
    kept = tmp_path / ".keepstep/pinned/attempt-1/checkpoint-20"
    assert read_checkpoint(kept).manifest == pinned
    assert back.folder.faults(read_checkpoint(kept), deep=True) == []
    assert back.folder.checkpoint(20).manifest.attempt == 2
    assert back.folder.pinned() == set()
    assert any(".keepstep/pinned/attempt-1/checkpoint-20" in m for m in caplog.messages)
    assert left_behind(back.folder) == []
    for step in (30, 40, 50):
        back.save(step)
    assert back.steps() == [30, 40, 50]
    assert Launch(tmp_path, THREE).step == 50
    assert kept.is_dir()
    assert Launch(tmp_path / "other", request=str(kept)).step == 20, "resumes, exports, verifies"


def test_a_commit_that_fails_puts_back_what_made_way(tmp_path: Path) -> None:
    """The rename fails on a disk that answers again a moment later."""
    run_of(tmp_path, 10, 20)
    failing = False

    def before(operation: str, path: Path) -> None:
        if failing and operation == "rename" and "staging" in str(path):
            raise OSError(5, "Input/output error")

    back = Launch(tmp_path, THREE, request="10", storage=Storage(before))
    failing = True
    with pytest.raises(OSError, match="Input/output"):
        back.save(20)
    assert back.steps() == [10, 20]
    assert back.folder.checkpoint(20).manifest.attempt == 1
    failing = False
    back.save(20)
    assert back.folder.checkpoint(20).manifest.attempt == 2


def test_ls_and_verify_name_them(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from keepstep.cli.main import app

    run_of(tmp_path, 10, 20)
    (tmp_path / "checkpoint-20/manifest.json").unlink()
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-40").symlink_to("checkpoint-10")
    for words in (["verify", str(tmp_path)], ["ls", str(tmp_path)]):
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == (1 if words[0] == "verify" else 0)
        told = " ".join(answer.output.split())
        assert "checkpoint-20: it has lost its manifest.json" in told
        assert "checkpoint-30: it has no manifest.json: keepstep did not commit it" in told
        assert "checkpoint-40: it is a link" in told
    answer = CliRunner().invoke(app, ["verify", "--json", str(tmp_path)])
    assert set(json.loads(answer.output)) >= {"checkpoint-20", "checkpoint-30", "checkpoint-40"}

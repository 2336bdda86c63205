from __future__ import annotations

import shutil
from pathlib import Path

from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import commit, identify


def test_only_this_runs_checkpoints_are_listed(tmp_path: Path) -> None:
    run = identify(tmp_path)
    for step in (100, 20, 3):
        commit(run, step)
    commit(run, 50, run_id="another")
    shutil.copytree(run / "checkpoint-20", run / "checkpoint-best-copy")
    shutil.copytree(run / "checkpoint-20", run / "checkpoint-21")
    (run / "checkpoint-mine").mkdir()
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-8").symlink_to("checkpoint-20")
    folder = RunFolder(run)
    assert [c.step for c in folder.checkpoints()] == [3, 20, 100]
    assert folder.unreadable() == {"checkpoint-21": "its manifest is of step 20"}


def test_faults(tmp_path: Path) -> None:
    folder = RunFolder(identify(tmp_path))
    path = commit(tmp_path, 4)
    (checkpoint,) = folder.checkpoints()
    assert folder.faults(checkpoint, deep=True) == []
    weights = path / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert folder.faults(checkpoint) == []
    assert folder.faults(checkpoint, deep=True) == [
        "model.safetensors: content has changed (xxh3-128 differs)"
    ]
    weights.unlink()
    assert folder.faults(checkpoint) == ["model.safetensors is missing"]


def test_the_run_is_known_without_its_private_folder(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [4]


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "nothing").checkpoints() == []

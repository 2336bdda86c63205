"""After a loss the best checkpoint is the same, and on the new machine's disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keepstep.mirror.best import bring_best
from keepstep.mirror.download import bring, fetch
from keepstep.mirror.evaluations import send_evaluations
from keepstep.mirror.history import take_history
from keepstep.mirror.listing import look
from keepstep.mirror.owners import claim
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.upload import Upload
from keepstep.policy.retention import Policy
from keepstep.policy.strict import with_check
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.evaluations import add_evaluation
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import STATE, commit, identify

TOKEN = "0123456789ab"
POLICY = Policy(limit=2, ranking="metric", metric="eval_loss")


@pytest.fixture
def mirrored(store: Store, run: RunFolder) -> Store:
    """Three checkpoints, the oldest of which is the best."""
    identify(run.path, limit=2, ranking="metric", metric="eval_loss")
    commit(run.path, 2, STATE, metrics={"eval_loss": 0.5})
    owner = claim(store, TOKEN)
    history = {"run.json": run.identity.read_bytes(), "events.jsonl": b""}
    for step in (2, 4, 8):
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}")).run(history)
    return store


def new_machine(store: Store, folder: Path, at: int | None = None) -> RunFolder:
    """With the newest checkpoint there; or that of a step, which it had itself."""
    run, storage = RunFolder(folder), Storage()
    storage.make_folder(run.private)
    if at is not None:
        take_history(run, storage, store, store.names())
        fetch(store, look(store).copies[at], folder / f"checkpoint-{at}", storage)
        return run
    bring(run, storage, store, run.staging / TOKEN)
    return run


def best(run: RunFolder, store: Store, policy: Policy = POLICY) -> int | None:
    found = bring_best(run, Storage(), store, run.staging / TOKEN, policy, look(store))
    return None if found is None else found.step


def test_the_best_comes_along(mirrored: Store, tmp_path: Path) -> None:
    new = new_machine(mirrored, tmp_path / "new")
    assert [c.step for c in new.checkpoints()] == [8]
    assert best(new, mirrored) == 2
    assert [c.step for c in new.checkpoints()] == [2, 8]
    assert new.checkpoint(2).faults(deep=True) == []
    found = new.best()
    assert found is not None
    assert found.step == 2
    assert [d.step for d in new.retention() if not d.keep] == []
    assert best(new, mirrored) is None, "it is there"


def test_what_would_be_pruned_is_not_brought(mirrored: Store, tmp_path: Path) -> None:
    new = new_machine(mirrored, tmp_path / "new")
    for policy in (Policy(limit=2, metric="eval_loss"), Policy(limit=2), Policy(limit=1)):
        assert best(new, mirrored, policy) is None
    assert [c.step for c in new.checkpoints()] == [8]


def test_the_best_by_what_was_measured_later(
    mirrored: Store, run: RunFolder, tmp_path: Path
) -> None:
    policy = Policy(limit=2, ranking="metric", metric="eval_law_loss")
    for step, value in ((2, 3.0), (4, 1.0), (8, 2.0)):
        found = run.checkpoint(step)
        add_evaluation(Storage(), found.path, found.manifest, {"eval_law_loss": value}, {})
    assert send_evaluations(mirrored, run) == [2, 4, 8]
    new = new_machine(mirrored, tmp_path / "new")
    assert best(new, mirrored, policy) == 4
    assert new.checkpoint(4).metrics["eval_law_loss"] == 1.0


def test_a_damaged_one_is_not_brought(mirrored: Store, tmp_path: Path) -> None:
    (name,) = [n for n in mirrored.names("checkpoint-2") if n.endswith("/model.safetensors")]
    mirrored.put(name, b"?" * mirrored.names("checkpoint-2")[name].bytes)
    new = new_machine(mirrored, tmp_path / "new")
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        best(new, mirrored)
    assert [c.step for c in new.checkpoints()] == [8]


def test_the_history_of_an_owner_that_was_killed(mirrored: Store, tmp_path: Path) -> None:
    """It had written a part of it: of each file the newest is taken."""
    mirrored.put("history/000007/samples.jsonl", b"")
    new = new_machine(mirrored, tmp_path / "new")
    assert json.loads(new.identity.read_text())["policy"]["metric"] == "eval_loss"
    assert new.policy().limit == 2


def log(*events: dict[str, Any]) -> bytes:
    lines = [{"time": "2026-11-28T00:00:00+00:00", "attempt": 1, **event} for event in events]
    return "".join(with_check(json.dumps(line)) + "\n" for line in lines).encode()


FIRST: list[dict[str, Any]] = [
    {"event": "attempt"},
    *({"event": "commit", "step": s, "parent": None, "request": "auto"} for s in (2, 4, 8)),
]
BACK: list[dict[str, Any]] = [
    {"event": "attempt", "attempt": 2},
    {"event": "resume", "attempt": 2, "request": "2", "step": 2},
    {"event": "commit", "attempt": 2, "step": 3, "parent": 2, "request": "2"},
]


@pytest.mark.parametrize("lost", [False, True])
def test_a_log_that_is_behind(mirrored: Store, tmp_path: Path, lost: bool) -> None:
    """Another machine has had the run meanwhile, and went back to step 2: so does this one, though
    its own log is old, or was lost with the disk of the machine that wrote it."""
    mirrored.put("history/000007/events.jsonl", log(*FIRST, *BACK))
    old = new_machine(mirrored, tmp_path / "old", at=2)
    old.events.unlink() if lost else old.events.write_bytes(log(*FIRST[:2]))
    assert bring(old, Storage(), mirrored, old.staging / TOKEN).checkpoint is None
    assert [attempt.number for attempt in old.attempts()] == [1, 2]
    assert [c.step for c in old.checkpoints()] == [2]


def test_a_log_that_is_ahead(mirrored: Store, tmp_path: Path) -> None:
    """What the mirror was not told of is not forgotten."""
    mirrored.put("history/000007/events.jsonl", log(*FIRST))
    new = new_machine(mirrored, tmp_path / "new")
    new.events.write_bytes(log(*FIRST, *BACK))
    bring(new, Storage(), mirrored, new.staging / TOKEN)
    assert new.events.read_bytes() == log(*FIRST, *BACK)


def test_what_only_another_machine_has(mirrored: Store, tmp_path: Path) -> None:
    """With `node_local` it may hold all files of the newest: the main process, which has lost its
    disk, had no folder of it, brought nothing, and began anew."""
    run, storage = RunFolder(tmp_path / "new"), Storage()
    storage.make_folder(run.private)
    brought = bring(run, storage, mirrored, run.staging / TOKEN, together={8})
    assert brought.checkpoint is not None
    assert brought.checkpoint.step == 8

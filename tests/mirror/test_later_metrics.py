"""What `keepstep evaluate` measures afterwards reaches a checkpoint that has been copied before."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keepstep.mirror.download import bring
from keepstep.mirror.evaluations import send_evaluations
from keepstep.mirror.interruptible import Interruptible
from keepstep.mirror.job import do
from keepstep.mirror.listing import look
from keepstep.mirror.owners import claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store
from keepstep.mirror.upload import Upload
from keepstep.policy.mirror import evaluations_of, next_evaluations
from keepstep.policy.retention import Policy
from keepstep.run_folder.checkpoint import Checkpoint, read_checkpoint
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, add_evaluation, rows_evaluated
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import STATE, commit

TOKEN = "0123456789ab"


def mirrored(store: Store, run: RunFolder) -> None:
    owner = claim(store, TOKEN)
    for step in (4, 8):
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}")).run({})


def measure(run: RunFolder, step: int, rows: str = "5 rows", **metrics: float) -> None:
    found = run.checkpoint(step)
    add_evaluation(Storage(), found.path, found.manifest, metrics, {"": rows})


def there(store: Store) -> Mapping[int, Checkpoint]:
    return look(store).found


def test_they_arrive_once_and_come_back(store: Store, run: RunFolder, tmp_path: Path) -> None:
    mirrored(store, run)
    assert send_evaluations(store, run) == [], "nothing was measured"
    measure(run, 4, eval_law_loss=0.5)
    measure(run, 8, eval_law_loss=0.75)
    before = store.names()
    assert send_evaluations(store, run) == [4, 8]
    assert send_evaluations(store, run) == [], "it is there"
    names = store.names()
    assert {n: e for n, e in names.items() if n in before} == before, "nothing has changed"
    assert len(names) == len(before) + 2
    assert {s: c.metrics["eval_law_loss"] for s, c in there(store).items()} == {4: 0.5, 8: 0.75}

    measure(run, 8, eval_med_loss=2.0)
    assert send_evaluations(store, run) == [8]
    new, storage = RunFolder(tmp_path / "new"), Storage()
    storage.make_folder(new.private)
    brought = bring(new, storage, store, new.staging / TOKEN)
    assert brought is not None
    assert brought.checkpoint == new.checkpoint(8)
    assert brought.checkpoint.metrics == run.checkpoint(8).metrics
    assert brought.checkpoint.faults(deep=True) == []
    assert rows_evaluated(brought.checkpoint.path, brought.checkpoint.manifest) == {"": "5 rows"}


def test_the_best_is_kept_by_what_was_measured_later(store: Store, run: RunFolder) -> None:
    mirrored(store, run)
    commit(run.path, 12, STATE)
    measure(run, 4, eval_law_loss=0.1)
    measure(run, 8, eval_law_loss=0.2)
    send_evaluations(store, run)
    owner = claim(store, "ba9876543210")
    Upload(store, owner, read_checkpoint(run.path / "checkpoint-12")).run({})
    policy = Policy(limit=2, ranking="metric", metric="eval_law_loss")
    assert prune(store, owner, run, policy, ()) == [8]
    assert not [name for name in store.names() if name.startswith("checkpoint-8/")]


def test_two_at_a_time_lose_nothing(store: Store, run: RunFolder, tmp_path: Path) -> None:
    """Each adds to what the other has written, whoever was faster."""
    mirrored(store, run)
    shutil.copytree(run.path, tmp_path / "elsewhere")
    other = RunFolder(tmp_path / "elsewhere")
    measure(run, 4, eval_law_loss=0.5)
    measure(other, 4, eval_med_loss=0.25)

    class Slow(Interruptible):
        """Another process comes between its look and its writing."""

        def create(self, name: str, content: bytes) -> bool:
            if not evaluations_of("checkpoint-4/000001-0123456789ab", self.names()):
                assert send_evaluations(store, other) == [4]
            return super().create(name, content)

    assert send_evaluations(Slow(store), run) == [4]
    evaluated = there(store)[4].evaluated
    assert evaluated == {"eval_law_loss": 0.5, "eval_med_loss": 0.25}


def test_what_cannot_be_believed_is_passed_by(store: Store, run: RunFolder) -> None:
    mirrored(store, run)
    measure(run, 4, eval_law_loss=0.5)
    send_evaluations(store, run)
    (name,) = [n for n in store.names() if "evaluations-" in n]
    odd = next_evaluations(name.rpartition("/")[0], [name])
    store.put(odd, b"\xff{")
    assert there(store)[4].evaluated == {"eval_law_loss": 0.5}
    store.put(odd, store.get(name).replace(b'"attempt": 1', b'"attempt": 2'))
    assert there(store)[4].evaluated == {"eval_law_loss": 0.5}
    measure(run, 4, eval_med_loss=1.0)
    assert send_evaluations(store, run) == [4]
    assert there(store)[4].evaluated == {"eval_law_loss": 0.5, "eval_med_loss": 1.0}


def test_another_checkpoint_of_the_same_step_gets_none(store: Store, run: RunFolder) -> None:
    mirrored(store, run)
    shutil.rmtree(run.path / "checkpoint-8")
    commit(run.path, 8, STATE, parent=4, attempt=2)
    measure(run, 8, eval_law_loss=0.5)
    assert send_evaluations(store, run) == []


def test_a_later_copy_of_the_run_brings_them_too(store: Store, run: RunFolder) -> None:
    mirrored(store, run)
    measure(run, 4, eval_law_loss=0.5)
    job: dict[str, Any] = {"url": store.url, "run": str(run.path), "owner": None}
    job |= {"token": "ba9876543210"}
    job |= {"frozen": str(run.path / "checkpoint-8"), "rate": 0, "policy": {}, "pinned": []}
    job |= {"node": 0, "nodes": 1, "files": None}
    assert "error" not in do(job)
    assert there(store)[4].evaluated == {"eval_law_loss": 0.5}
    assert (run.path / "checkpoint-4" / EVALUATIONS_NAME).exists()


@given(st.integers(0, 5))
def test_their_names_count_up(count: int) -> None:
    folder, names = "checkpoint-4/000001-a.b", []
    for _ in range(count):
        names.append(next_evaluations(folder, evaluations_of(folder, names)))
    assert len(set(names)) == count
    assert evaluations_of(folder, [*names, "checkpoint-4/000001-a.b/x"]) == names[::-1]

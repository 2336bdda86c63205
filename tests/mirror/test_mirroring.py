"""What the main process does for a mirror: one copy at a time, in a process of its own."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepstep.mirror import mirroring as mirroring_module
from keepstep.mirror.listing import is_whole, look
from keepstep.mirror.mirroring import Mirroring, Share
from keepstep.mirror.owners import claim
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.manifest import Manifest
from keepstep.policy.mirror import copied
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.campaigns import cases
from tests.helpers.folders import STATE, commit
from tests.helpers.waiting import PATIENCE
from tests.mirror.server import BUCKET, S3Server

TOKEN = "1.0.3"  # as a Slurm job names its attempts


def mirroring(run: RunFolder, store: Store, **how: Any) -> Mirroring:
    run.owner_file.write_text(f"{TOKEN}\n")
    policy = how.pop("policy", Policy())
    fields: dict[str, Any] = {"pause": 0.0, "timeout": PATIENCE, "rate": 0.0, **how}
    return Mirroring(run, store.url, claim(store, TOKEN), policy, Storage(), **fields)


def until_over(mirror: Mirroring) -> dict[str, Any]:
    """What came of the copy under way."""
    mirror.wait()
    return mirror.news.pop()


def steps(store: Store) -> list[int]:
    return [one.step for one in copied(store.names())]


def test_the_newest_and_then_the_best(store: Store, run: RunFolder) -> None:
    mirror = mirroring(run, store)
    newest, best = run.checkpoint(8), run.checkpoint(4)
    mirror.offer(newest, best)
    mirror.offer(newest, best)  # one is under way
    assert until_over(mirror)["step"] == 8
    assert mirror.owes(best)
    assert not mirror.owes(newest)
    assert mirror.finish(newest, best, PATIENCE, lambda: None) == []
    assert steps(store) == [4, 8]
    assert list(run.mirroring.glob("checkpoint-*")) == []


def test_what_another_machine_has_sent_ahead_stays(store: Store, run: RunFolder) -> None:
    """At the end it has sent its part of both, when the main process has copied the first."""

    def files(node: int) -> Callable[[Manifest], list[str]]:
        return lambda manifest: sorted(manifest.files)[node::2]

    commit(run.path, 12, STATE, metrics={"eval_loss": 9.0})
    policy = Policy(metric="eval_loss")
    newest, best = run.latest(), run.best(policy)
    assert newest is not None
    assert best is not None
    main = mirroring(run, store, policy=policy, share=Share(0, 2, False, files(0)))
    assert main.owner is not None
    for one in (newest, best):
        own = {name: one.manifest.files[name] for name in files(1)(one.manifest)}
        part = replace(one, manifest=replace(one.manifest, files=own))
        Upload(store, main.owner, part, node=1, nodes=2).run({})
    assert main.finish(newest, best, PATIENCE, lambda: None) == []
    assert steps(store) == [best.step, newest.step] == [8, 12]


def test_a_disk_without_second_names(
    store: Store, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is copied on it, which training would wait for."""

    def refused(self: Storage, source: Path, path: Path, or_copy: bool = False) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Storage, "link", refused)
    mirror = mirroring(run, store)
    mirror.offer(run.checkpoint(8), None)
    assert "error" not in until_over(mirror)
    assert steps(store) == [8]


@pytest.mark.usefixtures("here")
def test_a_store_that_hangs(s3: S3Server, run: RunFolder) -> None:
    """A copy is ended at its deadline, told, and made good later."""
    store = open_store(f"s3://{BUCKET}/run")
    mirror = mirroring(run, store, timeout=4.0)
    s3.fault("hang", method="PUT", path="checkpoint-8", times=-1)
    mirror.offer(run.checkpoint(8), None)
    assert until_over(mirror)["error"] == "the mirror did not answer to the end within 4 s"
    (fault,) = mirror.finish(run.checkpoint(8), run.checkpoint(8), 3, lambda: None)
    assert fault.startswith("checkpoint-8 is not on the mirror: ")
    s3.clear_faults()
    assert mirror.finish(run.checkpoint(8), None, PATIENCE, lambda: None) == []
    assert steps(store) == [8]


def test_the_run_is_another_machines(store: Store, run: RunFolder) -> None:
    mirror = mirroring(run, store)
    claim(store, "1.1.1")
    mirror.offer(run.checkpoint(8), None)
    until_over(mirror)
    assert "the run belongs to another machine there" in mirror.deposed
    mirror.offer(run.checkpoint(4), None)
    assert steps(store) == []


def test_an_owner_who_could_not_say_so_at_the_start(store: Store, run: RunFolder) -> None:
    mirror = mirroring(run, store)
    mirror.owner = None
    mirror.offer(run.checkpoint(8), None)
    until_over(mirror)
    assert mirror.owner is not None
    assert mirror.owner.number == 2
    assert steps(store) == [8]


@pytest.mark.usefixtures("here")
def test_a_store_that_fails_for_hours_and_comes_back(
    s3: S3Server, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process, an event and at most a line for each try, not for each step; the newest is there
    when it is back. (The clock goes as fast as the test wants.)"""
    store = open_store(f"s3://{BUCKET}/run")
    mirror, late = mirroring(run, store), 0.0
    monkeypatch.setattr(mirroring_module, "now", lambda: time.monotonic() + late)
    fault = s3.fault("status", status=403, times=-1)
    news: list[dict[str, Any]] = []
    for _ in range(6):
        for _ in range(50):
            mirror.offer(run.checkpoint(8), None)  # steps of a run
        news.append(until_over(mirror))
        assert len(s3.log) < 100
        late += 3600
    assert [n["failures"] for n in news] == [1, 2, 3, 4, 5, 6]
    assert fault.hits == 6, "one request each: it is refused"
    assert len(mirror.lines) == 3, "of the first, the second and the fourth"
    first, _, last = mirror.lines
    assert first.startswith("Not mirrored: checkpoint-8: s3://bucket/run: ")
    assert first.endswith("\n    Tried again in 30 s; training goes on.")
    assert "Not mirrored (4 times in a row): " in last
    s3.clear_faults()
    commit(run.path, 12, STATE)
    mirror.offer(run.checkpoint(12), None)
    assert until_over(mirror)["failures"] == 6
    assert "; after 6 failed, in 6 h" in mirror.lines[-1]
    assert steps(store) == [12]
    assert "(checkpoint-4, checkpoint-8, checkpoint-12)" in mirror.lacks(), "by the log: none"


@pytest.mark.usefixtures("here")
def test_the_newest_that_is_the_best_is_told_once(s3: S3Server, run: RunFolder) -> None:
    mirror = mirroring(run, open_store(f"s3://{BUCKET}/run"))
    fault = s3.fault("status", status=403, times=-1)
    told = mirror.finish(run.checkpoint(8), run.checkpoint(8), PATIENCE, lambda: None)
    assert [line.partition(":")[0] for line in told] == ["checkpoint-8 is not on the mirror"]
    assert fault.hits == 1


def test_every_third_save_and_the_best(store: Store, run: RunFolder) -> None:
    """And the last, whichever it is."""
    for step in range(12, 36, 4):
        commit(run.path, step, STATE)
    mirror = mirroring(run, store, every=3)
    for step in range(4, 36, 4):
        best = run.checkpoint(16 if step >= 16 else 4)
        for _ in range(2):
            mirror.offer(run.checkpoint(step), best)
            if mirror.owes(best) or mirror.owes(run.checkpoint(step)):
                mirror.wait()
    assert steps(store) == [4, 16, 28], "16: the best as well, from which three are counted"
    assert mirror.finish(run.checkpoint(32), run.checkpoint(16), PATIENCE, lambda: None) == []
    assert steps(store) == [4, 16, 28, 32]


def test_a_disk_that_is_full(store: Store, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second names can be made: one line, not one for each step."""
    mirror = mirroring(run, store)

    def refused(*arguments: Any, **how: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "link", refused)
        for _ in range(20):
            mirror.offer(run.checkpoint(8), None)
        assert len(mirror.lines) == len(mirror.news) == 1
        assert "No space left on device" in mirror.lines[0]
        (fault,) = mirror.finish(run.checkpoint(8), None, PATIENCE, lambda: None)
        assert "No space left on device" in fault
    assert mirror.finish(run.checkpoint(8), None, PATIENCE, lambda: None) == []


def test_a_claim_in_a_process_of_its_own(run: RunFolder, tmp_path: Path) -> None:
    """For several machines one owner is needed first: told where there is none, given up or made;
    and the copy that follows is heard of as any."""
    place = tmp_path / "other disk"
    store = open_store(place.as_uri() + "/run")
    mirror = mirroring(run, store)
    mirror.owner = None
    mirror.claim()
    mirror.abandon()
    place.rename(tmp_path / "away")
    place.write_text("no folder")
    mirror.claim()
    mirror.wait()
    assert mirror.owner is None
    (line,) = mirror.lines
    assert line.startswith("Not mirrored: ")
    place.unlink()
    (tmp_path / "away").rename(place)
    mirror.claim()
    mirror.wait()
    assert mirror.owner is not None
    assert mirror.owner.number > 1
    mirror.claim()
    mirror.abandon()
    mirror.begin(run.checkpoint(8))
    assert "error" not in until_over(mirror)


def until_copied(mirror: Mirroring, newest: int, best: int) -> list[dict[str, Any]]:
    """What came of all copies until nothing is owed."""
    wanted = mirror.run.checkpoint(newest), mirror.run.checkpoint(best)
    news = []
    while any(map(mirror.owes, wanted)):
        mirror.offer(*wanted)
        news.append(until_over(mirror))
    return news


@pytest.mark.parametrize(
    "gone", cases(["model.safetensors", "manifest.json"], long=["manifest.json"])
)
def test_what_somebody_removes_there(store: Store, run: RunFolder, gone: str) -> None:
    """It is seen at the next copy, told once, and sent again if it is the best."""
    mirror = mirroring(run, store)
    commit(run.path, 12, STATE)
    until_copied(mirror, 12, 8)
    until_copied(mirror, 8, 4)
    mirror.lines.clear()
    for step in (4, 8):
        (name,) = [n for n in store.names(f"checkpoint-{step}") if n.endswith(gone)]
        store.delete([name])
    commit(run.path, 16, STATE)
    first, second = until_copied(mirror, 16, 4)
    assert first["step"] == 16
    assert first["lost"] == [4, 8]
    assert second["step"] == 4
    assert "lost" not in second
    told = [line for line in mirror.lines if "are gone there" in line]
    assert [line.partition(" are gone")[0][-12:] for line in told] == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    listed = look(store)
    assert [
        s
        for s in listed.found
        if is_whole(store, listed.copies[s].folder, listed.found[s].manifest, listed.names)
    ] == [4, 12, 16]


def test_what_is_pruned_there_is_not_lost(store: Store, run: RunFolder) -> None:
    run.owner_file.write_text(f"{TOKEN}\n")
    fields: dict[str, Any] = {"pause": 0.0, "timeout": PATIENCE, "rate": 0.0}
    mirror = Mirroring(run, store.url, claim(store, TOKEN), Policy(limit=1), Storage(), **fields)
    for step in (4, 8):
        assert "lost" not in until_copied(mirror, step, step)[0]
    assert steps(store) == [8]

"""A checkpoint goes to a mirror and comes back: whole, or it is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keepstep.mirror import upload as upload_module
from keepstep.mirror.download import OtherRunError, bring, check_run
from keepstep.mirror.owners import DeposedError, Owner, claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.policy.mirror import copied
from keepstep.policy.retention import Policy
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import RUN_ID, STATE, commit, identify
from tests.hub.peer import HubPeer
from tests.mirror.conftest import HUB_BUCKET, store_of
from tests.mirror.server import BUCKET, S3Server

TOKEN = "0123456789ab"
OPERATIONS = ("names", "get", "put", "create", "copy")


class CrashError(BaseException):
    """The machine is gone."""


class Counting:
    """A store that ends at its n-th operation, before or after it is done."""

    def __init__(self, url: str) -> None:
        self.store = open_store(url)
        self.done, self.last, self.after = 0, -1, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        return partial(self._counted, found) if name in OPERATIONS else found

    def delete(self, names: Iterable[str]) -> None:
        """In the worst of orders, each of them an operation."""
        for name in reversed(list(names)):
            self._counted(self.store.delete, [name])

    def _counted(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        self.done += 1
        if self.done == self.last and not self.after:
            raise CrashError
        answer = operation(*arguments)
        if self.done >= self.last > 0:
            raise CrashError
        return answer


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART_BYTES", 300)
    monkeypatch.setattr(upload_module, "AT_ONCE", 1)  # in one order


def send(run: RunFolder, store: Store, step: int, owner: Owner) -> Upload:
    upload = Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}"))
    upload.run({"events.jsonl": b"", "run.json": run.identity.read_bytes()})
    return upload


def brought(store: Store, folder: Path) -> RunFolder:
    """What an empty disk gets."""
    run, storage = RunFolder(folder), Storage()
    storage.make_folder(run.private)
    bring(run, storage, store, run.staging / TOKEN)
    return run


def same(one: Path, other: Path) -> bool:
    names = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    assert names == {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_there_and_back(store: Store, run: RunFolder, tmp_path: Path) -> None:
    owner = claim(store, TOKEN)
    first, second = send(run, store, 4, owner), send(run, store, 8, owner)
    assert first.sent.bytes > 600
    assert second.sent.copied == 0, "all of it has changed"
    back = brought(store, tmp_path / "new")
    assert back.run_id() == RUN_ID
    assert [c.step for c in back.checkpoints()] == [8]
    assert same(run.path / "checkpoint-8", back.path / "checkpoint-8")
    assert back.faults(back.checkpoint(8), deep=True) == []
    again = bring(back, Storage(), store, back.staging / TOKEN)
    assert again.checkpoint is None, "nothing newer is there"


def test_who_waits_is_told_how_far_it_is(store: Store, run: RunFolder, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    total = read_checkpoint(run.path / "checkpoint-4").manifest.total_bytes
    found = read_checkpoint(run.path / "checkpoint-4")
    upload = Upload(store, claim(store, TOKEN), found, tell=lambda *far: sent.append(far))
    upload.run({"run.json": run.identity.read_bytes()})
    new, came = RunFolder(tmp_path / "new"), list[tuple[int, int | None]]()
    Storage().make_folder(new.private)
    bring(new, Storage(), store, new.staging / TOKEN, tell=lambda *far: came.append(far))
    assert len(sent) > 2, "part by part"
    assert sent == came == sorted(sent)
    assert sent[-1] == (total, total)


def test_a_restart_sends_nothing_again_and_leaves_nothing_twice(
    store: Store, run: RunFolder
) -> None:
    send(run, store, 8, claim(store, TOKEN))
    second = claim(store, "ba9876543210")
    again = send(run, store, 8, second)
    assert again.sent.found == read_checkpoint(run.path / "checkpoint-8").manifest.total_bytes
    assert again.sent.bytes == again.sent.copied == 0
    shutil.rmtree(run.path / "checkpoint-8")
    commit(run.path, 8, STATE, parent=4, attempt=2)  # a branch has saved the step again
    third = claim(store, "cccccccccccc")
    send(run, store, 8, third)
    assert prune(store, third, run, Policy(), ()) == []
    folders = {name.split("/")[1] for name in store.names() if name.startswith("checkpoint-8/")}
    assert folders == {"000003-cccccccccccc"}


def with_tokenizer(run: RunFolder, step: int) -> None:
    """A checkpoint with a file that is the same in each."""
    made = commit(run.path, step)
    (made / "tokenizer.json").write_bytes(b"t" * 1000)
    entry = FileEntry(0, 1000, digest_of(made / "tokenizer.json"))
    whole = read_checkpoint(made).manifest
    whole = replace(whole, files={**whole.files, "tokenizer.json": entry})
    (made / MANIFEST_NAME).write_text(whole.to_json())


def test_what_a_save_asks_of_the_hub(hub: HubPeer, run: RunFolder) -> None:
    """Three requests for an object that is sent, two for one that is copied."""
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    owner = claim(store, TOKEN)
    for step in (12, 16):
        with_tokenizer(run, step)
    send(run, store, 12, owner)
    before = len(hub.log)
    sent = send(run, store, 16, owner).sent
    asked = [r.target.split("/bucket/")[-1] for r in hub.log[before:] if r.role == "hub"]
    assert sent.copied == 1000, "of four parts"
    objects = [name for name in store.names() if name.startswith(("checkpoint-16", "history"))]
    assert asked.count("batch") == asked.count("paths-info") == len(objects)
    assert asked.count("xet-write-token") == len(objects) - 4


@pytest.mark.usefixtures("here")
def test_what_has_not_changed_is_not_sent_again(s3: S3Server, run: RunFolder) -> None:
    store = open_store(f"s3://{BUCKET}/run")
    owner = claim(store, TOKEN)
    for step in (12, 16):
        with_tokenizer(run, step)
    assert send(run, store, 12, owner).sent.copied == 0
    assert send(run, store, 16, owner).sent.copied == 1000
    sent = send(run, store, 16, owner).sent
    assert (sent.bytes, sent.copied) == (0, 0), "it is there"
    puts = [r.name for r in s3.log if r.method == "PUT" and "tokenizer" in r.name]
    assert len(puts) == 2 * 4, "four parts, once sent and once copied"


def crashes(make: Callable[[Any], None], url: str) -> Iterator[int]:
    """Do that once for each of its operations, which is the last, and once more to its end."""
    for after in (False, True):
        number = 0
        while True:
            number += 1
            store = Counting(url)
            store.last, store.after = number, after
            try:
                make(store)
            except CrashError:
                yield number
                continue
            break


@pytest.fixture(params=["file", pytest.param("hf", marks=pytest.mark.long)])
def url(request: pytest.FixtureRequest) -> str:
    """Of a store whose operations are counted."""
    return store_of(request.param, request).url


def test_a_crash_at_every_operation(
    run: RunFolder, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is whole; the good one before stays until its successor is; and whoever comes
    next ends what was begun."""
    monkeypatch.setattr(upload_module, "PART_BYTES", 900)  # of the larger files two parts
    count = 0
    for number in crashes(lambda store: mirrored_again(run, store), copy_of(run, url)):
        count += 1
        store = open_store(url)
        there = {one.step for one in copied(store.names())}
        assert there & {4, 8}, f"after operation {number} nothing is left"
        back = brought(store, tmp_path / "new")
        (found,) = back.checkpoints()
        assert found.step == max(there)
        assert same(run.path / found.path.name, found.path)
        shutil.rmtree(back.path)
        mirrored_again(run, store)
        names = store.names()
        assert [one.step for one in copied(names)] == [8]
        folders = {name.split("/")[0] for name in names if name.startswith("checkpoint-")}
        assert folders == {"checkpoint-8"}, "what was left behind is gone"
        copy_of(run, url)
    assert count > 60, "operations, each before and after it is done"


def copy_of(run: RunFolder, url: str) -> str:
    """A mirror with the first checkpoint alone."""
    store = open_store(url)
    store.delete(list(store.names()))
    send(run, store, 4, claim(store, TOKEN))
    return url


def mirrored_again(run: RunFolder, store: Store) -> None:
    """Another machine copies the second, of which one is kept."""
    owner = claim(store, "ba9876543210")
    send(run, store, 8, owner)
    assert prune(store, owner, run, Policy(limit=1), ()) in ([4], [])


def test_who_is_not_the_owner_any_more_leaves_no_trace(store: Store, run: RunFolder) -> None:
    first = claim(store, TOKEN)
    send(run, store, 4, first)
    claim(store, "ba9876543210")
    with pytest.raises(DeposedError, match="the run belongs to another machine there"):
        send(run, store, 8, first)
    with pytest.raises(DeposedError):
        prune(store, first, run, Policy(limit=1), ())
    assert [one.step for one in copied(store.names())] == [4]


@pytest.mark.parametrize("damage", ["cut", "other bytes", "gone", "receipt", "manifest"])
def test_what_comes_back_is_compared(
    store: Store, run: RunFolder, tmp_path: Path, damage: str
) -> None:
    """A damaged checkpoint is passed by, and said; if it is the only one, nothing begins anew."""
    owner = claim(store, TOKEN)
    for step in (4, 8):
        send(run, store, step, owner)

    def spoil(step: int) -> None:
        file = {"receipt": "receipt-0.json", "manifest": MANIFEST_NAME}.get(damage)
        (name,) = (
            name
            for name in store.names(f"checkpoint-{step}")
            if name.endswith(file or "/model.safetensors.part-00000")
        )
        content = store.get(name)
        if damage == "gone":
            store.delete([name])
        else:
            store.put(name, content[:-1] if damage == "cut" else content[:-1] + b"?")

    spoil(8)
    new, storage = RunFolder(tmp_path / "new"), Storage()
    storage.make_folder(new.private)
    found = bring(new, storage, store, new.staging / TOKEN)
    assert found is not None
    assert found.checkpoint.step == 4
    (why,) = found.passed_by.values()
    assert why
    spoil(4)
    shutil.rmtree(new.path)
    storage.make_folder(new.private)
    with pytest.raises(StoreError, match="none of its checkpoints can be had"):
        bring(new, storage, store, new.staging / TOKEN)
    assert new.folders() == []


def test_another_run_is_not_mixed_in(store: Store, run: RunFolder, tmp_path: Path) -> None:
    send(run, store, 8, claim(store, TOKEN))
    names = store.names().keys()
    other = RunFolder(identify(tmp_path / "other"))
    other.identity.write_text(json.dumps({"run_id": "ffffffffffff", "policy": {}}))
    with pytest.raises(OtherRunError, match=f"holds run {RUN_ID}, .* is run ffffffffffff") as error:
        check_run(other, store)
    assert error.value.fatal
    assert store.names().keys() == names, "who has the run there keeps it"


def test_a_file_that_is_not_what_was_committed_is_not_copied(store: Store, run: RunFolder) -> None:
    (run.path / "checkpoint-8/model.safetensors").write_bytes(b"torn")
    with pytest.raises((OSError, StoreError)):
        send(run, store, 8, claim(store, TOKEN))
    assert copied(store.names()) == []

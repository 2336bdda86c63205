"""Objects: written once, compared, created by one of many; and what a store does wrong."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from keepstep.mirror import object_store
from keepstep.mirror.owners import claim
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.policy.mirror import newest_owner
from tests.mirror.server import BUCKET, S3Server

NAMES = ["plain", "deep/er/name.bin", "with blank and +%.txt", "ümlaut-文字"]


def test_what_is_put_is_there(store: Store) -> None:
    for name in NAMES:
        store.put(name, name.encode())
    assert {name: entry.bytes for name, entry in store.names().items()} == {
        name: len(name.encode()) for name in NAMES
    }
    assert list(store.names("deep/er")) == ["deep/er/name.bin"]
    assert store.get(NAMES[3]) == NAMES[3].encode()
    store.copy(NAMES[0], "copy")
    store.delete([*NAMES, "never there"])
    assert list(store.names()) == ["copy"]
    with pytest.raises(FileNotFoundError):
        store.get("never there")


def test_one_of_many_creates_an_object(store: Store) -> None:
    assert store.create("owner", b"first")
    assert store.create("owner", b"first"), "its own answer was lost"
    assert not store.create("owner", b"second")
    assert store.get("owner") == b"first"


@pytest.mark.parametrize("racers", [8])
def test_owners_in_a_race(store: Store, racers: int) -> None:
    """All get a number of their own, whoever comes first; the newest is the owner."""
    begin = threading.Barrier(racers)
    owners = []

    def race(token: str) -> None:
        begin.wait(10)
        owners.append(claim(store, token))

    threads = [threading.Thread(target=race, args=(f"{n:012x}",)) for n in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(owner.number for owner in owners) == list(range(1, racers + 1))
    for owner in owners:
        assert owner.token.encode() in store.get(owner.name)
    assert newest_owner(store.names()) == racers


@pytest.mark.usefixtures("here")
def test_faults_that_pass(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{BUCKET}/run")
    for do, how in (
        ("status", {"status": 500}),
        ("status", {"status": 503}),
        ("reset", {}),
        ("apply_then_status", {"status": 500}),
        ("apply_then_reset", {}),
    ):
        fault = s3.fault(do, method="PUT", times=2, **how)
        store.put("name", do.encode())
        assert store.create(f"created {do}", b"x")
        assert fault.hits == 2
        assert store.get("name") == do.encode()


@pytest.mark.usefixtures("here")
def test_faults_that_stay(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "RETRIES", {"max_retries": 2})
    store = open_store(f"s3://{BUCKET}/run")
    s3.fault("status", status=503, times=-1)
    with pytest.raises(StoreError, match=r"s3://bucket/run: writing name: .*503") as error:
        store.put("name", b"x")
    assert not error.value.fatal
    s3.clear_faults()
    s3.fault("status", status=403, times=-1)
    with pytest.raises(StoreError, match="403") as error:
        store.put("name", b"x")
    assert error.value.fatal
    s3.clear_faults()
    gone = open_store("s3://nobodys/run")
    with pytest.raises(StoreError, match="there is no such bucket, and none is made") as error:
        gone.put("name", b"x")
    assert error.value.fatal
    assert {b["Name"] for b in s3.client.list_buckets()["Buckets"]} == {BUCKET}


@pytest.mark.parametrize(
    "url", ["runs/here", "http://x/y", "s3://", "file://mnt/disk", "file:///", "s3:/bucket"]
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(StoreError) as error:
        open_store(url)
    assert error.value.fatal
    assert str(error.value).startswith(url)


def test_a_disk_that_is_full_or_closed(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.write_text("a file")
    with pytest.raises(StoreError):
        open_store(place.as_uri() + "/run").put("name", b"x")

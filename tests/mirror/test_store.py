"""Objects: written once, compared, created by one of many; and what a store does wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
from huggingface_hub import constants
from hypothesis import strategies as st
from moto.s3.models import S3Backend
from tenacity import wait_none

from keepstep.mirror import claims, hub_store, object_store
from keepstep.mirror.claims import create_by_claim
from keepstep.mirror.owners import DeposedError, Owner, check, claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.policy.mirror import newest_owner
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from tests.helpers.waiting import PATIENCE
from tests.hub.faults import Kind
from tests.hub.peer import WRITE_TOKEN, HubPeer
from tests.mirror.conftest import HUB_BUCKET
from tests.mirror.server import BUCKET, S3Server

NAMES = ["plain", "deep/er/name.bin", "with blank and +%.txt", "ümlaut-文字"]


def test_what_is_put_is_there(each_store: Store) -> None:
    store = each_store
    for name in NAMES:
        store.put(name, name.encode())
    assert {name: entry.bytes for name, entry in store.names().items()} == {
        name: len(name.encode()) for name in NAMES
    }
    assert list(store.names("deep/er")) == ["deep/er/name.bin"]
    assert store.get(NAMES[3]) == NAMES[3].encode()
    store.copy(NAMES[0], "copy")
    assert store.get("copy") == store.get(NAMES[0])
    store.delete([*NAMES, "never there"])
    store.delete([])
    assert list(store.names()) == ["copy"]
    with pytest.raises(FileNotFoundError):
        store.get("never there")


def test_one_of_many_creates_an_object(each_store: Store) -> None:
    store = each_store
    assert store.create("owner", b"first")
    assert store.create("owner", b"first"), "its own answer was lost"
    assert not store.create("owner", b"second")
    assert store.get("owner") == b"first"
    assert list(store.names()) == ["owner"], "no claim is left"


@pytest.mark.usefixtures("here")
def test_the_server_of_these_tests_creates_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3 does: whoever asks while an object is being created is refused. (moto by itself looks
    whether it is there, and writes it some time later.)"""
    look = S3Backend.get_object

    def look_long(*arguments: Any, **named: Any) -> Any:
        found = look(*arguments, **named)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(S3Backend, "get_object", look_long)
    store = open_store(f"s3://{BUCKET}/run")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda n: store.create("owner", b"%d" % n), range(8)))
    assert sum(created) == 1


@pytest.mark.parametrize("racers", [8])
def test_owners_in_a_race(each_store: Store, racers: int) -> None:
    """All get a number of their own, whoever comes first; the newest is the owner."""
    assert_one_wins(each_store, racers)


@pytest.mark.long
def test_two_owners_in_a_race_a_hundred_times(each_store: Store) -> None:
    for _ in range(100):
        assert_one_wins(each_store, 2)


def assert_one_wins(store: Store, racers: int) -> None:
    before = newest_owner(store.names("owners"))
    begin = threading.Barrier(racers)
    owners = []

    def race(token: str) -> None:
        begin.wait(PATIENCE)
        owners.append(claim(store, token))

    threads = [threading.Thread(target=race, args=(f"{n:012x}",)) for n in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    numbers = sorted(owner.number for owner in owners)
    assert len(numbers) == len(set(numbers)) == racers
    assert numbers[0] > before
    if store.conditional:
        assert numbers == list(range(before + 1, before + racers + 1))
    assert winners(store, owners) == [max(owners, key=lambda owner: owner.number)]


def winners(store: Store, owners: list[Owner]) -> list[Owner]:
    """Those who may write."""
    left = list(owners)
    for owner in owners:
        with contextlib.suppress(DeposedError):
            check(store, owner)
            continue
        left.remove(owner)
    return left


class Turns:
    """A store whose every operation waits for its turn, one at a time."""

    def __init__(self, store: Store, ready: threading.Semaphore) -> None:
        self.store, self.turn, self.ready = store, threading.Semaphore(0), ready

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self.store, name)

        def in_turn(*arguments: Any) -> Any:
            self.ready.release()
            self.turn.acquire()
            return operation(*arguments)

        return in_turn


def created_in_this_order(store: Store, order: Iterable[int], count: int) -> list[int]:
    """Who of several has created an object, their operations in an order, and then in turn."""
    ready = threading.Semaphore(0)
    turns = [Turns(store, ready) for _ in range(count)]
    answers: dict[int, bool] = {}

    def enter(number: int) -> None:
        content = str(number).encode()
        try:
            answers[number] = create_by_claim(cast(Store, turns[number]), "folder/name", content)
        finally:
            ready.release()

    threads = [threading.Thread(target=enter, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
        assert ready.acquire(timeout=PATIENCE)
    for number in itertools.chain(order, itertools.cycle(range(count))):
        if len(answers) == count:
            break
        if number not in answers:
            turns[number].turn.release()
            assert ready.acquire(timeout=PATIENCE)
    return [number for number, has in answers.items() if has]


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PAUSE", 0.0)


def assert_one_at_most(place: Path, order: Iterable[int], count: int) -> int:
    store = open_store(place.as_uri())
    creators = created_in_this_order(store, order, count)
    assert len(creators) <= 1
    if creators:
        assert store.get("folder/name") == str(creators[0]).encode()
    else:
        assert "folder/name" not in store.names()
    assert store.names("claims") == {}, "nobody is kept out by who has gone"
    assert create_by_claim(store, "folder/name", b"later") == (not creators)
    return len(creators)


@pytest.mark.usefixtures("without_pauses")
def test_an_object_created_by_claim_in_every_order(tmp_path: Path) -> None:
    """By one of two at most, however their claims, looks and looks again come; and by one, where
    one of them is through with its look before the other claims."""
    orders = sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1])))
    counts = [assert_one_at_most(tmp_path / str(n), order, 2) for n, order in enumerate(orders)]
    assert counts[0] == counts[-1] == 1
    assert set(counts) == {0, 1}


@pytest.mark.usefixtures("without_pauses")
@hypothesis.given(order=st.lists(st.integers(0, 2), max_size=20))
@hypothesis.settings(max_examples=60)
def test_an_object_created_by_claim_of_three(order: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_one_at_most(Path(folder), order, 3)


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("operations", range(6))
def test_who_dies_in_a_claim(run: RunFolder, tmp_path: Path, operations: int) -> None:
    """Keeps nobody out, and what is left of it goes with the next owner's pruning."""
    store = open_store((tmp_path / "disk").as_uri())
    left = iter(range(operations))

    class Dying:
        def __getattr__(self, name: str) -> Any:
            next(left)  # ends it, when there is no more
            return getattr(store, name)

    with contextlib.suppress(StopIteration):
        create_by_claim(cast(Store, Dying()), "owners/000001.json", b"x")
    number = 1
    while not create_by_claim(store, f"owners/{number:06d}.json", b"y"):
        number += 1
    assert number == (1 if operations in (0,) else 2)
    prune(store, Owner(2, "yy"), run, Policy(), ())
    assert store.names("claims") == {}


def test_a_number_that_two_have(hub: HubPeer) -> None:
    """As a listing that lags may let them: the last to write it has it, the other hears that."""
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    first, second = claim(store, "first"), Owner(1, "second")
    store.put(first.name, b'{"token": "second"}\n')
    assert winners(store, [first, second]) == [second]


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


def test_a_disk_that_is_not_there_now(tmp_path: Path) -> None:
    """It may be, later: nobody's recipe is wrong."""
    (tmp_path / "no folder").write_text("")
    for place in (f"{(tmp_path / 'no folder').as_uri()}/run", "file:///proc/nowhere/run"):
        with pytest.raises(StoreError, match="opening it") as error:
            open_store(place)
        assert not error.value.fatal


@pytest.mark.usefixtures("here")
def test_time_alone_bounds_the_tries(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that restarts takes a while; where a person waits, a shorter one. (Its pauses are
    milliseconds here.)"""
    soon = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)}
    monkeypatch.setattr(object_store, "RETRIES", object_store.RETRIES | {"backoff": soon})
    monkeypatch.setattr(object_store, "PERSON_WAITS", {"retry_timeout": timedelta(0)})
    fault = s3.fault("status", status=503, times=40)
    open_store(f"s3://{BUCKET}/run").put("name", b"x")
    assert fault.hits == 40
    s3.clear_faults()
    s3.fault("status", status=503, times=40)
    with pytest.raises(StoreError, match="503"):
        open_store(f"s3://{BUCKET}/run", person_waits=True).get("name")


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


PASSING = [
    *("/batch$", "/xet-write-token$", "^/v1/xorbs/", "^/v1/shards$", "/paths-info$"),
    *("/tree/", "/resolve/", "^/object/"),
]


@pytest.mark.parametrize("path", PASSING)
def test_faults_of_the_hub_that_pass(hub: HubPeer, path: str) -> None:
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    faults: list[tuple[Kind, dict[str, Any]]] = [
        ("status", {"status": 500}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("reset", {}),
        ("apply_then_status", {"status": 503}),
        ("apply_then_reset", {}),
    ]
    for do, how in faults:
        name = f"{do} {how.get('status')}"
        if path == "^/object/" and do == "apply_then_status":
            continue  # a file comes with its status, or not
        fault = hub.fault(do, path=path, times=2, **how)
        store.put(name, os.urandom(1000))
        assert len(store.get(name)) == store.names()[name].bytes == 1000
        store.copy(name, "copy")
        store.delete(["copy"])
        hub.clear_faults()
        assert fault.hits == 2, name


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/batch", 503, "writing name: 503: "),
        ("^/v1/xorbs", 500, "writing name: 500: Internal Server Error"),
        ("/tree", 500, "listing it: 500: "),
        ("/batch", 403, "the token may not do that there"),
        ("/xet-write-token", 403, "the token may not do that there"),
        ("/xet-write-token", 401, "the token is not accepted: export HF_TOKEN="),
        ("/batch", 413, "the Hub takes no more there: has the account room left?"),
    ],
)
def test_faults_of_the_hub_that_stay(hub: HubPeer, path: str, status: int, told: str) -> None:
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    hub.fault("status", path=path, status=status, times=-1)
    with pytest.raises(StoreError, match=re.escape(told)) as error:
        (store.names if path == "/tree" else lambda: store.put("name", b"x"))()
    assert error.value.fatal == (status < 500)
    assert str(error.value).startswith(f"hf://buckets/{HUB_BUCKET}/run: ")


def test_a_bucket_that_is_not_there(hub: HubPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of somebody else's, nor a model of that name, nor without a token; none is made."""
    hub.create_repo("tester/model")
    hub.create_bucket("other/private")
    hub.create_bucket("other/public", private=False)
    told = "there is no such bucket, and none is made: is the name right, and the token's access?"
    for name in ("tester/nothing", "tester/model", "other/private"):
        store = open_store(f"hf://buckets/{name}/run")
        for attempt in (store.names, lambda s=store: s.get("x"), lambda s=store: s.delete(["x"])):
            with pytest.raises(StoreError, match=re.escape(told)) as error:
                attempt()
            assert error.value.fatal
    with pytest.raises(StoreError, match="the token may not do that there"):
        open_store("hf://buckets/other/public").put("x", b"x")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    with pytest.raises(StoreError, match="401: the token is not accepted"):
        open_store(f"hf://buckets/{HUB_BUCKET}").names()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match="there is no token: export HF_TOKEN="):
        open_store(f"hf://buckets/{HUB_BUCKET}").names()
    with pytest.raises(StoreError, match="there is no token: export HF_TOKEN="):
        open_store("hf://buckets/other/public").put("x", b"x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set: unset it") as error:
        open_store(f"hf://buckets/{HUB_BUCKET}").names()
    assert error.value.fatal
    assert set(hub.buckets.known) == {HUB_BUCKET, "other/private", "other/public"}


def test_what_the_hub_is_given(hub: HubPeer) -> None:
    """Chunks that are there are not sent again; another run's folder is not looked into; and the
    token goes to the API alone."""
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    other = open_store(f"hf://buckets/{HUB_BUCKET}/run-2")
    content = os.urandom(2**20)
    other.put("theirs", content)
    sent = len(hub.requests("POST", "^/v1/xorbs/"))
    store.put("again", content)
    assert len(hub.requests("POST", "^/v1/xorbs/")) == sent == 1
    assert (list(store.names()), list(other.names())) == (["again"], ["theirs"])
    assert store.holds(store.names()["again"], content)
    assert not store.holds(store.names()["again"], content[:-1] + b"?")
    assert store.get("again") == content
    assert hub.mentions(WRITE_TOKEN, "hub")
    assert hub.mentions(WRITE_TOKEN, "storage") == []


@pytest.mark.long
def test_a_slow_network(hub: HubPeer) -> None:
    """An object takes longer than a silent connection is waited for elsewhere."""
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    hub.fault("throttle", path="^/v1/xorbs", rate=400_000, times=-1)
    began, content = time.monotonic(), os.urandom(30_000_000)
    store.put("name", content)
    assert time.monotonic() - began > 65
    assert len(hub.requests("POST", "^/v1/xorbs/")) == 1
    assert store.get("name") == content


def test_what_the_hub_has_not_done(hub: HubPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may be done in part: it is told, and tried again; so is what lies there otherwise
    than it was given."""
    monkeypatch.setattr(hub_store, "PAUSES", wait_none())
    store = open_store(f"hf://buckets/{HUB_BUCKET}/run")
    hub.buckets.refuse = 2
    store.put("name", b"x")
    hub.buckets.refuse = 3
    with pytest.raises(StoreError, match="1 not done: run/name: refused for once") as error:
        store.put("name", b"x")
    assert not error.value.fatal
    monkeypatch.setattr(hub_store, "_xet_hash", lambda content: "0" * 64)
    with pytest.raises(StoreError, match="run/name is not what was written there"):
        store.put("name", b"x")


@pytest.mark.parametrize(
    "url",
    [
        *("runs/here", "http://x/y", "s3://", "file://mnt/disk", "file:///", "s3:/bucket"),
        *("hf://owner/name", "hf://buckets/owner", "hf://buckets/owner/name/../x"),
    ],
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

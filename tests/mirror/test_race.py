"""Two machines want one run: one has it, the newest, and the other leaves nothing that counts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from keepstep.mirror.download import bring
from keepstep.mirror.owners import DeposedError, Owner, check, claim, there
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.mirror import found_name
from keepstep.policy.retention import Policy
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.campaigns import cases
from tests.helpers.folders import STATE, commit
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE

TOKENS = ("aaaaaaaaaaaa", "bbbbbbbbbbbb")


class Racer:
    """A process of `tests.mirror.racer`."""

    def __init__(self, run: RunFolder, step: int, token: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mirror.racer", str(run.path), str(step), token],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def start(self, url: str, begin: float = 0.0, pause: str | None = None) -> None:
        assert self._process.stdin is not None
        job = {"url": url, "begin": begin, "pause": pause}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def wait_until_paused(self) -> None:
        process, deadline = psutil.Process(self._process.pid), time.monotonic() + PATIENCE
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def go_on(self) -> None:
        psutil.Process(self._process.pid).resume()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def racers(store: Store, run: RunFolder) -> Iterator[list[Racer]]:
    """Two, each with a checkpoint of its own. (They have the store's environment.)"""
    commit(run.path, 12, STATE)
    started = [Racer(run, step, token) for step, token in zip((8, 12), TOKENS, strict=True)]
    yield started
    for racer in started:
        racer.end()


@pytest.mark.parametrize("races", cases([12, 100], long=[100]))
def test_a_race(store: Store, run: RunFolder, racers: list[Racer], races: int) -> None:
    """As often as it is run: two numbers, the higher one has the run and is not sent away; of the
    other there is a whole checkpoint that the owner found, or nothing. And until one was sent away:
    on a busy machine one may be through before the other has the processor."""
    deposed = 0
    for number in itertools.count():
        if number >= races and deposed:
            break
        assert number < 50 * races, "they never met"
        here = open_store(f"{store.url}-{number}")
        for racer in racers:
            racer.start(here.url, time.monotonic() + 0.05)
        answers = [racer.answer() for racer in racers]
        numbers = [answer["number"] for answer in answers]
        assert sorted(numbers) == [1, 2] or (not store.conditional and len(set(numbers)) == 2)
        winner = numbers.index(max(numbers))
        assert not answers[winner]["deposed"]
        deposed += answers[1 - winner]["deposed"]
        prune(here, Owner(max(numbers), TOKENS[winner]), run, Policy(), ())
        names = here.names()
        counted = {one.folder for one in there(here, names)}
        owner = f"{max(numbers):06d}-{TOKENS[winner]}"
        assert f"checkpoint-{(8, 12)[winner]}/{owner}" in counted
        lost = {name.rpartition("/")[0] for name in names if TOKENS[1 - winner] in name}
        assert lost <= counted, "what does not count is gone"


def newest_on(store: Store, folder: Path) -> int:
    """The step that an empty disk gets."""
    new, storage = RunFolder(folder), Storage()
    storage.make_folder(new.private)
    brought = bring(new, storage, store, new.staging / "0123456789ab")
    assert brought is not None
    assert brought.passed_by == {}
    return brought.checkpoint.step


def send(run: RunFolder, store: Store, step: int, owner: Owner) -> None:
    Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}")).run(
        {"run.json": run.identity.read_bytes()}
    )


def test_a_machine_that_was_paused_before_its_manifest(
    store: Store, run: RunFolder, racers: list[Racer], tmp_path: Path
) -> None:
    """It has asked whether the run is still its own, and writes the manifest when it is not: a
    later step than all of the new owner's, and some of its objects are gone already."""
    send(run, store, 4, claim(store, "cccccccccccc"))
    slow = racers[1]
    slow.start(store.url, pause=r"checkpoint-12/.*/manifest\.json")
    slow.wait_until_paused()
    owner = claim(store, "dddddddddddd")
    send(run, store, 8, owner)
    prune(store, owner, run, Policy(), ())
    slow.go_on()
    assert slow.answer()["deposed"]
    late = [name for name in store.names("checkpoint-12") if name.endswith("/manifest.json")]
    assert late, "it has been written"
    assert [one.step for one in there(store, store.names())] == [4, 8]
    assert newest_on(store, tmp_path / "new") == 8
    third = claim(store, "eeeeeeeeeeee")
    assert [one.step for one in there(store, store.names())] == [4, 8], "the next ones as well"
    prune(store, third, run, Policy(), ())
    assert store.names("checkpoint-12") == {}


@pytest.mark.parametrize("when", ["model", "receipt"])
def test_a_machine_that_was_paused_in_the_middle(
    store: Store, run: RunFolder, racers: list[Racer], when: str
) -> None:
    """It ends, and takes along what it has sent."""
    slow = racers[1]
    slow.start(store.url, pause=f"checkpoint-12/.*/{when}")
    slow.wait_until_paused()
    owner = claim(store, "dddddddddddd")
    send(run, store, 8, owner)
    slow.go_on()
    assert slow.answer()["deposed"]
    assert {name.split("/")[0] for name in store.names() if name.startswith("checkpoint-")} == {
        "checkpoint-8"
    }
    assert [one.step for one in there(store, store.names())] == [8]


def test_what_an_owner_found_is_damaged(store: Store, run: RunFolder) -> None:
    """What there is to carry on from is not lost by it: what the one before it found is asked."""
    send(run, store, 4, claim(store, "cccccccccccc"))
    owner = claim(store, "dddddddddddd")
    send(run, store, 8, owner)
    for damaged in (b"", b"[]", b'{"found": 3}', b'{"found": [3]}', b"\xff"):
        store.put(found_name(2), damaged)
        assert [one.step for one in there(store, store.names())] == [4, 8]


def test_a_listing_that_does_not_show_the_owner(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lags: a number that exists is not tried for ever; and where the store itself does not say
    that it exists, the one who had it hears that at its next look."""
    first = claim(store, "cccccccccccc")
    with monkeypatch.context() as lagging:
        lagging.setattr(store, "names", lambda below="": {})
        second = claim(store, "dddddddddddd")
    assert second.number == (2 if store.conditional else 1)
    with pytest.raises(DeposedError):
        check(store, first)
    check(store, second)

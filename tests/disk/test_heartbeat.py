"""Requests, owner and heartbeat, seen and shown beside training: on a folder that fails, too."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from keepstep.run_folder import heartbeat as module
from keepstep.run_folder.heartbeat import Lookout
from keepstep.run_folder.ownership import claim
from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.faulty_disk import faulty_disk
from tests.helpers.waiting import PATIENCE, wait_for

READER = """
import sys
from pathlib import Path
from keepstep.run_folder.progress import reached_of
from keepstep.run_folder.reader import RunFolder
torn = [reached_of(RunFolder(Path(sys.argv[1]))) for _ in range(2000)].count(None)
print(f"2000 read, {torn} of them torn")
"""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)


def begin(run: RunFolder, beats: Callable[[], int] = lambda: 1) -> Lookout:
    storage = Storage()
    owner = claim(run, storage)
    storage.guard(owner.check)
    return Lookout(run, storage, owner, beats)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def seen(run: RunFolder) -> Iterator[Lookout]:
    found = begin(run)
    found.start()
    yield found
    found.stop()
    found._thread.join(PATIENCE)
    assert not found._thread.is_alive()


def test_what_is_asked_for_is_seen_and_taken_up_once(run: RunFolder, seen: Lookout) -> None:
    assert seen.requests == ()
    run.request("save-now").touch()
    wait_for(lambda: seen.requests == ("save-now",))
    seen.take_up(["save-now"])
    assert seen.requests == ()
    wait_for(lambda: not run.request("save-now").exists())
    for name in ("stop", "save-now"):
        run.request(name).touch()
    wait_for(lambda: seen.requests == ("stop", "save-now"))


def test_a_new_owner_is_seen_and_nothing_written_any_more(run: RunFolder) -> None:
    beats = iter(range(1, 10**6))
    seen = begin(run, lambda: next(beats))
    seen.look()
    before = run.heartbeat.read_text()
    run.owner_file.write_text("9.1.1\n")
    run.request("stop").touch()
    seen.take_up(["stop"])
    seen.look()
    assert seen.lost
    assert run.heartbeat.read_text() == before
    assert run.request("stop").exists(), "it is the new owner's"
    assert seen.faults() == [], "to lose a run is no fault of the disk"


def test_the_heartbeat_shows_progress_only(run: RunFolder) -> None:
    counts = [1, 1, 2]
    seen = begin(run, lambda: counts[0])
    shown = []
    for _ in range(3):
        seen.look()
        shown.append(run.heartbeat.read_text().split()[1])
        run.heartbeat.write_text("x x")
        counts.pop(0) if len(counts) > 1 else None
    assert shown == ["1", "x", "2"]


def test_a_reader_meets_all_of_a_heartbeat(run: RunFolder) -> None:
    """Written again and again while another process reads it."""
    steps = itertools.count(1)
    seen = begin(run, lambda: next(steps))
    seen._progress = lambda: Reached(datetime.now(UTC).isoformat(), 1, 1, {"step": 1.0})
    seen.look()
    with subprocess.Popen(
        [sys.executable, "-c", READER, run.path], stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        while reader.poll() is None:
            seen.look()
        assert (reader.stdout.read(), reader.returncode) == (b"2000 read, 0 of them torn\n", 0)


def test_looks_may_fail(tmp_path: Path) -> None:
    with faulty_disk(tmp_path / "disk") as disk:
        run = RunFolder(disk.folder)
        seen = begin(run)
        run.request("save-now").touch()
        disk.fail("getattr", ".keepstep/stop", errno.EIO)
        disk.fail("open", ".keepstep/heartbeat", errno.ENOSPC)
        disk.fail("open", ".keepstep/owner", errno.ESTALE)
        disk.fail("create", ".keepstep/heartbeat", errno.ENOSPC)
        for _ in range(5):
            seen.look()
        assert {name for _, name in disk.fired} >= {".keepstep/stop", ".keepstep/owner"}
        assert list(seen.requests) == ["save-now"], "the one fault hides nothing else"
        assert not seen.lost
        told = seen.faults()
        assert [text.partition(":")[0] for text in told] == [
            *("looking for stop", "looking for the owner", "writing the heartbeat")
        ]
        assert "Input/output error" in told[0]
        seen.look()
        assert seen.faults() == [], "once"

        disk.heal()
        run.request("stop").touch()
        seen.look()
        assert list(seen.requests) == ["stop", "save-now"]
        disk.fail("getattr", ".keepstep/stop", errno.EIO)
        seen.look()
        assert list(seen.requests) == ["stop", "save-now"], "as seen last"
        disk.fail("unlink", ".keepstep/save-now", errno.EIO)
        seen.take_up(["save-now"])
        seen.look()
        assert list(seen.requests) == ["stop"], "what cannot be removed asks no second time"
        disk.heal()
        seen.look()
        assert not run.request("save-now").exists()


def test_a_folder_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NO_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(module, "LAST_LOOK_SECONDS", 0.1)
    with faulty_disk(tmp_path / "disk") as disk:
        run = RunFolder(disk.folder)
        seen = begin(run)
        seen.start()
        run.request("stop").touch()
        wait_for(lambda: seen.requests == ("stop",))
        disk.hang("*", "*")
        wait_for(lambda: bool(disk.fired))
        told: list[str] = []
        for _ in range(1000):  # as many steps
            assert seen.requests == ("stop",)
            told += seen.faults()
            time.sleep(0.001)
        assert [text.partition(" for ")[0] for text in told] == ["no answer"]
        seen.stop()
        assert seen._thread.is_alive(), "it hangs, and nobody waits for it"
        disk.heal()
        wait_for(lambda: not seen._thread.is_alive())


def test_a_fork_in_the_middle_of_a_look(run: RunFolder, seen: Lookout) -> None:
    """As of a DataLoader's workers: the child has no such thread, and can look for itself."""
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        child = context.Process(target=_child, args=(seen,))
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == 0
    assert not seen.lost


def _child(seen: Lookout) -> None:
    assert not any(thread.name == "keepstep-lookout" for thread in threading.enumerate())
    seen.look()
    assert seen.faults() == []


def test_an_unforeseen_error_is_told_too(run: RunFolder) -> None:
    seen = begin(run, lambda: 1 // 0)
    for _ in range(3):
        seen.look()
    (told,) = seen.faults()
    assert told.startswith("writing the heartbeat: ZeroDivisionError: ")
    assert not seen.lost

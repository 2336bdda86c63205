"""One owner at a time: who takes a run over, and what is left to those who lost it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.policy.manifest import ManifestError, folder_name
from keepstep.policy.retention import Policy
from keepstep.run_folder.ownership import VARIABLE, NotOwnerError, claim, job_facts
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.attempts import Launch
from tests.helpers.disks import small_disk_at
from tests.helpers.folders import left_behind
from tests.helpers.waiting import PATIENCE

POLICY = Policy(2, "recency", None)


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def elsewhere() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def claim_by(process: subprocess.Popen[bytes], run: RunFolder, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as context:
        context.setattr(os, "getpid", lambda: process.pid)
        claim(run, Storage())


def test_the_newest_owns_it(run: RunFolder) -> None:
    first = claim(run, Storage())
    first.check()
    run.owner_file.write_text(run.owner_file.read_text().replace(" ", " other-host-", 1))
    second = claim(run, Storage())
    second.check()
    with pytest.raises(NotOwnerError, match=f"belongs to a newer attempt \\({second.token}\\)"):
        first.check()
    run.private.rename(run.path / "away")
    with pytest.raises(NotOwnerError, match="was it moved, removed or unmounted"):
        second.check()


def test_a_process_at_work_here_keeps_it(
    run: RunFolder, elsewhere: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_by(elsewhere, run, monkeypatch)
    with pytest.raises(NotOwnerError, match=f"is being trained by process {elsewhere.pid} of"):
        claim(run, Storage(), patience=0.3)
    elsewhere.kill()  # a zombie now: nobody has waited for it
    claim(run, Storage(), patience=PATIENCE).check()


def test_a_process_id_that_was_given_out_again(
    run: RunFolder, elsewhere: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_by(elsewhere, run, monkeypatch)
    words = run.owner_file.read_text().split()
    run.owner_file.write_text(" ".join([*words[:3], "1.00"]))
    claim(run, Storage(), patience=0).check()


def test_a_job_names_the_owner(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "7.0.1")
    claim(run, Storage()).check()
    assert run.owner() == "7.0.1"
    claim(run, Storage()).check()
    run.owner_file.write_text("7.1.1\n")  # requeued: this is a leftover that starts late
    with pytest.raises(NotOwnerError, match=r"newer attempt \(7\.1\.1\)"):
        claim(run, Storage())
    assert run.owner() == "7.1.1"


def test_a_job_at_work_keeps_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched by hand while a job trains it: its heart is seen to beat."""
    run.private.mkdir(parents=True)
    run.owner_file.write_text("7.0.1\n")
    run.heartbeat.write_text("7.0.1 5\n")
    dead = threading.Event()

    def beat() -> None:
        for count in itertools.count(6):
            if dead.wait(0.2):
                return
            Storage().replace(run.heartbeat, f"7.0.1 {count}\n".encode())

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(NotOwnerError, match="is being trained by job 7"):
            claim(run, Storage(), patience=0)
    finally:
        dead.set()
        heart.join()
    claim(run, Storage(), patience=0).check()


def test_without_its_file_nobody_is_the_owner(run: RunFolder) -> None:
    owner = claim(run, Storage())
    run.owner_file.unlink()
    with pytest.raises(NotOwnerError):
        owner.check()


def test_what_a_job_says_of_itself() -> None:
    assert job_facts({}) == {}
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}
    assert job_facts(environment) == {"job": "7", "nodes": "n[1-3]", "restarts": 0}
    environment |= {"SLURM_STEP_NODELIST": "n[2-3]", "SLURM_RESTART_COUNT": "2"}
    assert job_facts(environment) == {"job": "7", "nodes": "n[2-3]", "restarts": 2}


class Frozen:
    """Between the look at the owner and the nth operation the process freezes; meanwhile a
    successor takes the run over and does its work."""

    def __init__(self, run: Path, nth: int) -> None:
        self.run, self.nth, self.count = run, nth, 0
        self.successor: Launch | None = None
        self.operation = ""

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.nth:
            self.operation = operation
            self.successor = launch(self.run, Storage())
            self.successor.save(20)
            self.successor.save(30)


def launch(run: Path, storage: Storage) -> Launch:
    (run / ".keepstep/owner").unlink(missing_ok=True)  # what another machine's claim comes to
    owner = claim(RunFolder(run), storage)
    storage.guard(owner.check)
    return Launch(run, POLICY, storage=storage, owner=owner.token)


def late(run: Path, nth: int) -> Frozen:
    """An attempt that commits 10 and 20, and is frozen at its nth operation after that of 10."""
    frozen = Frozen(run, nth)
    storage = Storage(frozen)
    frozen.count = -(10**6)
    old = launch(run, storage)
    old.save(10)
    frozen.count = 0
    try:
        old.save(20)
        old.save(30)
    except (OSError, ManifestError):
        assert frozen.successor is not None
    return frozen


def test_frozen_at_any_operation_it_changes_nothing_any_more(tmp_path: Path) -> None:
    """Torn, twice committed, or pruned by somebody who is late: never."""
    total = late(tmp_path / "undisturbed", 10**6).count
    seen = set()
    for nth in range(1, total + 1):
        run = tmp_path / str(nth)
        frozen = late(run, nth)
        assert frozen.successor is not None
        seen.add(frozen.operation)
        folder = frozen.successor.folder
        checkpoints = folder.checkpoints()
        attempt = frozen.successor.writer.attempt
        assert [c.step for c in checkpoints] == [20, 30], f"frozen ahead of {frozen.operation}"
        assert checkpoints[-1].manifest.attempt == attempt
        assert all(folder.faults(c, deep=True) == [] for c in checkpoints)
        # Links are hints; one that was about to be set is set once more by the next commit.
        assert frozen.operation == "point" or os.readlink(run / "latest") == folder_name(30)
        assert {p.name for p in run.iterdir()} <= {
            *(".keepstep", "latest", ".latest.new", "checkpoint-20", "checkpoint-30")
        }
        launch(run, Storage())
        assert left_behind(folder) == [], "the next start finds what is left of both"
    assert total > 40
    assert seen >= {"create", "sync", "rename", "sync_folder", "remove", "append_line"}


RACER = """
import sys, time
from pathlib import Path
from keepstep.run_folder.ownership import NotOwnerError, claim
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.writer import RunWriter
from keepstep.run_folder.storage import Storage

print("ready", flush=True)
for line in sys.stdin:
    run, storage = RunFolder(line.strip()), Storage()
    try:
        owner = claim(run, storage, patience=0)
        storage.guard(owner.check)
        RunWriter(run, Policy(2), storage, owner.token).start()
        print("owner", flush=True)
    except NotOwnerError as error:
        print("refused", flush=True)
    except BaseException as error:
        print("died", repr(error), flush=True)
"""


@pytest.fixture
def racers() -> Iterator[list[subprocess.Popen[str]]]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", RACER], **pipes) for _ in range(3)]
    for racer in started:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    yield started
    for racer in started:
        racer.kill()
        racer.communicate()


def test_launches_at_the_same_moment(tmp_path: Path, racers: list[subprocess.Popen[str]]) -> None:
    """Of three real processes one gets each run, and goes on to begin its attempt; the others are
    refused: never none, never two, never another error."""
    for turn in range(25):
        run = tmp_path / str(turn)
        if turn % 2:  # with something to sweep
            for name in ("staging/dead/checkpoint-1/a/b", "trash/dead/checkpoint-2/c/d"):
                (run / ".keepstep" / name).mkdir(parents=True)
        if turn % 3 == 0:  # and with what is not keepstep's
            (run / ".keepstep/status.json").mkdir(parents=True)
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(f"{run}\n")
            racer.stdin.flush()
        answers = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout)
        assert answers == ["owner", "refused", "refused"]


def test_where_a_file_system_has_no_locks(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to write its name has the run; the other one notices before it changes anything."""

    def refuse(descriptor: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = claim(run, Storage())
    second = claim(run, Storage())  # (of the same process: not seen to be at work)
    second.check()
    with pytest.raises(NotOwnerError):
        first.check()


def test_a_name_that_does_not_fit_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        run = RunFolder(disk / "run")
        claim(run, Storage())
        (disk / "large").write_bytes(bytes(disk_free(disk)))
        owner = claim(run, Storage())
        owner.check()
        assert run.owner() == owner.token
        assert [p.name for p in run.private.iterdir() if p.name.startswith(".owner")] == []


def disk_free(place: Path) -> int:
    return shutil.disk_usage(place).free

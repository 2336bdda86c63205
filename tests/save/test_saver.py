"""One process, without a model: what a save says of itself when the disk fails, or is slow."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest
import torch

from keepstep.policy.retention import Policy
from keepstep.ranks.outcome import ended
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.save.failure import SaveError
from keepstep.save.in_flight import Flight
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part, Report
from keepstep.save.resume_checks import Resume
from keepstep.save.snapshot_memory import Arena
from tests.helpers.folders import manifest
from tests.helpers.waiting import PATIENCE, wait_for


class Disk:
    """Counts the operations of a save; the nth fails."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.nth = 0

    def __call__(self, operation: str, path: Path) -> None:
        self.seen.append(operation)
        if len(self.seen) == self.nth:
            raise OSError(errno.EIO, "Input/output error", str(path))


def begin(run: Path, disk: Disk) -> CheckpointManager:
    storage = Storage(before=disk)
    manager = CheckpointManager(run, Policy(1), storage, mode="lazy", timeout=PATIENCE)
    manager.start()
    manager.choose(Resume())
    assert manager.saver.reserve(1 << 20) is None
    save(manager, 1)
    assert manager.saver.settle() is not None
    disk.seen.clear()
    return manager


def save(manager: CheckpointManager, step: int) -> None:
    def write(part: Part) -> None:
        part.save("rng_state.pth", {"x": torch.full((1000,), float(step))}, deferred=True)

    manager.saver.save(manifest(step, world_size=1), write)


def test_at_whichever_operation_the_disk_fails_the_save_says_what_is_there(tmp_path: Path) -> None:
    """A save that was announced as failed is not there, and one that is there was announced."""
    disk = Disk()
    begin(tmp_path / "count", disk)
    save_one = begin(tmp_path / "all", disk)
    save(save_one, 2)
    save_one.saver.settle()
    outcomes = set()
    operations = list(disk.seen)
    assert operations.index("rename") < operations.index("remove_folder")
    for nth in range(1, len(operations) + 1):
        run, disk = tmp_path / str(nth), Disk()
        manager = begin(run, disk)
        disk.nth = nth
        try:
            save(manager, 2)
            saved = manager.saver.settle() is not None
        except SaveError:
            saved = False
        there = [c.step for c in RunFolder(run).checkpoints()]
        assert (2 in there) == saved, f"{operations[nth - 1]}, number {nth}: {there}"
        assert there, "nothing is removed before its successor stands"
        events = [json.loads(e) for e in (run / ".keepstep/events.jsonl").read_text().splitlines()]
        assert not saved or "save_failed" not in {event["event"] for event in events}
        outcomes.add(saved)
        save(manager, 3)
        assert manager.saver.settle() is not None, "the next save is as any other"
        assert [c.step for c in RunFolder(run).checkpoints()] == [3]
    assert outcomes == {True, False}


def test_a_commit_that_is_slow_is_not_said_to_have_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = begin(tmp_path, Disk())
    begun, go_on, commit = threading.Event(), threading.Event(), manager.writer.commit

    def slow(*arguments: object, **facts: object) -> object:
        begun.set()
        go_on.wait(PATIENCE)
        return commit(*arguments, **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(manager.writer, "commit", slow)
    save(manager, 2)
    assert begun.wait(PATIENCE)
    manager.saver.wait_longer(0.0)  # its time is over now
    assert manager.saver.settle() is None
    with pytest.raises(SaveError, match="the one of step 2 is not done"):
        save(manager, 3)
    go_on.set()
    manager.saver.wait_alone()
    while (saved := manager.saver.settle()) is None:
        pass
    assert saved.checkpoint.step == 2
    save(manager, 3)
    assert manager.saver.settle() is not None


def test_a_save_that_was_said_to_have_failed_is_not_committed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank has reported, and the time-out passes just before the commit."""
    manager = begin(tmp_path, Disk())
    gathered, go_on, gather = threading.Event(), threading.Event(), Flight._gather

    def late(flight: Flight, folder: Path) -> list[Report]:
        reports = gather(flight, folder)
        gathered.set()
        go_on.wait(PATIENCE)
        return reports

    monkeypatch.setattr(Flight, "_gather", late)
    save(manager, 2)
    assert gathered.wait(PATIENCE)
    manager.saver.wait_longer(0.0)
    with pytest.raises(SaveError, match="checkpoint-2 was not saved: rank 0: its writer is stuck"):
        manager.saver.settle()
    assert manager.saver.in_flight, "its writer is still at work"
    with pytest.raises(SaveError, match="the one of step 2 is not done"):
        save(manager, 3)
    go_on.set()

    def told_no_more() -> bool:
        assert manager.saver.settle() is None, "it is told once"
        return not manager.saver.in_flight

    wait_for(told_no_more)
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [1]
    save(manager, 3)
    assert manager.saver.settle() is not None


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, Policy(), mode="lazy")
    manager.start()
    reason = manager.saver.reserve(10**15)
    assert reason is not None
    assert "snapshots of its ranks take 1e+06 GB" in reason
    assert not manager.saver.in_background
    save(manager, 1)
    assert manager.saver.settle() is not None, "in the foreground"


def test_no_thread_is_in_torch_when_an_attempt_ends(tmp_path: Path) -> None:
    """Where no step was made, memory may be touched until the end: Python would abort."""
    manager = begin(tmp_path, Disk())
    manager.saver.arena = Arena(1 << 29)
    manager.end(ended("finished"))
    assert "keepstep-arena" not in [thread.name for thread in threading.enumerate()]


def test_a_copy_from_before_is_not_committed(tmp_path: Path) -> None:
    """What is written of an optimizer that has made steps cannot all be the same."""
    manager = begin(tmp_path / "run", Disk())

    def save_optimizer(step: int, values: list[float], moved: bool) -> None:
        def write(part: Part) -> None:
            for name in ("rng_state.pth", "scheduler.pt"):
                part.save(name, {"x": step})
            part.write("trainer_state.json", b"{}")
            for rank, value in enumerate(values):
                name = f"global_step{step}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
                part.save(name, {"x": torch.full((100,), value)})

        manager.saver.save(manifest(step, world_size=1), write, moved=moved)

    for step, values, moved in (
        (2, [1.0, 2.0], True),
        (3, [1.0, 2.0], False),  # all of its steps were skipped, or it does not count them
        (4, [1.0, 3.0], True),  # a rank whose part is frozen
        (4, [1.0, 3.0], True),  # saved again, evaluated since
    ):
        save_optimizer(step, values, moved)
        assert manager.saver.settle() is not None
    save_optimizer(5, [1.0, 3.0], moved=True)
    with pytest.raises(SaveError, match="a copy from before") as error:
        manager.saver.settle()
    assert not error.value.environment
    assert [c.step for c in manager.run.checkpoints()] == [4]
    resumed = CheckpointManager(tmp_path / "run", Policy(1))
    resumed.start()
    resumed.choose(Resume())
    manager = resumed
    save_optimizer(6, [1.0, 3.0], moved=True)
    with pytest.raises(SaveError, match="steps since checkpoint-4"):
        manager.saver.settle()

"""One process, without a model, on a disk that fails: what follows a save that failed."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keepstep.policy.auto_interval import AutoInterval
from keepstep.policy.retention import Policy
from keepstep.policy.schedule import Schedule
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.reader import RunFolder
from keepstep.save.failure import SaveError
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part
from keepstep.save.resume_checks import Resume
from keepstep.trainer import saving
from keepstep.trainer.pacer import Pacer
from keepstep.trainer.saving import Saving
from tests.helpers.faulty_disk import FaultyDisk, faulty_disk
from tests.helpers.folders import events, manifest
from tests.helpers.waiting import PATIENCE, wait_for

STAGED = "run/.keepstep/staging/*/checkpoint-8"


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("saving") / "disk") as disk:
        yield disk


@pytest.fixture
def disk(mounted: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyDisk]:
    monkeypatch.setattr(saving, "pauses", lambda total: [0.0, 0.01, 0.01])
    yield mounted
    mounted.heal()
    (mounted.folder / "run").rename(mounted.folder / f"done-{time.monotonic_ns()}")


class Job:
    """What `Saving` needs of a trainer. At each step it trains for, a checkpoint is due."""

    def __init__(self, disk: FaultyDisk, mode: Any = "lazy", **args: Any):
        self.run = RunFolder(disk.folder / "run")
        self.manager = CheckpointManager(self.run.path, Policy(), mode=mode)
        self.manager.start()
        self.manager.choose(Resume())
        if mode != "off":
            assert self.manager.saver.reserve(1 << 20) is None
        known = {
            "on_save_error": "continue",
            "max_failed_saves": 5,
            "save_timeout_seconds": PATIENCE,
        }
        known |= {"last_save_retry_seconds": 60, "save_strategy": "steps", "schedule": Schedule}
        known |= args
        self.args = SimpleNamespace(**known)
        self.state = SimpleNamespace(global_step=0, best_global_step=0, best_model_checkpoint=None)
        self.control = SimpleNamespace(should_training_stop=False)
        health = SimpleNamespace(settle=lambda: None)
        self.every_step = SimpleNamespace(pacer=None, progress=lambda at=None: None, health=health)
        self.contents = SimpleNamespace(store=self.store, steps_made=lambda: None)
        self.is_evaluated = False
        self.preempted: str | None = None
        self.content: Any = torch.ones(1000)
        self.saving = Saving(self)  # type: ignore[arg-type]

    def store(self, part: Part) -> None:
        part.save("rng_state.pth", {"x": self.content})

    def describe(self) -> Any:
        return manifest(self.state.global_step, world_size=1)

    def store_flos(self) -> None: ...

    def tell_committed(self, checkpoint: Any) -> None:
        assert checkpoint is self.saving.last_saved.checkpoint

    def save(self, step: int, last: bool = False) -> None:
        self.state.global_step = step
        self.control.should_training_stop = last
        self.saving.begin()

    def save_and_hang(self, disk: FaultyDisk) -> None:
        """Until the disk does not answer; and the time of the save is over."""
        before = len(disk.fired)
        self.save(8, last=True)
        while len(disk.fired) == before:
            time.sleep(0.01)
        self.manager.saver.wait_longer(0.0)

    def save_and_hear(self, step: int) -> None:
        self.save(step)
        self.saving.hear()

    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in RunFolder(self.run.path).checkpoints()]


@pytest.mark.parametrize("mode", ["lazy", "off"])
@pytest.mark.parametrize(
    ("operation", "path", "number"),
    [
        ("mkdir", STAGED, errno.EROFS),
        ("create", f"{STAGED}/*", errno.EACCES),
        ("write", f"{STAGED}/*", errno.ENOSPC),
        ("fsync", f"{STAGED}/rng_state.pth", errno.EIO),
        ("rename", STAGED, errno.ESTALE),
    ],
)
def test_the_last_save_is_tried_again(
    disk: FaultyDisk, mode: str, operation: str, path: str, number: int
) -> None:
    job = Job(disk, mode)
    job.save(4)
    before = len(disk.fired)
    disk.fail(operation, path, number, times=2)
    job.save(8, last=True)
    job.saving.finish()
    assert len(disk.fired) == before + 2
    assert job.saving.complete
    assert job.steps() == [4, 8]


@pytest.mark.parametrize("mode", ["lazy", "off"])
def test_the_log_tells_why_a_save_was_made(disk: FaultyDisk, mode: str) -> None:
    job = Job(disk, mode)
    lookout: Any = SimpleNamespace(requests=(), take_up=lambda names: None)
    job.every_step.pacer = pacer = Pacer(Schedule(AutoInterval()), lookout)
    job.save_and_hear(4)
    pacer.reason = "interval"
    job.save_and_hear(6)
    disk.fail("rename", STAGED, errno.EIO)
    job.save_and_hear(8)
    assert pacer.costs.failed == 1
    job.save_and_hear(9)
    assert pacer.costs.failed == 0
    job.preempted = "SIGTERM to rank 0"
    job.save_and_hear(10)
    job.preempted, job.args.save_strategy = None, "no"
    job.save_and_hear(11)
    told = {event["step"]: event["why"] for event in events(job.run, "commit")}
    assert told == {4: "steps", 6: "interval", 9: "again", 10: "stop", 11: "callback"}
    assert all({"interval", "overhead"} <= event.keys() for event in events(job.run, "commit"))
    assert len(pacer.costs.stalls) == 5


@pytest.mark.parametrize("mode", ["lazy", "off"])
def test_a_run_whose_last_save_never_arrives_is_not_complete(
    disk: FaultyDisk, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(disk, mode)
    job.save(4)
    disk.fail("rename", STAGED, errno.EIO)
    job.save(8, last=True)
    job.saving.finish()
    assert not job.saving.complete
    assert "checkpoint-8 was not saved: rank 0: OSError: [Errno 5]" in job.saving.reason
    assert job.steps() == [4]
    assert "Training goes on" not in caplog.text
    tries = [event for event in events(job.run, "save_failed") if event["step"] == 8]
    assert len(tries) == 1 + 3


def test_what_is_due_is_what_was_asked_for(disk: FaultyDisk) -> None:
    job = Job(disk)
    job.saving.finish()
    assert job.saving.complete, "nothing was due: save_strategy: no"
    job.save(4)
    disk.fail("rename", "run/.keepstep/staging/*/checkpoint-6", errno.EIO)
    job.save_and_hear(6)
    assert not job.saving.complete
    disk.heal()
    job.state.global_step = 9
    job.saving.finish()
    assert job.saving.complete, "what comes later is as good to carry on from"
    assert job.steps() == [4, 9]


def test_the_best_cannot_be_made_up(disk: FaultyDisk) -> None:
    """Training has left it; the relaunch makes it again, from the checkpoint before."""
    job = Job(disk, save_strategy="best")
    job.save(4)
    disk.fail("rename", "run/.keepstep/staging/*/checkpoint-6", errno.EIO)
    job.state.best_global_step = 6
    job.save_and_hear(6)
    disk.heal()
    job.state.global_step = 9
    job.saving.finish()
    assert not job.saving.complete
    assert job.steps() == [4]


def test_a_stuck_writer_is_waited_for_at_the_end(disk: FaultyDisk) -> None:
    job = Job(disk)
    disk.hang("write", f"{STAGED}/*")
    job.save_and_hang(disk)

    def heal() -> None:
        wait_for(lambda: '"save_failed"' in job.run.events.read_text())
        disk.heal()

    threading.Thread(target=heal).start()
    job.saving.finish()
    assert job.saving.complete
    assert job.steps() == [8]
    assert len(events(job.run, "save_failed")) == 1, "told once"


def test_a_slow_commit_is_waited_for_at_the_end(disk: FaultyDisk) -> None:
    job = Job(disk)
    disk.hang("rename", STAGED)
    job.save_and_hang(disk)
    threading.Timer(1.0, disk.heal).start()
    job.saving.finish()
    assert job.saving.complete
    assert job.steps() == [8]
    assert events(job.run, "save_failed") == []


def test_a_writer_that_stays_stuck_ends_in_failure(disk: FaultyDisk) -> None:
    job = Job(disk, save_timeout_seconds=0.2)
    disk.hang("write", f"{STAGED}/*")
    job.save_and_hang(disk)
    job.saving.finish()
    assert not job.saving.complete
    assert "rank 0: its writer is stuck" in job.saving.reason
    disk.heal()
    job.manager.saver.wait_alone()
    job.saving.hear()
    assert not job.saving.complete, "what comes back after its time was cancelled"
    assert job.steps() == []


def test_the_deadline_is_kept(disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "pauses", lambda total: [0.0, 3600.0])
    job = Job(disk, schedule=lambda: Schedule(moment=time.time() + 1000))
    disk.fail("rename", STAGED, errno.EIO)
    job.save(8, last=True)
    job.saving.finish()
    assert not job.saving.complete
    assert len(events(job.run, "save_failed")) == 2, "tried again at once, and not in an hour"


def test_a_mistake_in_a_program_ends_the_run_at_the_first_save(disk: FaultyDisk) -> None:
    for mode in ("lazy", "off"):
        job = Job(disk, mode)
        job.content = lambda: "no pickle has this"
        with pytest.raises(SaveError, match=r"checkpoint-4 was not saved: rank 0: ") as raised:
            job.save_and_hear(4)
        assert not raised.value.environment
        assert "torch_save" in raised.value.__notes__[0], "its traceback"
        assert job.steps() == []


def test_failures_in_a_row_end_the_run(disk: FaultyDisk) -> None:
    job = Job(disk, max_failed_saves=3)
    disk.fail("rename", "*checkpoint-[1245]", errno.EIO)
    for step in (1, 2, 3, 4, 5):
        job.save_and_hear(step)
    assert job.steps() == [3], "a commit between them"
    disk.fail("rename", "*checkpoint-6", errno.EIO)
    with pytest.raises(SaveError) as raised:
        job.save_and_hear(6)
    assert raised.value.__notes__ == ["3 saves in a row have failed (max_failed_saves)"]


def test_a_run_that_is_lost_ends(disk: FaultyDisk) -> None:
    """Whatever is set for saves that fail: a newer attempt has the run."""
    job = Job(disk)
    job.save_and_hear(4)
    job.run.private.joinpath("owner").write_text("somebody-else\n")
    with pytest.raises(NotOwnerError):
        job.save_and_hear(8)
    assert job.steps() == [4]


def test_pauses() -> None:
    assert list(saving.pauses(0)) == [0]
    assert list(saving.pauses(7.5)) == [0, 1, 2, 4]
    assert list(saving.pauses(3600))[:7] == [0, 1, 2, 4, 8, 16, 30]
    assert 3570 < sum(saving.pauses(3600)) <= 3600


@pytest.mark.parametrize("mode", ["lazy", "off"])
@pytest.mark.parametrize("on_save_error", ["continue", "stop"])
def test_a_stranger_costs_no_save(disk: FaultyDisk, mode: str, on_save_error: str) -> None:
    """What has the name of a checkpoint is not touched, and the next step is saved instead."""
    job = Job(disk, mode, on_save_error=on_save_error, max_failed_saves=1)
    job.save_and_hear(4)
    (job.run.path / "checkpoint-8").write_text("mine")
    job.save_and_hear(8)
    assert (job.saving.taken, job.saving.try_again) == (8, False)
    job.save_and_hear(9)
    assert job.saving.taken is None
    assert job.steps() == [4, 9]
    assert (job.run.path / "checkpoint-8").read_text() == "mine"


def test_a_stranger_at_the_last_step_is_a_failure_that_names_it(disk: FaultyDisk) -> None:
    job = Job(disk)
    job.save_and_hear(4)
    (job.run.path / "checkpoint-8").mkdir()
    job.save(8, last=True)
    job.saving.finish()
    assert not job.saving.complete
    assert "FileExistsError: [Errno 17] in the way, and not this run's: " in job.saving.reason
    assert job.saving.reason.endswith("checkpoint-8'")


def test_a_stranger_that_is_moved_away_at_the_end(disk: FaultyDisk) -> None:
    job = Job(disk)
    (job.run.path / "checkpoint-8").mkdir()
    job.save(8, last=True)
    (job.run.path / "checkpoint-8").rename(job.run.path / "moved-away")
    job.saving.finish()
    assert job.saving.complete
    assert job.steps() == [8]

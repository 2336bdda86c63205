"""One thing that cannot be removed, renamed or linked does not keep the others, a save or a start.

On file systems made for it: FUSE with faults, an overlay, ext4 with `chattr +i`, a full tmpfs.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.run_folder.ownership import NotOwnerError, claim
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.setbacks import Setbacks
from keepstep.run_folder.storage import Storage
from keepstep.save.on_main import after_commit
from tests.helpers.attempts import Launch
from tests.helpers.disks import small_disk_at
from tests.helpers.faulty_disk import FaultyDisk, faulty_disk
from tests.helpers.folders import left_behind

TWO = Policy(2, "recency")


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("odd") / "disk", like_nfs=True) as disk:
        yield disk


@pytest.fixture
def disk(mounted: FaultyDisk) -> Iterator[FaultyDisk]:
    yield mounted
    mounted.empty()


def warnings(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [m for m in caplog.messages if text in m]


def test_a_reader_that_holds_a_pruned_file_open(
    disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS the file gets another name, and its folder cannot be removed."""
    run = disk.folder / "run"
    launch = Launch(run, TWO)
    launch.save(10)
    with open(run / "checkpoint-10/rank1.pt", "rb"):
        for step in (20, 30, 40, 50):
            launch.save(step)
        assert launch.steps() == [40, 50]
        assert len(warnings(caplog, "not empty (rmdir): ")) == 1, "and not at every save"
        assert left_behind(launch.folder) != []
        again = Launch(run, TWO)
        assert again.step == 50
        again.save(60)
        assert again.steps() == [50, 60]
    Launch(run, TWO)
    assert left_behind(launch.folder) == []
    assert not list(launch.folder.private.glob("swept-*"))


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        *(("rmdir", errno.ENOTEMPTY), ("unlink", errno.EBUSY)),
        *(("rename", errno.EIO), ("readdir", errno.EACCES)),
    ],
)
def test_leftovers_that_cannot_be_swept(
    disk: FaultyDisk, operation: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = disk.folder / "run"
    first = Launch(run, TWO)
    first.save(10)
    first.writer.stage(20).joinpath("rank0.pt").write_bytes(b"x")  # and killed
    (run / ".keepstep/trash/somebody/checkpoint-5").mkdir(parents=True)
    left = ["staging", "trash"] if operation == "rename" else [f"*{first.writer.owner}*", "*some*"]
    for pattern in left:
        disk.fail(operation, f"run/.keepstep/{pattern}", number)
    again = Launch(run, TWO)
    assert again.step == 10
    again.save(20)
    assert again.steps() == [10, 20]
    assert warnings(caplog, "It is tried again") or operation == "rename"  # removed where they lay
    disk.heal()
    Launch(run, TWO)
    assert left_behind(again.folder) == []
    assert {p.name for p in again.folder.private.iterdir() if p.is_dir()} == {"staging", "trash"}


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_one_checkpoint_that_cannot_be_renamed(
    disk: FaultyDisk, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = disk.folder / "run"
    launch = Launch(run, TWO)
    launch.save(10)
    disk.fail("rename", "run/checkpoint-10", number)
    for step in (20, 30, 40, 50):
        launch.save(step)
    assert launch.steps() == [10, 40, 50], "the others are pruned"
    (told,) = warnings(caplog, "checkpoint-10 is not pruned")
    assert "(rename): '" in told
    disk.heal()
    launch.save(60)
    assert launch.steps() == [50, 60]


def test_an_immutable_checkpoint(tmp_path: Path) -> None:
    launch = Launch(tmp_path, TWO)
    launch.save(10)
    frozen = tmp_path / "checkpoint-10"
    if subprocess.run(["chattr", "+i", frozen], check=False).returncode:
        pytest.skip("chattr +i: not root, or not on this file system")
    try:
        for step in (20, 30, 40):
            launch.save(step)
        assert launch.steps() == [10, 30, 40]
        assert launch.writer.make_room(50) == [30], "what did not go is not counted as room"
        assert Launch(tmp_path, TWO).step == 40
    finally:
        subprocess.run(["chattr", "-i", frozen], check=True)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_disk_without_symbolic_links(
    disk: FaultyDisk, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = disk.folder / "run"
    disk.fail("symlink", "*", number)
    launch = Launch(run, TWO)
    for step in (10, 20, 30, 40):
        launch.save(step, 1.0)
    assert launch.steps() == [30, 40]
    assert len(warnings(caplog, "the link latest is not set")) == 1
    assert Launch(run, TWO).step == 40


def test_links_and_pruning_after_a_commit(
    disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """As the save's own thread does it: the commit stands, and what can be done is done."""
    run = disk.folder / "run"
    launch = Launch(run, Policy(1, "recency"))
    launch.save(10)
    disk.fail("symlink", "*", errno.EPERM)
    launch.writer.policy = TWO
    launch.save(20)
    launch.writer.policy = Policy(1, "recency")
    checkpoint = launch.folder.checkpoint(20)
    assert after_commit(launch.writer, checkpoint, {}).pruned == [10]
    disk.fail("statfs", "*", errno.EIO)
    saved = after_commit(launch.writer, checkpoint, {})
    assert (saved.checkpoint, saved.free) == (checkpoint, None)
    disk.heal()
    launch.folder.owner_file.write_text("somebody-else")
    launch.writer.storage.guard(lambda: _lost())
    with pytest.raises(NotOwnerError):
        after_commit(launch.writer, checkpoint, {})


def _lost() -> None:
    raise NotOwnerError("the run belongs to a newer attempt")


def test_a_setback_is_told_once_and_losing_the_run_is_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setbacks = Setbacks()
    for number in (errno.EIO, errno.EIO, errno.EPERM):
        with setbacks.allowed("x is not removed"):
            raise OSError(number, os.strerror(number))
    assert len(warnings(caplog, "x is not removed")) == 2
    with pytest.raises(NotOwnerError), setbacks.allowed("x is not removed"):
        raise NotOwnerError("the run belongs to a newer attempt")
    with pytest.raises(ValueError, match="a mistake"), setbacks.allowed("x is not removed"):
        raise ValueError("a mistake in a program")


def test_a_damaged_checkpoint_that_cannot_be_set_aside(
    disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    run = disk.folder / "run"
    launch = Launch(run, TWO)
    launch.save(10)
    launch.save(20)
    (run / "checkpoint-20/rank0.pt").write_bytes(b"")
    disk.fail("rename", "run/checkpoint-20", errno.EPERM)
    again = Launch(run, TWO)
    assert again.step == 10
    assert warnings(caplog, "checkpoint-20 is not set aside")
    again.save(15)
    assert again.steps() == [10, 15, 20]
    assert Launch(run, TWO).step == 15


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", "2m") as place:
        yield place


def fill(place: Path) -> None:
    with open(place / "others", "ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
    with pytest.raises(OSError, match="No space"):
        (place / "one-more").write_bytes(b"x")
    (place / "one-more").unlink()


def test_a_lowered_limit_on_a_full_disk(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing at all can be written: the start prunes all the same, and then there is room."""
    run = full / "run"
    storage = Storage()
    claim(RunFolder(run), storage)
    launch = Launch(run, Policy(3, "recency"), owner=RunFolder(run).owner())
    for step in (10, 20, 30):
        launch.save(step)
    launch.writer.stage(40)
    fill(full)
    shutil.rmtree(launch.folder.trash)
    fill(full)
    owner = claim(RunFolder(run), storage)
    owner.check()
    storage.guard(owner.check)
    again = Launch(run, Policy(1, "recency"), storage=storage, owner=owner.token)
    assert again.step == 30
    assert again.steps() == [30]
    assert again.folder.policy().limit == 1
    again.save(40)
    assert again.steps() == [40]
    third = Launch(run, Policy(1, "recency"))
    assert left_behind(third.folder) == []
    assert not list(third.folder.private.glob("swept-*"))
    assert not list(third.folder.private.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_pruning_needs_no_room_for_a_folder(disk: FaultyDisk, number: int) -> None:
    run = disk.folder / "run"
    launch = Launch(run, Policy(3, "recency"))
    for step in (10, 20, 30):
        launch.save(step)
    disk.fail("mkdir", "*", number)
    disk.fail("write", "*", number)
    again = Launch(run, Policy(1, "recency"))
    assert again.steps() == [30]
    disk.heal()
    again.save(40)
    assert Launch(run, Policy(1, "recency")).step == 40
    assert not list(again.folder.private.glob("swept-*"))


def test_a_new_run_on_a_full_disk_is_refused(full: Path) -> None:
    fill(full)
    with pytest.raises(OSError, match="No space left"):
        claim(RunFolder(full / "run"), Storage())
    assert RunFolder(full / "run").owner() is None

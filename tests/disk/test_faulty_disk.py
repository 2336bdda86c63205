"""The file system that tests break: what works on it, what fails, and that both are seen."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.run_folder.storage import Storage, read_blocks
from tests.helpers.faulty_disk import FaultyDisk, faulty_disk
from tests.helpers.waiting import PATIENCE, wait_for


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path / "disk") as mounted:
        yield mounted


def test_it_works_as_others_do(disk: FaultyDisk) -> None:
    storage, content = Storage(), os.urandom(3 * 2**20 + 17)
    folder = disk.folder / "a"
    storage.make_folder(folder)
    storage.write(folder / "file", content)
    storage.link(folder / "file", folder / "second")
    storage.rename(folder, disk.folder / "b")
    storage.point(disk.folder / "latest", "b")
    assert (disk.folder / "latest/second").read_bytes() == content
    assert (disk.folder / "b/file").samefile(disk.folder / "b/second")
    assert b"".join(map(bytes, read_blocks(disk.folder / "b/file"))) == content
    with open(disk.folder / "b/file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert mapped[-17:] == content[-17:]
        mapped.close()
    storage.remove(disk.folder / "b")
    assert os.listdir(disk.backing) == ["latest"]
    assert disk.fired == []


def test_it_fails_where_it_is_told_to(disk: FaultyDisk) -> None:
    (disk.folder / "one").write_text("1")
    disk.fail("open", "on*", errno.EIO, times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            (disk.folder / "one").read_text()
    assert (disk.folder / "one").read_text() == "1"
    disk.fail("symlink", "*", errno.EPERM)
    with pytest.raises(PermissionError):
        (disk.folder / "link").symlink_to("one")
    disk.heal()
    (disk.folder / "link").symlink_to("one")
    assert disk.fired == [("open", "one"), ("open", "one"), ("symlink", "link")]


def test_it_does_not_answer_before_it_is_healed(disk: FaultyDisk) -> None:
    (disk.folder / "one").write_text("1")
    disk.hang("getattr", "one")
    seen: list[bool] = []
    look = threading.Thread(target=lambda: seen.append((disk.folder / "one").exists()))
    look.start()
    look.join(0.5)
    assert look.is_alive()
    assert not seen
    disk.heal()
    look.join(PATIENCE)
    assert seen == [True]


def test_like_nfs_an_open_file_keeps_its_folder(tmp_path: Path) -> None:
    with faulty_disk(tmp_path / "disk", like_nfs=True) as disk:
        folder = disk.folder / "old"
        folder.mkdir()
        (folder / "file").write_text("1")
        with open(folder / "file"), pytest.raises(OSError, match="not empty"):
            Storage().remove(folder)
        # It goes once it is closed, a moment later.
        wait_for(lambda: not os.listdir(disk.backing / "old"))
        Storage().remove(folder)
        assert not folder.exists()

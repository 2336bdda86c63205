"""Storage on file systems that refuse one thing or another, by FUSE."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.files import BLOCK, CHUNK, read_blocks
from keepstep.run_folder.storage import Storage
from tests.helpers.faulty_disk import FaultyDisk, faulty_disk

ODD = CHUNK + 5 * BLOCK + 77  # more than one part, and an end that is no block's


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("odd") / "disk") as disk:
        yield disk


@pytest.fixture
def disk(mounted: FaultyDisk) -> Iterator[FaultyDisk]:
    yield mounted
    mounted.empty()


def content_of(size: int) -> memoryview:
    """Bytes at the beginning of a page, as O_DIRECT wants them."""
    content = memoryview(mmap.mmap(-1, size))
    content[:] = os.urandom(size)
    return content


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("how", ["open", "an odd end", "now and then", "always"])
def test_what_cannot_go_past_the_page_cache_goes_through_it(
    disk: FaultyDisk, how: str, number: int
) -> None:
    content, path, fired = content_of(ODD), disk.folder / "x", len(disk.fired)
    if how == "open":
        disk.fail("open", "x", number, direct=True)
    elif how == "an odd end":
        disk.fail("read", "x", number, direct=True, unaligned=True)
        disk.fail("write", "x", number, direct=True, unaligned=True)
    else:
        times = 1 if how == "now and then" else None
        disk.fail("read", "x", number, direct=True, times=times)
        disk.fail("write", "x", number, direct=True, times=times)
    with Storage().create(path) as file:
        file.write(content)
    assert (disk.backing / "x").read_bytes() == bytes(content)
    assert b"".join(map(bytes, read_blocks(path))) == bytes(content)
    assert len(disk.fired) > fired
    shared = Storage().write_at(disk.folder / "x", ODD, [(0, content[:CHUNK])])
    assert shared != file.xxh3_128
    assert digest_of(path) == file.xxh3_128


def test_a_device_that_fails_is_no_reason_to_try_otherwise(disk: FaultyDisk) -> None:
    (disk.folder / "x").write_bytes(content_of(ODD))
    disk.fail("read", "x", errno.EIO, direct=True)
    with pytest.raises(OSError, match=r"\[Errno 5\] .* \(read\): '.*/disk/x'"):
        list(read_blocks(disk.folder / "x"))


def write_large(storage: Storage, path: Path) -> None:
    with storage.create(path) as file:
        file.write(content_of(ODD))


OPERATIONS: dict[str, tuple[str, Callable[[Storage, Path], object]]] = {
    "write": ("write", lambda s, x: s.write(x, b"x")),
    "write, large": ("write", write_large),
    "fsync": ("fsync", lambda s, x: s.write(x, b"x")),
    "truncate": ("ftruncate", lambda s, x: s.write_at(x, 9, [])),
    "fsync of a part": ("fsync", lambda s, x: s.write_at(x, 9, [])),
    "fsync of another's": ("fsync", lambda s, x: s.sync(x)),
    "fsyncdir": ("fsync", lambda s, x: s.sync_folder(x.parent)),
    "flush": ("close", lambda s, x: s.write(x, b"x")),
    "write of a line": ("append", lambda s, x: s.append_line(x, "x")),
    "rename": ("rename", lambda s, x: s.rename(x, x.with_name("y"))),
    "symlink": ("symlink", lambda s, x: s.point(x.with_name("y"), "x")),
    "unlink": ("unlink", lambda s, x: s.remove(x)),
    "rmdir": ("rmdir", lambda s, x: s.remove(x.parent)),
    "mkdir": ("mkdir", lambda s, x: s.make_folder(x.with_name("z"))),
    "read": ("read", lambda s, x: digest_of(x)),
}


@pytest.mark.parametrize("what", OPERATIONS)
def test_errors_name_the_file_and_the_operation(disk: FaultyDisk, what: str) -> None:
    told, act = OPERATIONS[what]
    (disk.folder / "in").mkdir()
    path = disk.folder / "in/x"
    path.write_bytes(b"before")
    operation = what.split()[0].strip(",")
    disk.fail(operation, "*", errno.EIO)
    with pytest.raises(OSError, match=rf"\[Errno 5\] Input/output error \({told}\): '.*/in"):
        act(Storage(), path)


def test_what_can_be_removed_is_removed_before_the_error(disk: FaultyDisk) -> None:
    for name in ("a/1", "a/2/x", "a/2/y", "b/1"):
        (disk.folder / "left" / name).parent.mkdir(parents=True, exist_ok=True)
        (disk.folder / "left" / name).write_bytes(b"x")
    disk.fail("unlink", "left/a/2/x", errno.EBUSY)
    with pytest.raises(OSError, match=r"busy \(unlink\): '.*/left/a/2/x'"):
        Storage().remove(disk.folder / "left")
    files = [p for p in (disk.folder / "left").rglob("*") if p.is_file()]
    assert files == [disk.folder / "left/a/2/x"]


def test_a_file_replaced_by_many_at_once(tmp_path: Path) -> None:
    path, errors = tmp_path / "owner", []

    def replace(word: str) -> None:
        try:
            for _ in range(40):
                Storage().replace(path, word.encode() * 1000)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=replace, args=(word,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in {word * 1000 for word in "abcd"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_not_be_replaced_leaves_nothing(disk: FaultyDisk) -> None:
    Storage().replace(disk.folder / "x", b"old")
    disk.fail("write", "*", errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        Storage().replace(disk.folder / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in disk.folder.iterdir()] == [("x", b"old")]

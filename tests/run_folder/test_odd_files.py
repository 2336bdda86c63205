"""What may lie where a file is looked for or written: links, pipes, devices, folders, too much."""

from __future__ import annotations

import errno
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from keepstep.run_folder.contents import sizes_of
from keepstep.run_folder.safe_read import OddFileError, is_file, read_object, read_text
from keepstep.run_folder.storage import Storage
from tests.helpers.disks import small_disk_at

WRITES: dict[str, Callable[[Storage, Path], object]] = {
    "write": lambda storage, path: storage.write(path, b"ours"),
    "write_at": lambda storage, path: storage.write_at(path, 4, [(0, memoryview(b"ours"))]),
    "append_line": lambda storage, path: storage.append_line(path, "ours"),
    "overwrite": lambda storage, path: storage.overwrite(path, b"ours"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, dangling: bool) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    if not dangling:
        theirs.write_text("theirs")
    link.symlink_to(theirs)
    with pytest.raises(OSError, match="link"):
        WRITES[name](Storage(), link)
    assert not theirs.exists() if dangling else theirs.read_text() == "theirs"


def test_what_is_shown_takes_a_links_place(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.write_text("theirs")
    link.symlink_to(theirs)
    Storage().show(link, "ours")
    assert theirs.read_text() == "theirs"
    assert (link.is_symlink(), link.read_text()) == (False, "ours")


def test_no_folder_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "pins").symlink_to("theirs")
    with pytest.raises(NotADirectoryError, match="a link in a folder's place"):
        Storage().make_folder(tmp_path / "pins")


def test_a_second_name_is_a_copy_on_another_file_system_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("content")
    with small_disk_at(tmp_path / "other", "1m") as other:
        with pytest.raises(OSError, match="cross-device"):
            Storage().link(source, other / "x")
        Storage().link(source, other / "x", or_copy=True)
        assert (other / "x").read_text() == "content"
        with pytest.raises(FileExistsError):
            Storage().link(source, other / "x", or_copy=True)
    Storage().link(source, tmp_path / "second", or_copy=True)
    assert (tmp_path / "second").samefile(source)
    for target in (source, tmp_path / "second"):  # a copy would empty the file, and fill nothing
        with pytest.raises(FileExistsError):
            Storage().link(source, target, or_copy=True)
    assert source.read_text() == "content"


def odd_things(folder: Path) -> list[Path]:
    """A file's place taken by everything else that there is, and by a link to a true one."""
    places = {name: folder / name for name in ("folder", "pipe", "link", "dangling", "zero")}
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    (folder / "true").write_text('{"a": 1}')
    places["link"].symlink_to("true")
    places["dangling"].symlink_to("nowhere")
    if os.geteuid() == 0:
        os.mknod(places["zero"], stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: without end
    return [path for path in places.values() if os.path.lexists(path)]


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    for path in odd_things(tmp_path):
        with pytest.raises(OddFileError, match="no file"):
            read_text(path)
        assert not is_file(path)
    assert is_file(tmp_path / "true")
    assert not is_file(tmp_path / "nothing")
    assert not is_file(tmp_path / "true/below")


def test_a_small_file_takes_little_memory_whatever_its_bound(tmp_path: Path) -> None:
    """Python sets aside all that a read asks for: 16 MB for each of a thousand manifests."""
    path = tmp_path / "manifest.json"
    path.write_text("{}")
    tracemalloc.start()
    try:
        assert read_text(path, 16 * 2**20) == "{}"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_regular_file_has_no_size(tmp_path: Path) -> None:
    names = [path.name for path in odd_things(tmp_path)]
    (tmp_path / "sub").symlink_to(tmp_path)
    sizes = sizes_of(tmp_path, [*names, "true", "sub/true", "nothing", "true/below"])
    assert sizes == dict.fromkeys(names) | {"true": 8, "sub/true": None}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "no text"),
        (b"", "Expecting value"),
        (b"[1]", "a list, no object"),
        (b'{"a": 1} x', "Extra data"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": 1, "check": "00000000"}', "check differs"),
        (b" " * (2**20 + 1), "more than"),
    ],
)
def test_what_is_not_what_was_written(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(OddFileError, match=why):
        read_object(tmp_path / "run.json")


def test_what_is_not_there_or_cannot_be_read_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        read_text(tmp_path / "file/below")
    with pytest.raises(OSError, match="File name too long") as caught:
        read_text(tmp_path / ("x" * 300))
    assert caught.value.errno == errno.ENAMETOOLONG

from __future__ import annotations

import mmap
import os
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash

from keepstep.run_folder.contents import digest_of, sizes_under
from keepstep.run_folder.files import BLOCK, CHUNK, DIRECT_FROM, read_blocks
from keepstep.run_folder.storage import Storage


def test_a_file_is_counted_and_digested_while_it_is_written(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    with Storage().create(tmp_path / "x") as file:
        for start in range(0, len(content), 7001):
            file.write(content[start : start + 7001])
    assert (tmp_path / "x").read_bytes() == content
    assert (file.bytes, file.xxh3_128) == (300_000, xxhash.xxh3_128(content).hexdigest())
    assert digest_of(tmp_path / "x") == file.xxh3_128


def test_a_torn_last_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"a": 1}\n{"b": ')
    Storage().append_line(log, '{"c": 3}')
    assert log.read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}']


def test_replace_and_point_leave_nothing_behind(tmp_path: Path) -> None:
    storage = Storage()
    for text in (b"old", b"new"):
        storage.replace(tmp_path / "status.json", text)
    for target in ("checkpoint-1", "checkpoint-2"):
        storage.point(tmp_path / "latest", target)
    assert (tmp_path / "status.json").read_bytes() == b"new"
    assert os.readlink(tmp_path / "latest") == "checkpoint-2"
    assert sorted(os.listdir(tmp_path)) == ["latest", "status.json"]


def test_every_operation_is_announced(tmp_path: Path) -> None:
    seen: list[str] = []
    storage = Storage(before=lambda operation, path: seen.append(operation))
    storage.make_folder(tmp_path / "a")
    storage.write(tmp_path / "a/x", b"1")
    storage.rename(tmp_path / "a", tmp_path / "b")
    storage.remove(tmp_path / "b")
    expected = "make_folder sync_folder create sync rename sync_folder remove remove_folder"
    assert seen == expected.split()


def test_sizes_leave_links_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x").write_bytes(b"123")
    (tmp_path / "link").symlink_to("sub/x")
    assert sizes_under(tmp_path) == {"sub/x": 3}


@pytest.mark.parametrize("size", [DIRECT_FROM + BLOCK * 3, CHUNK + DIRECT_FROM + 17, BLOCK - 1])
def test_large_writes_past_the_page_cache_are_whole(tmp_path: Path, size: int) -> None:
    content = memoryview(mmap.mmap(-1, size + BLOCK))
    content[:] = os.urandom(size + BLOCK)
    for shift in (0, 1, 8):  # at a block's beginning, and not
        with Storage().create(tmp_path / "x") as file:
            file.write(content[:shift])
            file.write(content[shift : shift + size])
        expected = bytes(content[: shift + size])
        assert (tmp_path / "x").read_bytes() == expected
        assert file.xxh3_128 == xxhash.xxh3_128(expected).hexdigest()


def test_extents_of_two_writers_meet_inside_of_blocks(tmp_path: Path) -> None:
    content = memoryview(mmap.mmap(-1, 4 * DIRECT_FROM))
    content[:] = os.urandom(len(content))
    cuts = [0, 100, DIRECT_FROM + 5000, 3 * DIRECT_FROM + 77, len(content)]
    extents = [(a, content[a:b]) for a, b in pairwise(cuts)]
    for mine in (extents[::2], extents[1::2]):
        digest = Storage().write_at(tmp_path / "x", len(content), mine)
        assert digest == xxhash.xxh3_128(b"".join(part for _, part in mine)).hexdigest()
    assert (tmp_path / "x").read_bytes() == bytes(content)
    read = b"".join(bytes(block) for block in read_blocks(tmp_path / "x"))
    assert read == bytes(content)

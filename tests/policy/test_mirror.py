"""How a checkpoint lies on a mirror, and when it is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.manifest import FileEntry
from keepstep.policy.mirror import (
    Copied,
    Found,
    address_fault,
    claims_left,
    copied,
    folder_of,
    found_name,
    found_of,
    left_behind,
    newest_owner,
    owners_that_found,
    parts_of,
    read_found,
    read_receipt,
    receipt_of,
    url_of,
    what_is_missing,
)
from keepstep.policy.strict import TextError
from tests.helpers.folders import manifest

sizes = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 1000), max_size=8)


@given(sizes, st.integers(1, 300), st.data())
def test_parts_are_the_files(files: dict[str, int], size: int, data: st.DataObject) -> None:
    """All of them, in any order; and with one left out something is missing."""
    parts = list(parts_of(files, size))
    assert len({part.name for part in parts}) == len(parts)
    assert all(part.bytes <= size or part.bytes == files[part.file] for part in parts)
    whole = manifest(4, files={n: FileEntry(0, size, "0" * 32) for n, size in files.items()})
    mixed = data.draw(st.permutations(parts))
    assert what_is_missing(whole, mixed) == []
    assert what_is_missing(whole, read_receipt(receipt_of(mixed, "0"))) == []
    there = [part for part in mixed if part.bytes]
    if there:
        lost = data.draw(st.sampled_from(there))
        assert what_is_missing(whole, [p for p in mixed if p != lost]) == [lost.file]
        short = [replace(p, bytes=p.bytes - 1) if p == lost else p for p in mixed]
        assert what_is_missing(whole, short) == [lost.file]


def test_a_checkpoint_is_there_with_its_manifest() -> None:
    old, new = folder_of(4, 2, "aa"), folder_of(4, 3, "bb")
    names = [f"{old}/model", f"{old}/manifest.json", f"{new}/model", "latest", "x/manifest.json"]
    assert copied(names) == [Copied(4, 2, old)]
    assert left_behind(names, 2, copied(names)) == {}
    assert left_behind(names, 3, copied(names)) == {new: [f"{new}/model"]}
    assert copied([*names, f"{new}/manifest.json"]) == [Copied(4, 3, new)]
    ten = folder_of(10, 1, "9.1.1")  # as a Slurm job names its attempts
    assert [c.step for c in copied([*names, f"{ten}/manifest.json"])] == [4, 10]


folders = st.builds(folder_of, st.integers(0, 5), st.integers(1, 4), st.sampled_from(["aa", "bb"]))


@given(st.sets(folders), st.sets(folders), st.integers(1, 4))
def test_what_a_deposed_owner_adds_does_not_count(
    before: set[str], later: set[str], owner: int
) -> None:
    """Whatever earlier owners write once another has said what it found, what counts of them is as
    it was, or is replaced by the new one's; and what does not count is removed by it."""
    found = read_found(owner, found_of(one.folder for one in copied(manifests(before))))
    whole = copied(manifests(before), found)
    old = {name for name in later if int(name.split("/")[1][:6]) < owner}
    assert copied(manifests(before | old), found) == whole
    new = copied(manifests(before | later), found)
    assert {one.folder for one in new if one.owner < owner} <= found.folders
    folders = left_behind(manifests(before | later), owner, new)
    behind = [name for objects in folders.values() for name in objects]
    assert set(behind).isdisjoint(manifests(one.folder for one in new))
    rest = set(manifests(before | later)) - set(behind)
    assert copied(rest, found) == new
    assert {n for n in rest if int(n.split("/")[1][:6]) < owner} <= manifests(found.folders)


def manifests(folders: Iterable[str]) -> set[str]:
    return {f"{folder}/manifest.json" for folder in folders}


def test_what_is_not_what_an_owner_found() -> None:
    for text in (b"", b"[]", b"{}", b'{"found": 3}', b'{"found": [3]}', b"\xff"):
        with pytest.raises(TextError):
            read_found(2, text)
    assert read_found(2, found_of(["a"])) == Found(2, frozenset({"a"}))


def test_owners() -> None:
    assert newest_owner([]) == 0
    assert newest_owner(["owners/000002.json", "owners/000010.json", "owners/x.json"]) == 10
    names = [found_name(2), found_name(10), "owners/000011.json", f"x/{found_name(3)}"]
    assert owners_that_found(names) == [10, 2]
    assert newest_owner(names[:2]) == 0


def test_claims_of_the_dead() -> None:
    there = ["owners/000004.json", "checkpoint-4/000001-aa/evaluations-000001.json"]
    dead = ["claims/owners/000003.json/aa", *(f"claims/{name}/bb" for name in there)]
    alive = ["claims/owners/000005.json/cc", "claims/checkpoint-4/000001-aa/x.json/dd"]
    assert claims_left([*there, *dead, *alive], 4) == dead


def test_addresses() -> None:
    assert url_of("s3://bucket/a/", "runs/my run") == "s3://bucket/a/my%20run"
    hub = "hf://buckets/acme/my.bucket-1"
    for good in ("s3://b", "gs://b/p", "az://container/p", "file:///mnt/disk"):
        assert address_fault(good) is None
    for good in (hub, f"{hub}/", f"{hub}/my runs/ü", f"{hub}/a%20b/..c/d.."):
        assert address_fault(good) is None
    for bad in ("b/p", "s3:///p", "file://mnt/disk", "file:///", "ftp://x/y", "s3://b/p?x"):
        assert address_fault(bad)
    for bad in ("hf://acme/bucket", "hf://buckets/acme", "hf://buckets/acme/", "hf://buckets//a"):
        assert address_fault(bad)
    for secret in ("s3://key:s3cr3t@bucket/p", "az://c/p?sig=s3cr3t", "s3://b/p#s3cr3t"):
        fault = address_fault(secret)
        assert fault
        assert "s3cr3t" not in fault
    for bad in ("s3://b/a//c", "gs://b/a/../c", "az://c/./a", "file:///mnt//disk", "s3://b//"):
        assert "no folder is called" in str(address_fault(bad))
    for good in ("s3://b/", "s3://b/a/", "file:///mnt/..disk/"):
        assert address_fault(good) is None
    for bad in (f"{hub}//x", f"{hub}/../x", f"{hub}/.", "hf://buckets/a c/b", "hf://buckets/../b"):
        assert address_fault(bad)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"parts": 3}', b'{"parts": [{}]}', b"\xff"])
def test_what_is_no_receipt(text: bytes) -> None:
    with pytest.raises(TextError):
        read_receipt(text)

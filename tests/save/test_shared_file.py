from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.save.shared_file import JointError, Share, digest_of_joint, merged


def shared(path: Path, cuts: list[int], owners: list[int]) -> tuple[bytes, dict[int, Share]]:
    """A file cut at these places, each part written by its owner."""
    content = os.urandom(cuts[-1])
    path.write_bytes(content)
    shares = {}
    for rank in set(owners):
        mine = [
            (a, b - a)
            for (a, b), owner in zip(pairwise(cuts), owners, strict=True)
            if owner == rank
        ]
        digest = xxhash.xxh3_128(b"".join(content[a : a + n] for a, n in mine)).hexdigest()
        shares[rank] = Share(len(content), merged(mine), digest)
    return content, shares


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 4), st.integers())
def test_every_way_to_share_a_file(sizes: list[int], ranks: int, seed: int) -> None:
    path = Path(os.environ["PYTEST_TMP"]) / "x"
    chance = random.Random(seed)
    cuts = [0]
    for size in sizes:
        cuts.append(cuts[-1] + size)
    owners = [chance.randrange(ranks) for _ in sizes]
    content, shares = shared(path, cuts, owners)
    assert digest_of_joint(path, shares) == xxhash.xxh3_128(content).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))  # hypothesis wants no function's fixture


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content, shares = shared(path, [0, 1000, 70_000, 100_000], [0, 1, 0])
    with pytest.raises(JointError, match="rank 0 wrote at byte 70000, not 1000"):
        digest_of_joint(path, {0: shares[0]})
    late = replace(shares[1], extents=((1001, 69_000),))
    with pytest.raises(JointError, match="rank 1 wrote at byte 1001, not 1000"):
        digest_of_joint(path, {0: shares[0], 1: late})
    flipped = bytearray(content)
    flipped[50_000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(JointError, match="does not hold what rank 1 wrote"):
        digest_of_joint(path, shares)
    path.write_bytes(content[:-1])
    with pytest.raises(JointError, match="bytes were written"):
        digest_of_joint(path, shares)


def test_extents_that_touch_are_one() -> None:
    assert merged([(0, 8), (8, 2), (10, 0), (20, 5)]) == ((0, 10), (20, 5))

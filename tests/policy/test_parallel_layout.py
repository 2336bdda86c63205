from __future__ import annotations

import pytest

from keepstep.policy.parallel_layout import ParallelLayout
from tests.helpers.folders import manifest


@pytest.mark.parametrize(
    ("layout", "printed"),
    [
        (ParallelLayout(2, 3), "2 x ZeRO-3"),
        (ParallelLayout(2, 3, deepspeed=True), "2 x ZeRO-3"),
        (ParallelLayout(2), "2 x DDP"),
        (ParallelLayout(1), "1 x DDP"),
        (ParallelLayout(4, 0, deepspeed=True), "4 x ZeRO-0"),
    ],
)
def test_printed(layout: ParallelLayout, printed: str) -> None:
    assert str(layout) == printed
    assert layout.strategy == printed.split(" x ")[1]
    assert layout.is_sharded == (layout.zero_stage > 0)


def test_equal_where_one_loads_what_the_other_saved() -> None:
    """An older manifest does not say that DeepSpeed wrote its shards; nobody else writes any."""
    assert ParallelLayout(2, 3) == ParallelLayout(2, 3, deepspeed=True)
    assert hash(ParallelLayout(2, 3)) == hash(ParallelLayout(2, 3, deepspeed=True))
    different = [ParallelLayout(2, 3), ParallelLayout(2, 2), ParallelLayout(1, 3)]
    different += [ParallelLayout(2), ParallelLayout(2, 0, deepspeed=True)]
    assert len(set(different)) == 5


def test_of_a_manifest() -> None:
    assert str(manifest(5, world_size=3, zero_stage=2).parallel_layout) == "3 x ZeRO-2"
    written = manifest(5, world_size=1, zero_stage=0, deepspeed=True)
    assert written.parallel_layout == ParallelLayout(1, 0, deepspeed=True)

"""One rank's rows, in the order of Accelerate's seeded sampler."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from keepstep.checkpoint.batch import Batch, Course
from keepstep.sampling import IGNORED, StepSampler, step_loader


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)[:, None]
    return {"input_ids": ids, "labels": ids.clone()}


def epoch_rows(batch: Batch, rank: int, epoch: int = 0, samples: int = 0) -> list[list[int]]:
    rows = range(10)
    course = Course(len(rows), batch.rows)
    sampler = StepSampler(course, batch, rank, 7, RandomSampler(rows), samples)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_is_seeded_by_epoch() -> None:
    for epoch in (0, 3):
        generator = torch.Generator().manual_seed(7 + epoch)
        expected = torch.randperm(10, generator=generator).tolist()
        found = epoch_rows(Batch(4, 1, 1), 0, epoch)
        assert found == [expected[:4], expected[4:8], expected[8:]]
    assert epoch_rows(Batch(4, 1, 1), 0, 0) != epoch_rows(Batch(4, 1, 1), 0, 3)


def test_any_number_of_processes_has_the_same_steps() -> None:
    alone = epoch_rows(Batch(6, 1, 1), 0)
    for batch in (Batch(2, 1, 3), Batch(1, 3, 2), Batch(3, 1, 2), Batch(1, 1, 6)):
        ranks = [epoch_rows(batch, rank) for rank in range(batch.world_size)]
        for step, rows in enumerate(alone):
            turns = range(step * batch.accumulation, (step + 1) * batch.accumulation)
            assert [row for turn in turns for rank in ranks for row in rank[turn]] == rows


def test_a_rank_without_rows_takes_part_and_learns_nothing() -> None:
    rows = list(range(10, 17))
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    course, batch = Course(len(rows), 6), Batch(2, 1, 3)
    seen: list[int] = []
    for rank in range(3):
        sampler = StepSampler(course, batch, rank, 0, SequentialSampler(rows), 0)
        dealt = step_loader(loader, sampler)
        dealt.set_epoch(0)
        batches = list(dealt)
        assert len(batches) == len(dealt) == 2
        for micro in batches:
            learned = micro["labels"][micro["labels"] != IGNORED].tolist()
            assert learned in (micro["input_ids"].flatten().tolist(), [])
            seen += learned
    assert sorted(seen) == rows

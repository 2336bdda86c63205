"""One rank's rows, in the order of Accelerate's seeded sampler."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl.trainer.utils import RepeatSampler

from keepstep.data.stream import BEGINNING, Place, StreamReader
from keepstep.policy.batch import Batch, Course, Dealt
from keepstep.policy.manifest import Manifest
from keepstep.sharding.sources import ReshardError
from keepstep.trainer.dealing import (
    IGNORED,
    RowError,
    StepSampler,
    settle_loader,
    step_loader,
    tell_epoch,
)
from keepstep.trainer.restore import random_numbers, random_numbers_apart, set_random_numbers
from keepstep.trainer.row_plan import RowPlan, own_place, place_in_stream
from tests.helpers.folders import manifest


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


def test_rows_that_are_left_out() -> None:
    """A step is smaller by them, on any number of processes; the steps around it are the same."""
    order, skipped = list(epoch_rows(Batch(10, 1, 1), 0)[0]), {4, 5, 6, 7}
    for batch in (Batch(4, 1, 1), Batch(1, 2, 2), Batch(2, 1, 2), Batch(1, 1, 4)):
        course = Course(10, batch.rows)
        plan = RowPlan(course, batch, 7, 0, 0, skipped=frozenset(skipped))
        dealt: list[list[int]] = [[], [], []]
        for rank in range(batch.world_size):
            sampler = StepSampler(course, batch, rank, 7, RandomSampler(range(10)), 0, skipped)
            sampler.set_epoch(0)
            micro = list(sampler)
            assert len(micro) == len(sampler) == 3 * batch.accumulation
            for step in range(3):
                of_step = micro[step * batch.accumulation :][: batch.accumulation]
                weights = plan.weights(step, rank, sampler.order_of)
                assert [bool(rows) for rows in of_step] == [weight > 0 for weight in weights]
                dealt[step] += [row for rows in of_step for row in rows]
        expected = [[r for r in order[at : at + 4] if r not in skipped] for at in (0, 4, 8)]
        assert [sorted(rows) for rows in dealt] == [sorted(rows) for rows in expected]
        assert [plan.rows(step, sampler.order_of) for step in range(3)] == expected


class Unreadable:
    """Rows of which one cannot be read, and another cannot be collated."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> int:
        if place == 2:
            raise OSError("Truncated File Read")
        return place


def only_small(rows: list[int]) -> dict[str, torch.Tensor]:
    if max(rows) > 5:
        raise ValueError("too\nlong")
    return collate(rows)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("row", "left_out", "told"),
    [
        (2, {6, 7}, "OSError: Truncated File Read"),
        (6, {2}, "ValueError: too long"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    row: int, left_out: set[int], told: str, workers: int
) -> None:
    """From a worker, too: torch puts its traceback in front."""
    rows: Any = Unreadable()
    loader = DataLoader(rows, batch_size=4, collate_fn=only_small, num_workers=workers)
    order = SequentialSampler(rows)
    sampler = StepSampler(Course(8, 4), Batch(4, 1, 1), 0, 0, order, 0, left_out)
    dealt = step_loader(loader, sampler)
    dealt.set_epoch(0)
    with pytest.raises(RowError) as raised:
        list(dealt)
    said = f"row {row} of the training set, counted from 0, cannot be used: {told}\n    Hint: "
    assert str(raised.value).startswith(said)


def test_what_fills_up_is_no_row_that_is_left_out() -> None:
    rows = list(range(10, 17))
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    course, batch = Course(len(rows), 6), Batch(2, 1, 3)
    sampler = StepSampler(course, batch, 1, 0, SequentialSampler(rows), 0, {0, 1, 6})
    seen = [ids for micro in step_loader(loader, sampler) for ids in micro["input_ids"].flatten()]
    assert seen == [13, 12]  # of the second step nothing is left


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


def test_a_mean_over_rows_counts_each_row_once() -> None:
    """A classifier's loss, say: over ignored labels alone it would be no number, times nothing."""
    rows = list(range(10, 17))
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    plan = RowPlan(Course(len(rows), 6), Batch(2, 1, 3), 0, 0, 0)
    means = []
    for rank in range(3):
        dealt = plan.dealing(loader, SequentialSampler(rows), rank, sums_labels=False)
        micro = list(dealt)[1]
        assert (micro["labels"] != IGNORED).all()
        means.append(plan.weights(1, rank)[0] * micro["labels"].double().mean().item())
        assert plan.weights(0, rank) == [1.0]
    assert sum(means) / 3 == 16


@pytest.mark.parametrize("epoch", [0, 2])
def test_trl_s_sampler_goes_on_in_its_epoch(epoch: int) -> None:
    def sampler() -> RepeatSampler:
        return RepeatSampler(range(9), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)

    straight = sampler()
    orders = [list(straight) for _ in range(3)]
    assert orders[0] != orders[2]
    rows: Any = range(9)
    resumed = DataLoader(rows, batch_sampler=BatchSampler(sampler(), 12, drop_last=False))
    tell_epoch(resumed, epoch)
    assert [row for batch in resumed for row in batch.tolist()] == orders[epoch]


class Drawing(torch.utils.data.Dataset):
    """Rows that draw a number where they are read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> float:
        return float(torch.rand(())) if torch.utils.data.get_worker_info() else float(row)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[float]:
        yield from (Drawing()[row] for row in range(6))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["dealt", "accelerate", "stream"])
def test_loaders_draw_nothing_from_the_process_s_generator(workers: int, kind: str) -> None:
    """Else dropout would be another after a resume: iterators are not begun as often."""

    def loader() -> DataLoader:
        rows: Any = Stream() if kind == "stream" else Drawing()
        plain = DataLoader(rows, num_workers=workers, persistent_workers=workers > 0)
        if kind == "dealt":
            settle_loader(plain, 7)
            course, batch = Course(6, 2), Batch(2, 1, 1)
            return step_loader(plain, StepSampler(course, batch, 0, 7, SequentialSampler(rows), 0))
        apart = DataLoaderConfiguration(dispatch_batches=False)  # as TRL has it
        prepared = Accelerator(cpu=True, dataloader_config=apart).prepare(plain)
        settle_loader(prepared, 7)
        settle_loader(prepared, 7)  # each evaluation does, of a loader that stays
        return prepared

    before = torch.get_rng_state()
    dealt = loader()
    first = [[batch.tolist() for batch in dealt] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    dealt = loader()
    assert [[batch.tolist() for batch in dealt] for _ in range(2)] == first


def test_what_an_evaluation_draws_is_not_missed() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random_numbers()
    with contextlib.suppress(KeyError), random_numbers_apart():
        first = draw()
        raise KeyError("broken off")
    assert draw() == first
    set_random_numbers(states)
    assert draw() == first


def test_batches_balanced_by_length_are_those_of_the_epoch_that_a_resume_goes_on_in() -> None:
    lengths = list(range(1, 25))

    def loader() -> Any:
        order = BatchRebalanceSampler(lengths, effective_batch_size=6, dp_size=2, grad_accum=1)
        plain = DataLoader(lengths, batch_sampler=order, collate_fn=list)  # type: ignore[arg-type]
        prepared = prepare_data_loader(plain, num_processes=2, put_on_device=False)
        prepared.batch_sampler.num_processes = 1  # as Trainer has it: the sampler knows its rank
        return prepared

    Accelerator(cpu=True)
    whole, resumed = loader(), loader()
    tell_epoch(whole, 1)
    rest = skip_first_batches(resumed, 2)
    tell_epoch(resumed, 1)
    assert list(rest) == list(whole)[2:]
    tell_epoch(whole, 0)
    assert list(rest) != list(whole)[2:]


def at(step: int, epoch: float, **place: Any) -> Manifest:
    dealt = Dealt(Batch(6, 1, 2), Batch(6, 1, 2), None, **place).as_json()
    return manifest(step, epoch=epoch, dealt=dealt)


def args(batch: Batch, workers: int = 0) -> Any:
    return SimpleNamespace(batch=batch, dataloader_num_workers=workers)


def test_a_place_in_a_stream_that_the_trainer_deals() -> None:
    same, wider = args(Batch(6, 1, 2)), args(Batch(12, 1, 1))
    assert place_in_stream(at(7, 1.2, passes=1, done=2), same) == (1, 2)
    assert place_in_stream(at(7, 1.2, passes=1, done=2), wider) == (1, 2)  # the same micro-batches
    assert place_in_stream(at(4, 0.4), same) == (0, 4)  # of a version that did not write it down
    assert place_in_stream(manifest(4, epoch=0.4, dealt={}), same) == (0, 4)
    with pytest.raises(ReshardError, match="does not say where in it"):
        place_in_stream(at(7, 1.2), same)
    with pytest.raises(ReshardError, match="Hint: per_device_train_batch_size: 4, gradient_acc"):
        place_in_stream(at(7, 1.2, passes=1, done=2), args(Batch(2, 2, 3)))
    read = manifest(4, epoch=0.4, dealt={}, settings={"dataloader_num_workers": 2})
    with pytest.raises(ReshardError, match="Hint: dataloader_num_workers: 2"):
        place_in_stream(read, same)


def test_a_place_in_a_stream_that_the_run_deals() -> None:
    rows = datasets.Dataset.from_dict({"n": list(range(9))}).to_iterable_dataset(num_shards=3)
    reader = StreamReader(rows, 1, BEGINNING)
    reader.take(5)
    batch = Batch(6, 1, 2)
    before = Dealt(batch, batch, None, 1, 2, 5, reader.place.state, 3)
    place = Place(2, 5, reader.place.state)
    assert own_place(rows, before, ()) == {"passes": 1, "place": place, "told": ""}
    made = rows.filter(lambda row: True)
    found = own_place(made, before, ())
    assert found["place"] == Place(2, 5, "")
    assert found["told"].endswith("its 5 rows are read again")
    fewer = rows.shard(3, 0)
    with pytest.raises(ReshardError, match=r"is 1 now, and was 3"):
        own_place(fewer, before, ())
    assert own_place(fewer, before, ["stream"])["place"] == place

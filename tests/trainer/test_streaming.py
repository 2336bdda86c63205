"""One rank's micro-batches of a stream: the same steps on any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

from keepstep.data.stream import BEGINNING, Place
from keepstep.policy.batch import Batch
from keepstep.trainer.dealing import IGNORED, settle_loader, tell_epoch
from keepstep.trainer.streaming import FromStream, StreamRows, stream_loader

ROWS = 29
READ: list[int] = []


def read(row: dict[str, Any]) -> dict[str, Any]:
    READ.append(row["n"])
    return row


def stream() -> datasets.IterableDataset:
    rows = datasets.Dataset.from_dict({"n": list(range(ROWS))})
    return rows.to_iterable_dataset(num_shards=4).map(read)


def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["n"] for row in rows])[:, None]
    return {"input_ids": ids, "labels": ids.clone()}


def loader(batch: Batch, rank: int, workers: int = 0, **place: Any) -> Any:
    """A rank's, in the pass and at the place where it goes on."""
    Accelerator(cpu=True)
    plain = DataLoader(stream(), batch.per_device, collate_fn=collate, num_workers=workers)
    settle_loader(plain, 7)
    where: dict[str, Any] = {"drop_last": False, "passes": 0, "place": BEGINNING} | place
    return stream_loader(plain, StreamRows(stream(), batch, rank, **where), sums_labels=True)


def fed(batches: Any) -> Iterator[FromStream]:
    for batch in batches:
        if batch.inputs is None:
            return
        yield batch


def learned(batches: Any) -> list[list[int]]:
    return [b.inputs["labels"][b.inputs["labels"] != IGNORED].tolist() for b in fed(batches)]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain(*lists))


def one_pass(batch: Batch, number: int = 0, **options: Any) -> list[list[int]]:
    """Which rows each step has, over all ranks."""
    found = []
    for rank in range(batch.world_size):
        made = loader(batch, rank, **options)
        tell_epoch(made, number)
        found.append(learned(made))
    turns = [flat(turn) for turn in zip(*found, strict=True)]
    steps = range(0, len(turns), batch.accumulation)
    return [flat(turns[at : at + batch.accumulation]) for at in steps]


@pytest.mark.parametrize("number", [0, 3])
def test_any_number_of_processes_has_the_same_steps(number: int) -> None:
    alone = one_pass(Batch(6, 1, 1), number)
    assert sorted(flat(alone)) == list(range(ROWS))
    assert [len(step) for step in alone] == [6, 6, 6, 6, 5]
    assert (flat(alone) == list(range(ROWS))) == (number == 0)  # files in another order
    for batch in (Batch(2, 1, 3), Batch(1, 3, 2), Batch(3, 2, 1), Batch(1, 1, 6)):
        assert one_pass(batch, number) == alone
    assert one_pass(Batch(6, 1, 1), number, workers=3) == alone
    assert one_pass(Batch(6, 1, 1), number, drop_last=True) == alone[:4]


def test_a_rank_goes_on_and_reads_nothing_again() -> None:
    """As the Trainer goes on: a look at the first batch, then the skipped ones, then the rest."""
    batch = Batch(3, 2, 1)
    whole = list(fed(loader(batch, 0)))
    place = whole[3].place  # two steps, of two micro-batches each
    assert place == Place(2, 12, place.state)
    made = loader(batch, 0, place=place)
    assert learned([next(iter(made))]) == [[0, 1, 2]]
    rest = skip_first_batches(made, 4)
    tell_epoch(made, 0)
    del READ[:]
    assert learned(rest) == [b.inputs["labels"].flatten().tolist() for b in whole[4:]]
    assert list(range(12, ROWS)) == READ
    tell_epoch(made, 1)
    assert sorted(flat(learned(made))) == list(range(ROWS))


def test_where_it_was_when_it_cannot_tell() -> None:
    made = loader(Batch(6, 1, 1), 0, place=Place(2, 12))
    tell_epoch(made, 0)
    rest = learned(skip_first_batches(made, 2))
    assert flat(rest) == list(range(12, ROWS))

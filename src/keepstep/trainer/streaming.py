"""Deals the rows of a stream to the ranks: the same rows in each step on any number of processes.

Every rank reads the whole stream, in one order, and keeps its share of each step. Where the stream
is after a step travels with that step's last micro-batch to the process that trains, and from there
into the checkpoint: a loader's worker may be far ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler

from keepstep.data.stream import BEGINNING, Place, StreamReader
from keepstep.policy.batch import Batch, Course
from keepstep.trainer.dealing import Collate, RowLoader


class FromStream(NamedTuple):
    """A micro-batch of a stream.

    Attributes:
        inputs: for the model; None: the pass is over.
        rows: of its step, on all ranks.
        place: of the stream behind them.
    """

    inputs: Any
    rows: int = 0
    place: Place = BEGINNING


class Portion(NamedTuple):
    """A rank's rows of a micro-batch, not collated yet; see `FromStream`.

    Attributes:
        filler: a row of the step, for a rank that has none.
    """

    rows: list[Any]
    filler: Any
    of: int
    place: Place


class StreamRows(Dataset[Any]):
    """A stream's micro-batches by their number in the pass: one rank's."""

    def __init__(
        self, rows: Any, batch: Batch, rank: int, drop_last: bool, passes: int, place: Place
    ) -> None:
        """
        Args:
            rows: the stream, as it is trained on.
            batch: how the rows of a step are shared out.
            rank: whose micro-batches these are.
            drop_last: leave out what does not fill a pass's last step.
            passes: that are over where the attempt goes on.
            place: in the next one, likewise.
        """
        self._rows, self._batch, self._rank, self._drop_last = rows, batch, rank, drop_last
        self._start = passes, place
        self._pass = passes
        self._reader: StreamReader | None = None
        self._step, self._portions = -1, list[Portion]()

    def begin(self, number: int) -> None:
        """Go on with this pass; what is asked for next is one of its micro-batches."""
        self._pass, self._reader, self._step = number, None, -1

    def __getitems__(self, numbers: list[int]) -> Portion | None:
        step, turn = divmod(numbers[0], self._batch.accumulation)
        if step != self._step:
            self._portions, self._step = self._read(step), step
        return self._portions[turn] if self._portions else None

    def _read(self, step: int) -> list[Portion]:
        """A rank's micro-batches of a step; none when the pass is over."""
        passes, start = self._start
        if self._pass != passes or step < start.done:
            start = BEGINNING
        if self._reader is None or not start.done <= self._reader.place.done <= step:
            self._reader = StreamReader(self._rows, self._pass, start)
        rows = self._reader.take(self._batch.rows)
        while rows and self._reader.place.done <= step:
            rows = self._reader.take(self._batch.rows)
        if not rows or (self._drop_last and step and len(rows) < self._batch.rows):
            return []
        shares = Course(len(rows), self._batch.rows).share(0, 0, self._batch, self._rank)
        place, count = self._reader.place, len(rows)
        return [Portion([rows[i] for i in share], rows[0], count, place) for share in shares]


class Numbers(Sampler[list[int]]):
    """The numbers of a pass's micro-batches, without an end: where it is, the stream tells."""

    def __init__(self, rows: StreamRows) -> None:
        self._rows = rows

    def set_epoch(self, epoch: int) -> None:
        self._rows.begin(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        number = 0
        while True:
            yield [number]
            number += 1


class StreamCollate:
    """Collates what `StreamRows` gives."""

    def __init__(self, collate: Callable[[Any], Any], sums_labels: bool) -> None:
        self._collate, self._sums_labels = collate, sums_labels

    def __call__(self, portion: Portion | None) -> FromStream:
        if portion is None:
            return FromStream(None)
        collate = Collate(self._collate, portion.filler, self._sums_labels)
        return FromStream(collate(portion.rows), portion.of, portion.place)


def stream_loader(loader: DataLoader[Any], rows: StreamRows, sums_labels: bool) -> RowLoader:
    """`loader` with its rows dealt by `rows`, as `FromStream`: the one without `inputs` is the end.
    It has one worker at most: each would read all rows. Ranks: any, each its own.

    Args:
        sums_labels: whether the loss is a sum over labels (see `Collate`).
    """
    workers = min(1, loader.num_workers)
    return RowLoader(
        rows,
        batch_sampler=Numbers(rows),
        collate_fn=StreamCollate(loader.collate_fn, sums_labels),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if workers else None,
        in_order=loader.in_order,
    )

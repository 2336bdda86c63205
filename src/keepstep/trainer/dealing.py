"""Deals the rows of each optimizer step to the ranks: the same rows on any number of processes.

Accelerate deals whole micro-batches, and fills an epoch's last ones with rows from its beginning:
what a step consists of then depends on who computes it. Here a step's rows are given by the run
(`Course`), and the last step of an epoch has what is left, each row once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from trl.trainer.utils import RepeatSampler

from keepstep.data.common import LoaderError
from keepstep.policy.batch import Batch, Course, share_of
from keepstep.trainer.workers import WithoutSignals, workers_of

IGNORED = -100  # the label of a token that is not trained on, by torch's convention


class StepSampler(BatchSampler):
    """One rank's micro-batches, `accumulation` for each step; an empty one when a rank has no row.

    The order of an epoch is that of Accelerate's seeded sampler: drawn with `seed + epoch`.
    """

    def __init__(
        self,
        course: Course,
        batch: Batch,
        rank: int,
        seed: int,
        order: Sampler[int],
        samples: int,
        skipped: Collection[int] = (),
    ) -> None:
        """
        Args:
            course: which rows each step has.
            batch: how the rows of a step are shared out.
            rank: whose micro-batches these are.
            seed: of the epochs' orders.
            order: of single rows; seeded anew for each epoch, if it is random.
            samples: drawn before this attempt.
            skipped: rows that are left out: a step that would have them is smaller by those.
        """
        self.course, self.batch, self.rank, self.seed = course, batch, rank, seed
        self.skipped = frozenset(skipped)
        self._order = order
        self._start = course.start(samples)
        self._epoch = self._start[0]
        self._orders: dict[int, list[int]] = {}  # of the newest two epochs

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self.course.steps_per_epoch * self.batch.accumulation

    def order_of(self, epoch: int) -> list[int]:
        """The rows of one of the newest two epochs, in the order in which they are dealt."""
        return self._orders[epoch]

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self._epoch)
        if hasattr(self._order, "generator"):  # RandomSampler, LengthGroupedSampler
            self._order.generator = generator
        order = list(self._order)
        self._orders = {self._epoch: order, **self._orders}
        self._orders = dict(itertools.islice(self._orders.items(), 2))
        first, _, shift = self._start
        shift = shift if self._epoch == first else 0
        for step in range(self.course.steps_per_epoch):
            rows = [order[place] for place in self.course.places(step, shift)]
            rows = [row for row in rows if row not in self.skipped]
            yield from share_of(rows, self.batch, self.rank)


class RowLoader(DataLoader[Any]):
    """A DataLoader whose epochs can be set, as Trainer does."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class Fetched:
    """An iterator over what is made of each batch when it has come."""

    def __init__(self, batches: Iterator[Any], taken: Callable[[Any], Any]) -> None:
        self._batches, self._taken = batches, taken

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._taken(next(self._batches))


def settle_loader(loader: Any, seed: int) -> None:
    """Give a loader random numbers of its own, the same whatever was drawn from it before: by
    default it takes them from the process's generator, and so from dropout's. Its workers leave
    signals to their parent, and are not waited for. Ranks: any, each its own."""
    inner = getattr(loader, "base_dataloader", loader)  # Accelerate's loaders iterate over another
    if not isinstance(inner.worker_init_fn, WithoutSignals):
        inner.worker_init_fn = WithoutSignals(inner.worker_init_fn)
        inner.generator = torch.Generator()
        if inner.num_workers:
            inner.multiprocessing_context = workers_of(inner)
    order = getattr(loader, "synchronized_generator", None)  # of rows grouped by length
    for generator in (inner.generator, order):
        if generator is not None:
            generator.manual_seed(seed)


def tell_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler at the bottom of a loader which epoch begins: of one whose first batches are
    skipped, and that deals batches out among ranks, nobody does (accelerate 1.15). Ranks: any."""
    while (loader := getattr(loader, "batch_sampler", None)) is not None:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        order = getattr(loader, "sampler", None)
        if isinstance(order, RepeatSampler) and order.shuffle:
            settle_order(order, epoch)


def settle_order(order: RepeatSampler, epoch: int) -> None:
    """Have TRL's sampler draw the order of this epoch next (trl 1.16: it draws that of the first
    one, whatever epoch a run goes on in). Ranks: any, each its own."""
    order.generator.manual_seed(order.seed)
    for _ in range(epoch):
        torch.randperm(order.num_samples, generator=order.generator)


class RowError(LoaderError):
    """A row of the training set cannot be read, or cannot be collated."""


class FetchedRows(list[Any]):
    """The rows of a micro-batch.

    Attributes:
        places: positions of them in the training set.
        again: fetches one of them anew, by its position.
    """

    def __init__(self, rows: Sequence[Any], places: Sequence[int], again: Callable[[int], Any]):
        super().__init__(rows)
        self.places, self.again = places, again

    def blame(self, make: Callable[[Any], object]) -> None:
        """Raise a `RowError` of the first of them of which `make` makes nothing by itself."""
        for place in self.places:
            try:
                make(self.again(place))
            except Exception as error:  # Pillow's, of a processor, a disk's
                told = " ".join(str(error).split()) or "no more is known"
                raise RowError(
                    f"row {place:,} of the training set, counted from 0, cannot be used: "
                    f"{type(error).__name__}: {told}\n    Hint: mend that row, and run the same "
                    "command again (with allow_drift: [dataset], if the report asks for it)"
                ) from error


class TrainingRows(Dataset[Any]):
    """The training set; of a row that cannot be read it is said which one it is."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Any:
        return self._rows[place]

    def __getitems__(self, places: list[int]) -> FetchedRows:
        several = getattr(self._rows, "__getitems__", None)
        try:
            rows = [self._rows[p] for p in places] if several is None else several(places)
        except Exception:
            FetchedRows([], places, self._rows.__getitem__).blame(lambda row: None)
            raise
        return FetchedRows(rows, places, self._rows.__getitem__)


class Collate:
    """Collates a micro-batch; for an empty one, a row that nothing is learned from.

    (Every rank has to take part in every forward and backward pass: they are collective.) Where
    the loss is a sum over labels, its labels are ignored; where it is a mean, that would be one of
    nothing, and its weight is 0 (`RowPlan.weights`).
    """

    def __init__(self, collate: Callable[[Any], Any], filler: Any, sums_labels: bool) -> None:
        self._collate, self._filler, self._sums_labels = collate, filler, sums_labels

    def __call__(self, rows: Sequence[Any]) -> Any:
        if rows:
            try:
                return self._collate(rows)
            except Exception:
                if isinstance(rows, FetchedRows):
                    rows.blame(lambda row: self._collate([row]))
                raise
        # A copy: TRL's collator of images (1.16) changes the rows that it is given.
        filler = dict(self._filler) if isinstance(self._filler, Mapping) else self._filler
        batch = self._collate([filler])
        for name in ("labels", "shift_labels"):
            if self._sums_labels and name in batch and not batch[name].is_floating_point():
                batch[name] = torch.full_like(batch[name], IGNORED)
        return batch


def step_loader(
    loader: DataLoader[Any], sampler: StepSampler, sums_labels: bool = True
) -> RowLoader:
    """`loader` (a map-style one) with its rows dealt by `sampler`. Ranks: any, each its own."""
    dealt = (row for row in itertools.count() if row not in sampler.skipped)
    filler = loader.dataset[next(dealt)]
    return RowLoader(
        TrainingRows(loader.dataset),
        batch_sampler=sampler,
        collate_fn=Collate(loader.collate_fn, filler, sums_labels),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )

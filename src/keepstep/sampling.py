"""Deals the rows of each optimizer step to the ranks: the same rows on any number of processes.

Accelerate deals whole micro-batches, and fills an epoch's last ones with rows from its beginning:
what a step consists of then depends on who computes it. Here a step's rows are given by the run
(`Course`), and the last step of an epoch has what is left, each row once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from .checkpoint.batch import Batch, Course

IGNORED = -100  # the label of a token that is not trained on, by torch's convention


class StepSampler(BatchSampler):
    """One rank's micro-batches, `accumulation` for each step; an empty one when a rank has no row.

    The order of an epoch is that of Accelerate's seeded sampler: drawn with `seed + epoch`.
    """

    def __init__(
        self, course: Course, batch: Batch, rank: int, seed: int, order: Sampler[int], samples: int
    ) -> None:
        """
        Args:
            course: which rows each step has.
            batch: how the rows of a step are shared out.
            rank: whose micro-batches these are.
            seed: of the epochs' orders.
            order: of single rows; seeded anew for each epoch, if it is random.
            samples: drawn before this attempt.
        """
        self.course, self.batch, self.rank, self.seed = course, batch, rank, seed
        self._order = order
        self._start = course.start(samples)
        self._epoch = self._start[0]

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self.course.steps_per_epoch * self.batch.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self._epoch)
        if hasattr(self._order, "generator"):  # RandomSampler, LengthGroupedSampler
            self._order.generator = generator
        order = list(self._order)
        first, _, shift = self._start
        shift = shift if self._epoch == first else 0
        for step in range(self.course.steps_per_epoch):
            for places in self.course.share(step, shift, self.batch, self.rank):
                yield [order[place] for place in places]


class RowLoader(DataLoader[Any]):
    """A DataLoader whose epochs can be set, as Trainer does."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class Collate:
    """Collates a micro-batch; for an empty one, a row that nothing is learned from.

    (Every rank has to take part in every forward and backward pass: they are collective.)
    """

    def __init__(self, collate: Callable[[Any], Any], filler: Any) -> None:
        self._collate, self._filler = collate, filler

    def __call__(self, rows: Sequence[Any]) -> Any:
        if rows:
            return self._collate(rows)
        batch = self._collate([self._filler])
        for name in ("labels", "shift_labels"):
            if name in batch:
                batch[name] = torch.full_like(batch[name], IGNORED)
        return batch


def step_loader(loader: DataLoader[Any], sampler: StepSampler) -> RowLoader:
    """`loader` (a map-style one) with its rows dealt by `sampler`. Ranks: any, each its own."""
    return RowLoader(
        loader.dataset,
        batch_sampler=sampler,
        collate_fn=Collate(loader.collate_fn, loader.dataset[0]),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )

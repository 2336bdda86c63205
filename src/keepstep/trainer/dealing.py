"""Deals the rows of each optimizer step to the ranks: the same rows on any number of processes.

Accelerate deals whole micro-batches, and fills an epoch's last ones with rows from its beginning:
what a step consists of then depends on who computes it. Here a step's rows are given by the run
(`Course`), and the last step of an epoch has what is left, each row once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length
from trl.trainer.utils import RepeatSampler

from keepstep.policy.batch import Batch, Course, Dealt
from keepstep.policy.manifest import Manifest
from keepstep.sharding.sources import ReshardError
from keepstep.trainer.workers import WithoutSignals, workers_of

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
            for places in self.course.share(step, shift, self.batch, self.rank):
                yield [order[place] for place in places]


class RowLoader(DataLoader[Any]):
    """A DataLoader whose epochs can be set, as Trainer does."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class Fetched:
    """An iterator that tells of each batch that it has got."""

    def __init__(self, batches: Iterator[Any], tell: Callable[[], None]) -> None:
        self._batches, self._tell = batches, tell

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._tell()
        return batch


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
            return self._collate(rows)
        # A copy: TRL's collator of images (1.16) changes the rows that it is given.
        filler = dict(self._filler) if isinstance(self._filler, Mapping) else self._filler
        batch = self._collate([filler])
        for name in ("labels", "shift_labels"):
            if self._sums_labels and name in batch and not batch[name].is_floating_point():
                batch[name] = torch.full_like(batch[name], IGNORED)
        return batch


@dataclass(frozen=True)
class RowPlan:
    """Which rows the steps of an attempt have, and where in the data it goes on.

    Attributes:
        course: the rows of each step; None where the Trainer deals them: streams, and batches that
            are balanced by length.
        batch: how the rows of a step are shared out.
        seed: of the epochs' orders.
        step: that the attempt starts at.
        samples: rows drawn before it.
        streamed: whether the data is a stream: its length is not known.
        passes, done: of a stream: passes that were over, and steps of the next one that were done.
    """

    course: Course | None
    batch: Batch
    seed: int
    step: int
    samples: int
    streamed: bool = False
    passes: int = 0
    done: int = 0

    @property
    def lead(self) -> int:
        """Steps of today's size that the rows drawn would have made, less those that they made:
        0, unless the rows a step were changed on the way (`allow_batch_change`)."""
        if self.course is None:
            return 0
        epoch, done, _ = self.course.start(self.samples)
        return epoch * self.course.steps_per_epoch + done - self.step

    def samples_at(self, step: int) -> int:
        """Rows drawn since the start of the run, once `step` is done."""
        if self.course is None:
            return self.samples + (step - self.step) * self.batch.rows
        return self.course.after(self.samples, step - self.step)

    def shares(self, step: int) -> tuple[int, dict[int, Sequence[range]]]:
        """The epoch of a step, counted from 1, and each rank's places in its order, micro-batch by
        micro-batch. Only where rows are dealt by a course."""
        assert self.course is not None
        epoch, done, shift = self.course.start(self.samples_at(step - 1))
        ranks = range(self.batch.world_size)
        return epoch, {rank: self.course.share(done, shift, self.batch, rank) for rank in ranks}

    def weights(self, step: int, rank: int) -> list[float]:
        """What the losses of a rank's micro-batches count for, after `step` steps: see
        `Course.weights`. Empty: all the same."""
        if self.course is None:
            return []
        _, done, shift = self.course.start(self.samples_at(step))
        return self.course.weights(done, shift, self.batch, rank)

    def dealing(
        self, loader: DataLoader[Any], order: Any, rank: int, sums_labels: bool
    ) -> DataLoader[Any]:
        """A rank's loader: `loader` with the rows dealt by this plan, in the given order.

        Args:
            sums_labels: whether the loss is a sum over labels (see `Collate`).
        """
        if self.course is None:
            return loader
        if isinstance(order, LengthGroupedSampler):
            order.batch_size = self.batch.rows  # it orders by a step's rows, whoever has them
        sampler = StepSampler(self.course, self.batch, rank, self.seed, order, self.samples)
        return step_loader(loader, sampler, sums_labels)


def plan_rows(rows: Any, args: Any, start: Manifest | None, dealer: str | None = None) -> RowPlan:
    """The plan of an attempt.

    Args:
        rows: the training data, as it is trained on (packed, say).
        args: with `CheckpointArguments`.
        start: of the checkpoint that the attempt goes on from.
        dealer: the Trainer that deals the rows itself, None of one that leaves it to this plan.

    Raises:
        ReshardError: the rows of a step cannot be those that they would have been.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    course, step, samples = None, start.global_step if start else 0, None
    streamed = not has_length(rows)
    if dealer is None and not streamed and args.rows_are_dealt:
        course = Course(len(rows), args.batch.rows, args.dataloader_drop_last)
    if start is not None:
        _check_dealer(dealer, Dealt.from_json(start.dealt), args.batch)
        before = Dealt.from_json(start.dealt)
        changed = before is not None and before.batch.rows != args.batch.rows
        if changed and (course is None or args.train_sampling_strategy == "group_by_length"):
            raise ReshardError(
                "streamed rows, rows grouped by length and balanced batches need as many rows a "
                "step as before"
            )
        # A place among other rows means nothing: then, as Trainer does, the steps are counted.
        if before is None or course is None or before.rows == course.rows:
            samples = start.samples
    if samples is None:
        samples = course.after(0, step) if course else step * args.batch.rows
    passes, done = place_in_stream(start, args.batch) if streamed and start else (0, 0)
    return RowPlan(course, args.batch, seed, step, samples, streamed, passes, done)


def _check_dealer(dealer: str | None, before: Dealt | None, batch: Batch) -> None:
    """
    Raises:
        ReshardError: a Trainer that deals the rows itself would deal others.
    """
    if dealer is not None and before is not None and before.batch != batch:
        raise ReshardError(
            f"{dealer} deals the rows of a step itself: {before.batch} then, {batch} now\n"
            "    Hint: as many processes, per_device_train_batch_size and "
            "gradient_accumulation_steps as then"
        )


def place_in_stream(start: Manifest, batch: Batch) -> tuple[int, int]:
    """Where in a stream a checkpoint is: passes that are over, steps of the next that are done.

    Raises:
        ReshardError: that is not known; or `batch` would lay out a pass in other steps: what is
            left at its end is filled up to whole micro-batches.
    """
    before = Dealt.from_json(start.dealt)
    if before is not None and (before.batch.rows, before.batch.accumulation) != (
        *(batch.rows, batch.accumulation),
    ):
        share, rest = divmod(before.batch.rows, before.batch.accumulation * batch.world_size)
        hint = f"per_device_train_batch_size: {share}, " if not rest else "as many processes, "
        raise ReshardError(
            f"streamed rows are dealt out as before, or not at all: {before.batch} then, {batch} "
            f"now\n    Hint: {hint}gradient_accumulation_steps: {before.batch.accumulation}"
        )
    if before is not None and before.passes is not None and before.done is not None:
        return before.passes, before.done
    if start.epoch > 1:
        raise ReshardError(
            f"checkpoint-{start.global_step} was made in a later pass over a stream, and does not "
            "say where in it\n    Hint: resume_weights_only: true starts anew with its weights."
        )
    return 0, start.global_step


def step_loader(
    loader: DataLoader[Any], sampler: StepSampler, sums_labels: bool = True
) -> RowLoader:
    """`loader` (a map-style one) with its rows dealt by `sampler`. Ranks: any, each its own."""
    return RowLoader(
        loader.dataset,
        batch_sampler=sampler,
        collate_fn=Collate(loader.collate_fn, loader.dataset[0], sums_labels),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )

"""Which rows the steps of an attempt have, and where in the data it goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from keepstep.data.stream import BEGINNING, Place, fits, shards_of
from keepstep.policy.batch import Batch, Course, Dealt, weights_of
from keepstep.policy.manifest import Manifest
from keepstep.policy.rewind import Rewind, left_out
from keepstep.sharding.sources import ReshardError
from keepstep.trainer.dealing import StepSampler, step_loader

WORKERS = "dataloader_num_workers"


@dataclass(frozen=True)
class RowPlan:
    """Which rows the steps of an attempt have, and where in the data it goes on.

    Attributes:
        course: the rows of each step; None of a stream, and where the Trainer deals them: batches
            that are balanced by length.
        batch: how the rows of a step are shared out.
        seed: of the epochs' orders.
        step: that the attempt starts at.
        samples: rows drawn before it.
        streamed: whether the data is a stream: its length is not known.
        passes: of a stream: that were over.
        place: of a stream: in the next one.
        own: whether the run deals a stream's rows; else the Trainer does, as it did when the
            checkpoint was made.
        told: what there is to say of it.
        skipped: rows that are not dealt any more.
    """

    course: Course | None
    batch: Batch
    seed: int
    step: int
    samples: int
    streamed: bool = False
    passes: int = 0
    place: Place = BEGINNING
    own: bool = False
    told: str = ""
    skipped: frozenset[int] = frozenset()

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

    def rows(self, step: int, order_of: Callable[[int], Sequence[int]]) -> list[int]:
        """The rows of the step that follows `step` steps, as they are dealt: positions in the
        training set. Only where rows are dealt by a course.

        Args:
            order_of: epoch → its rows, in order.
        """
        assert self.course is not None
        epoch, done, shift = self.course.start(self.samples_at(step))
        places, order = self.course.places(done, shift), order_of(epoch)
        return [order[place] for place in places if order[place] not in self.skipped]

    def weights(
        self, step: int, rank: int, order_of: Callable[[int], Sequence[int]] | None = None
    ) -> list[float]:
        """What the losses of a rank's micro-batches count for, after `step` steps: see
        `weights_of`. Empty: all the same.

        Args:
            order_of: as of `rows`; needed where rows are left out.
        """
        if self.course is None:
            return []
        if self.skipped and order_of is not None:
            return weights_of(self.rows(step, order_of), self.batch, rank)
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
        sampler = StepSampler(
            *(self.course, self.batch, rank, self.seed, order, self.samples, self.skipped)
        )
        return step_loader(loader, sampler, sums_labels)


def plan_rows(
    rows: Any,
    args: Any,
    start: Manifest | None,
    dealer: str | None = None,
    rewinds: Sequence[Rewind] = (),
    dataset: str | None = None,
) -> RowPlan:
    """The plan of an attempt.

    Args:
        rows: the training data, as it is trained on (packed, say).
        args: with `CheckpointArguments`.
        start: of the checkpoint that the attempt goes on from.
        dealer: the Trainer that deals the rows itself, None of one that leaves it to this plan.
        rewinds: that were decided on since `start` was made: their rows are left out.
        dataset: the fingerprint of the data.

    Raises:
        ReshardError: the rows of a step cannot be those that they would have been.
    """
    course, step, samples = None, start.global_step if start else 0, None
    before = Dealt.from_json(start.dealt) if start else None
    streamed = not has_length(rows)
    own = streamed and dealer is None and (start is None or is_own_stream(before))
    if dealer is None and not streamed and args.rows_are_dealt:
        course = Course(len(rows), args.batch.rows, args.dataloader_drop_last)
    if start is not None:
        _check_dealer(dealer, before, args.batch)
        changed = before is not None and before.batch.rows != args.batch.rows
        fixed = course is None or args.train_sampling_strategy == "group_by_length"
        if changed and fixed and not own:
            raise ReshardError(
                "rows grouped by length, balanced batches, and streams that the Trainer deals need "
                "as many rows a step as before"
            )
        # A place among other rows means nothing: then, as Trainer does, the steps are counted.
        if before is None or course is None or before.rows == course.rows:
            samples = start.samples
    if samples is None:
        samples = course.after(0, step) if course else step * args.batch.rows
    skipped: frozenset[int] = frozenset()
    if course is not None:
        same = start is not None and start.settings.get("dataset") == dataset
        skipped = left_out(before, rewinds, course.rows, dataset, same)
    plan = RowPlan(
        course, args.batch, args.rows_seed, step, samples, streamed, own=own, skipped=skipped
    )
    if not skipped and (rewinds or (before is not None and before.skipped)):
        told = "rows that an earlier attempt has left out are dealt again: the data is another"
        plan = replace(plan, told=told)
    if own and before is not None:
        return replace(plan, **own_place(rows, before, args.allow_drift))
    if streamed and start is not None:
        passes, done = place_in_stream(start, args)
        told = f"{start.global_step} steps of this stream are read again: the run is an earlier "
        told += "version's, and the Trainer goes on dealing its rows"
        told = told if dealer is None else ""
        return replace(plan, passes=passes, place=Place(done), told=told)
    return plan


def is_own_stream(before: Dealt | None) -> bool:
    """Whether the run dealt this stream's rows, and said where it was."""
    return before is not None and None not in (before.passes, before.done, before.drawn)


def own_place(rows: Any, before: Dealt, allow_drift: Collection[str]) -> dict[str, Any]:
    """Where in a stream a checkpoint is, as fields of a plan.

    Raises:
        ReshardError: the stream has other files.
    """
    shards = shards_of(rows)
    if before.shards != shards and "stream" not in allow_drift:
        raise ReshardError(
            f"the stream's number of files (or parts) is {shards} now, and was {before.shards}: "
            "which rows come next is not known\n    Hint: the same files; or allow_drift: stream "
            "goes on at the place that it has noted"
        )
    place, told = Place(before.done or 0, before.drawn or 0, before.place), ""
    if place.state and not fits(rows, place.state):
        place = replace(place, state="")
        told = "the stream is made in other steps than before"
    elif not place.state and place.drawn:
        told = "this stream cannot tell where it is"
    if told:
        told += f": its {place.drawn:,} rows are read again"
    return {"passes": before.passes, "place": place, "told": told}


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


def place_in_stream(start: Manifest, args: Any) -> tuple[int, int]:
    """Where in a stream that the Trainer deals a checkpoint is: passes that are over, steps of the
    next that are done.

    Raises:
        ReshardError: that is not known; or `args` would lay out a pass in other steps: what is left
            at its end is filled up to whole micro-batches, and each worker reads a part.
    """
    before, batch = Dealt.from_json(start.dealt), args.batch
    workers = start.settings.get(WORKERS, args.dataloader_num_workers)
    if workers != args.dataloader_num_workers:
        raise ReshardError(
            f"each worker reads a part of this stream, and there were {workers}\n"
            f"    Hint: {WORKERS}: {workers}"
        )
    if before is not None and (before.batch.rows, before.batch.accumulation) != (
        *(batch.rows, batch.accumulation),
    ):
        share, rest = divmod(before.batch.rows, before.batch.accumulation * batch.world_size)
        hint = f"per_device_train_batch_size: {share}, " if not rest else "as many processes, "
        raise ReshardError(
            f"the Trainer deals the rows of this stream as before, or not at all: {before.batch} "
            f"then, {batch} now\n"
            f"    Hint: {hint}gradient_accumulation_steps: {before.batch.accumulation}"
        )
    if before is not None and before.passes is not None and before.done is not None:
        return before.passes, before.done
    if start.epoch > 1:
        raise ReshardError(
            f"checkpoint-{start.global_step} was made in a later pass over a stream, and does not "
            "say where in it\n    Hint: resume_weights_only: true starts anew with its weights."
        )
    return 0, start.global_step

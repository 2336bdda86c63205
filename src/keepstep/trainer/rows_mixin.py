"""Which rows a step has, and where a run goes on: whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer

from keepstep.data.stream import BEGINNING, shards_of
from keepstep.data.stream_steps import exact
from keepstep.policy.batch import Course, Dealt, share_of
from keepstep.policy.manifest import Manifest
from keepstep.policy.rewind import Rewind
from keepstep.ranks import collectives
from keepstep.trainer.dealing import Fetched, settle_loader, tell_epoch
from keepstep.trainer.row_plan import RowPlan, plan_rows
from keepstep.trainer.streaming import FromStream, StreamRows, stream_loader


class RowsMixin(Trainer):
    """Deals the rows of each step by a `RowPlan` (`self.rows`), and goes on where it says.

    Overridden (transformers 5.18 to 5.24): `get_train_dataloader`, `get_eval_dataloader`,
    `get_batch_samples`, `set_initial_training_values`, `_init_training_state`, `_run_epoch`;
    `training_step` and `compute_loss`: a step's loss is the mean over its rows.
    """

    _weights: Iterator[float] = iter(())  # of the micro-batches of this step that are to come
    _weight = 1.0  # of the one that is computed
    _order: Callable[[int], list[int]] | None = None  # epoch → its rows, as they are dealt
    _place = BEGINNING  # in a stream, behind the step that is computed
    _step_rows = 0  # of it
    _streamed_rows = 0  # of all steps of this attempt
    is_without_rows = False  # all rows of the step that is computed are left out

    def get_train_dataloader(self) -> Any:
        loader, order = super().get_train_dataloader(), self._get_train_sampler()
        settle_loader(loader, self.rows.seed)
        if self.rows.own:
            plan, last = self.rows, self.args.dataloader_drop_last
            rows = StreamRows(
                *(exact(self.train_dataset), plan.batch, self.row_rank, last),
                *(plan.passes, plan.place),
            )
            return stream_loader(loader, rows, self._sums_labels)
        dealt = self.rows.dealing(loader, order, self.row_rank, self._sums_labels)
        self._order = getattr(dealt.batch_sampler, "order_of", None) if self.rows.course else None
        return dealt

    @property
    def row_rank(self) -> int:
        """Which of those that are given rows: processes that share sequences are one."""
        return collectives.rank() // int(self.args.sequence_size)

    def rows_of(self, step: int, cells: Mapping[int, Sequence[int]] | None) -> list[int]:
        """Positions in the training set of the rows of a step (counted from 1) that this attempt
        has made; empty where they are not dealt here. Ranks: any; the same everywhere.

        Args:
            cells: rank → which of its micro-batches; None: all of them.
        """
        if self._order is None:
            return []
        rows = self.rows.rows(step - 1, self._order)
        if cells is None:
            return sorted(rows)
        size, turns = int(self.args.sequence_size), dict[int, set[int]]()
        for rank, of in cells.items():  # those that share rows may each tell of them
            turns.setdefault(rank // size, set()).update(of)
        shares = {number: share_of(rows, self.rows.batch, number) for number in turns}
        return sorted(row for n, of in turns.items() for turn in of for row in shares[n][turn])

    @property
    def dealer(self) -> str | None:
        """The Trainer that deals the rows itself; None: they are dealt by `self.rows`."""
        below = type(self).__mro__[type(self).__mro__.index(RowsMixin) + 1 :]
        dealer = next(kind for kind in below if "get_train_dataloader" in vars(kind))
        return None if dealer is Trainer else dealer.__name__

    def plan(
        self, start: Manifest | None, rewinds: Sequence[Rewind] = (), dataset: str | None = None
    ) -> RowPlan:
        """Which rows the steps of an attempt have. Ranks: any; the same everywhere.

        Args:
            start: of the checkpoint that it goes on from; None for the beginning.
            rewinds: that were decided on since.
            dataset: the fingerprint of the data.

        Raises:
            ReshardError: see `plan_rows`.
        """
        rows = exact(self.train_dataset)
        return plan_rows(rows, self.args, start, self.dealer, rewinds, dataset)

    @property
    def _sums_labels(self) -> bool:
        """Whether the loss of a micro-batch is a sum over its labels, divided by their number in
        the whole step; else it is a mean over its rows."""
        return bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        settle_loader(loader, self.rows.seed)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        self._step_rows = 0
        samples = super().get_batch_samples(Fetched(epoch_iterator, self._taken), *args, **kwargs)
        self._streamed_rows += self._step_rows
        self._weights = iter(self._weights_of_step())
        return self._with_items(*samples)

    def _with_items(self, batches: Any, items: Any) -> tuple[Any, Any]:
        """A step without rows has no labels: its loss would be their sum, 0, over none."""
        self.is_without_rows = False
        if self.rows.skipped and self._order is not None:
            self.is_without_rows = not self.rows.rows(self.state.global_step, self._order)
        if items is not None and self.is_without_rows:
            items = torch.ones_like(items) if isinstance(items, torch.Tensor) else 1
        return batches, items

    def _taken(self, batch: Any) -> Any:
        """A micro-batch's inputs. Each is progress: of ranks that wait for each other, one waits
        for its loader."""
        self.every_step.progress()
        if not isinstance(batch, FromStream):
            return batch
        if batch.inputs is None:
            raise StopIteration
        self._place, self._step_rows = batch.place, batch.rows
        return batch.inputs

    def _weights_of_step(self) -> list[float]:
        if not self.rows.own:
            return self.rows.weights(self.state.global_step, self.row_rank, self._order)
        if not self._step_rows:
            return []
        course = Course(self._step_rows, self.rows.batch.rows)
        return course.weights(0, 0, self.rows.batch, self.row_rank)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._weight = next(self._weights, 1.0)
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; of an epoch's last step, which may have another number of rows in each
        micro-batch, so weighted that the mean over these is the mean over the rows."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        summed = self._sums_labels and kwargs.get("num_items_in_batch") is not None
        weight = 1.0 if summed and self._weight else self._weight  # without rows: 0 in any case
        return loss if weight == 1.0 or not self.model.training else loss * weight

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        epochs, per_epoch, *others, max_steps = super().set_initial_training_values(
            args, dataloader
        )
        lead = self.rows.lead
        if lead:
            max_steps -= 0 if args.max_steps > 0 else lead
            epochs = math.ceil((max_steps + lead) / per_epoch)
        return epochs, per_epoch, *others, max_steps

    def _init_training_state(self, max_steps: int, per_epoch: int, *args: Any) -> Any:
        epochs, batches = super()._init_training_state(max_steps, per_epoch, *args)
        if self.rows.lead:
            epochs, steps = divmod(self.state.global_step + self.rows.lead, per_epoch)
            batches = steps * self.args.gradient_accumulation_steps
        if self.rows.streamed:
            epochs = self.rows.passes
            batches = self.rows.place.done * self.args.gradient_accumulation_steps
        return epochs, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        done = self.rows.place.done if kwargs["epoch"] == self.rows.passes else 0
        self._pass = kwargs["epoch"], self.state.global_step - done
        self._place = self.rows.place if kwargs["epoch"] == self.rows.passes else BEGINNING
        tell_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def planned_steps(self) -> int:
        """How many optimizer steps the whole run has. Ranks: all."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def samples(self) -> int:
        """Rows drawn since the start of the run. Ranks: any; the same everywhere."""
        if self.rows.own:
            return self.rows.samples + self._streamed_rows
        return self.rows.samples_at(self.state.global_step)

    def dealt(self) -> Dealt:
        """How the rows of the steps have been shared out so far. Ranks: any."""
        course, batch = self.rows.course, self.args.batch
        if not self.rows.streamed:
            rows, skipped = course.rows if course else None, tuple(sorted(self.rows.skipped))
            return Dealt(batch, self.asked, rows, skipped=skipped)
        passes, began = self._pass
        dealt = Dealt(batch, self.asked, None, passes, self.state.global_step - began)
        if not self.rows.own:
            return dealt
        place, shards = self._place, shards_of(self.train_dataset)
        return replace(dealt, drawn=place.drawn, place=place.state, shards=shards)

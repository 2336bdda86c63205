"""Which rows a step has, and where a run goes on: whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import Trainer

from keepstep.policy.batch import Dealt
from keepstep.policy.manifest import Manifest
from keepstep.ranks import collectives
from keepstep.trainer.dealing import Fetched, RowPlan, plan_rows, settle_loader, tell_epoch


class RowsMixin(Trainer):
    """Deals the rows of each step by a `RowPlan` (`self.rows`), and goes on where it says.

    Overridden (transformers 5.18 to 5.24): `get_train_dataloader`, `get_eval_dataloader`,
    `get_batch_samples`, `set_initial_training_values`, `_init_training_state`, `_run_epoch`;
    `training_step` and `compute_loss`: a step's loss is the mean over its rows.
    """

    _weights: Iterator[float] = iter(())  # of the micro-batches of this step that are to come
    _weight = 1.0  # of the one that is computed
    _order: Callable[[int], list[int]] | None = None  # epoch → its rows, as they are dealt

    def get_train_dataloader(self) -> Any:
        loader, order = super().get_train_dataloader(), self._get_train_sampler()
        settle_loader(loader, self.rows.seed)
        dealt = self.rows.dealing(loader, order, collectives.rank(), self._sums_labels)
        self._order = getattr(dealt.batch_sampler, "order_of", None) if self.rows.course else None
        return dealt

    def rows_of(self, step: int, cells: Mapping[int, Sequence[int]] | None) -> list[int]:
        """Positions in the training set of the rows of a step (counted from 1) that this attempt
        has made; empty where they are not dealt here. Ranks: any; the same everywhere.

        Args:
            cells: rank → which of its micro-batches; None: all of them.
        """
        if self._order is None:
            return []
        epoch, shares = self.rows.shares(step)
        chosen = shares if cells is None else {r: [shares[r][m] for m in cells[r]] for r in cells}
        order = self._order(epoch)
        return sorted(order[place] for of in chosen.values() for share in of for place in share)

    def plan(self, start: Manifest | None) -> RowPlan:
        """Which rows the steps of an attempt have. Ranks: any; the same everywhere.

        Args:
            start: of the checkpoint that it goes on from; None for the beginning.

        Raises:
            ReshardError: see `plan_rows`.
        """
        below = type(self).__mro__[type(self).__mro__.index(RowsMixin) + 1 :]
        dealer = next(kind for kind in below if "get_train_dataloader" in vars(kind))
        own = None if dealer is Trainer else dealer.__name__
        return plan_rows(self.train_dataset, self.args, start, own)

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
        """Each batch is progress: of ranks that wait for each other, one waits for its loader."""
        fetched = Fetched(epoch_iterator, self.every_step.progress)
        self._weights = iter(self.rows.weights(self.state.global_step, collectives.rank()))
        return super().get_batch_samples(fetched, *args, **kwargs)

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
            batches = self.rows.done * self.args.gradient_accumulation_steps
        return epochs, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        done = self.rows.done if kwargs["epoch"] == self.rows.passes else 0
        self._pass = kwargs["epoch"], self.state.global_step - done
        tell_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def planned_steps(self) -> int:
        """How many optimizer steps the whole run has. Ranks: all."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def dealt(self) -> Dealt:
        """How the rows of the steps have been shared out so far. Ranks: any."""
        if self.rows.streamed:
            passes, began = self._pass
            done = self.state.global_step - began
            return Dealt(self.args.batch, self.asked, None, passes, done)
        course = self.rows.course
        return Dealt(self.args.batch, self.asked, course.rows if course else None)

"""Which rows a step has, and where a run goes on: whatever the number of processes."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer

from keepstep.policy.batch import Dealt
from keepstep.ranks import collectives
from keepstep.trainer.dealing import Fetched, settle_loader, tell_epoch


class RowsMixin(Trainer):
    """Deals the rows of each step by a `RowPlan` (`self.rows`), and goes on where it says.

    Overridden (transformers 5.17 to 5.23): `get_train_dataloader`, `get_eval_dataloader`,
    `get_batch_samples`, `set_initial_training_values`, `_init_training_state`, `_run_epoch`.
    """

    def get_train_dataloader(self) -> Any:
        loader, order = super().get_train_dataloader(), self._get_train_sampler()
        settle_loader(loader, self.rows.seed)
        return self.rows.dealing(loader, order, collectives.rank())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        settle_loader(loader, self.rows.seed)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Each batch is progress: of ranks that wait for each other, one waits for its loader."""
        fetched = Fetched(epoch_iterator, self.every_step.progress)
        return super().get_batch_samples(fetched, *args, **kwargs)

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

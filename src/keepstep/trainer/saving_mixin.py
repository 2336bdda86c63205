"""A trainer's saves are a `CheckpointManager`'s: committed whole, or not there."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer

from keepstep.errors import KeepstepError
from keepstep.output.printable import quoted
from keepstep.policy.schedule import saves_at
from keepstep.ranks import collectives
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.writer import Saved
from keepstep.trainer.state import tokenizer_of

logger = logging.getLogger(__name__)


class SavingMixin(Trainer):
    """Saves through `self.saving`, and waits for the last one before training is over.

    Overridden (transformers 5.18 to 5.24):
    - `_save_checkpoint`: Trainer writes straight into `checkpoint-N`, and rotates by age.
    - `_save`: Trainer stores its arguments, absolute paths and Hub token included, every time.
    - `_prepare_for_training`: a save is rehearsed before the first step.
    - `store_flos`: Trainer adds them up over the devices, and waits for those.
    - `_finalize_training`: the last save has to arrive before the best is chosen.
    """

    control: Any
    current_flos: Any

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._prepare_saves()
        return prepared

    def _prepare_saves(self) -> None:
        """Decide how saves are made, and set their memory aside. Ranks: all (collective)."""
        saver, optimizer = self.manager.saver, self.contents.optimizer()
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *arguments: saver.hold())
        (not_lazy,) = collectives.any_of(not self.contents.may_be_lazy())
        if saver.mode == "lazy" and not_lazy:
            saver.mode = "snapshot"
        self.contents.rehearse()
        if saver.mode == "off" or not self.saves_on_its_way():
            return
        reason = saver.reserve(self.contents.snapshot_bytes())
        if reason is not None and collectives.is_main():
            logger.warning("%s: checkpoints are written in the foreground.", reason)

    def store_flos(self) -> None:
        """Operations that were counted since, on all ranks. Ranks: all (collective)."""
        self.state.total_flos += collectives.total(float(self.current_flos))
        self.current_flos = 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.manager.time_sheet.within("save"):
            self.saving.begin()

    def tell_committed(self, checkpoint: Checkpoint) -> None:
        """Call `on_checkpoint_committed` of every callback that has one. Ranks: all; each its own
        callbacks, at the same step."""
        for callback in self.callback_handler.callbacks:
            told = getattr(callback, "on_checkpoint_committed", None)
            if told is not None:
                control = told(self.args, self.state, self.control, checkpoint=checkpoint)
                self.control = self.control if control is None else control

    def hear(self) -> None:
        """Wait for the save in flight, and for what came of it. Ranks: all (collective)."""
        with self.manager.time_sheet.within("save"):
            self.saving.hear()

    @property
    def last_saved(self) -> Saved | None:
        """The newest commit of this attempt, None before the first."""
        return self.saving.last_saved

    @property
    def try_again(self) -> bool:
        """Whether a save found no room or its name taken, and can be made now."""
        taken = self.saving.taken
        return self.saving.try_again or (taken is not None and taken < self.state.global_step)

    def saved_step(self) -> int | None:
        """The step of this attempt's newest commit, or that it starts at and has not left; None
        before the first commit."""
        if self.last_saved is None and self.start and self.start.step == self.state.global_step:
            return self.start.step
        return self.last_saved.checkpoint.step if self.last_saved else None

    def saves_at(self, step: int, planned: int) -> bool:
        """Whether the recipe has this last step saved, whatever the clock says. Ranks: any."""
        return saves_at(step, planned, self.args.save_strategy, self.args.save_steps)

    def saves_on_its_way(self) -> bool:
        """Whether the recipe has anything saved while training goes on: a stop's or a request's
        save is worth a pause, but no memory that lies idle until then. Ranks: any."""
        args = self.args
        return bool(args.save_strategy != "no" or args.save_interval_seconds)

    def stores_weights(self) -> bool:
        """Whether this step's checkpoint gets a weights file. Without shards it is the state."""
        wanted, args = self.args.save_weights, self.args
        if wanted == "every" or args.zero_stage == 0 or args.save_only_model:
            return True
        return bool(wanted == "best" and self.state.best_global_step == self.state.global_step)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the stock one pushes the newest weights, and the run folder around them.

        Raises:
            KeepstepError: always; with what publishes the best checkpoint.
        """
        raise KeepstepError(
            "trainer.push_to_hub() would push the newest weights, not the best, and with them the "
            "run's own files\n"
            f"    Hint: keepstep push {quoted(self.manager.run.path)} --repo_id owner/name; or "
            "push_to_hub=True in the config, and the run publishes its best checkpoint",
            path=self.manager.run.path,
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.every_step.progress("end")
        with self.manager.time_sheet.within("save"):
            self.saving.finish()
        finished = self.preempted is None and self.saving.complete
        best = self.manager.best() if finished else None
        self.state.best_model_checkpoint = str(best.path) if best else None
        return super()._finalize_training(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, configuration and tokenizer in Hugging Face layout; no training_args.bin."""
        if not self.args.should_save:
            return

        if self.contents.gathering is None:
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            tokenizer = tokenizer_of(self)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
        else:
            self.contents.store_gathered(state_dict)

"""Training goes on where a checkpoint was made: its whole state, whichever processes wrote it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, set_seed

from keepstep.policy.evaluations import best_of
from keepstep.ranks import collectives
from keepstep.ranks.console import waiting
from keepstep.ranks.start_up import own_start
from keepstep.recipe.problems import ConfigError, Problem, refused_by_libraries
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.listed import only_listed
from keepstep.sharding.muon import import_muon
from keepstep.sharding.reshard import rng_seed
from keepstep.trainer.restore import random_numbers, restore, set_random_numbers, settle_gradients
from keepstep.trainer.weights import load_renamed

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def types_kept(model: Any) -> Iterator[None]:
    """peft casts what it loads to fp32 (0.21), also where TRL had made the adapter bf16 (QLoRA):
    the run would go on with other sums than before. Ranks: any."""
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != types[name]:
            parameter.data = parameter.data.to(types[name])


class ResumeMixin(Trainer):
    """Gives the state of `self.start` back, before the first step; the best one's, after the last.

    Overridden (transformers 5.18 to 5.24):
    - `_prepare_for_training`: DeepSpeed saves and loads through keepstep's checkpoint engine, and
      what other processes wrote is given to these.
    - `_load_from_checkpoint`, `_load_rng_state`: see there; `_load_best_model`: likewise.
    - `_init_training_state`: intervals are the recipe's; the best value is of today's metric.
    - `_load_callback_state`: callbacks go on counting, with the recipe's arguments.
    - `create_scheduler`: some schedules ask DeepSpeed's optimizers for what they do not have.
    """

    _random_numbers: list[Any] | None

    def _init_training_state(self, max_steps: int, per_epoch: int, *args: Any) -> Any:
        found = super()._init_training_state(max_steps, per_epoch, *args)
        # Loaded from trainer_state.json are the intervals of the attempt that wrote it.
        self.state.compute_steps(self.args, max_steps)
        if self.start is not None:
            self._settle_best()
        return found

    def _load_callback_state(self) -> None:
        """Give each callback of this attempt what its predecessor had counted. Its arguments are
        the recipe's (Trainer builds it anew with those of the checkpoint), and `control` is what
        the loop makes it, not what it was in the middle of a step."""
        if not self.args.restore_callback_states_from_checkpoint:
            return
        for name, stored in self.state.stateful_callbacks.items():
            alike = [c for c in self.callback_handler.callbacks if type(c).__name__ == name]
            states = stored if isinstance(stored, list) else [stored]
            for callback, state in zip(alike, states, strict=False):
                vars(callback).update(state.get("attributes", {}))

    def _settle_best(self) -> None:
        """The best value so far is one of the metric that ranks now, in its direction: if it is not
        the checkpoint's, early stopping counts anew. Ranks: any; the same everywhere."""
        policy, handler = self.manager.policy, self.callback_handler
        if policy.metric is None:
            return
        best = best_of(self.state.log_history, policy.metric, policy.greater_is_better)
        value, step = best or (None, None)
        if self.state.best_metric == value:
            return
        self.state.best_metric, self.state.best_global_step = value, step
        for callback in handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0
        if collectives.is_main():
            found = f"the best so far is {value:.6g}, of step {step}" if best else "none so far"
            logger.warning("%s ranks from here on, another did before: %s", policy.metric, found)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_numbers is not None:  # the checkpoint may be being saved again by now
            set_random_numbers(self._random_numbers)
            return
        world_size = self.args.world_size
        file = "rng_state.pth" if world_size == 1 else f"rng_state_{collectives.rank()}.pth"
        manifest = self.start.manifest if self.start else None
        set_seed(rng_seed(self.args.seed, self.state.global_step, collectives.rank()))
        if manifest and manifest.world_size == world_size and file in manifest.files:
            super()._load_rng_state(checkpoint)
        self._random_numbers = random_numbers()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.start is None or self.start.manifest.zero_stage == 0:
            target = self.model if model is None else model
            with types_kept(target):
                if not load_renamed(target, Path(resume_from_checkpoint)):
                    super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Else `restore` takes the weights, too, from DeepSpeed's shards.

    def load_weights_as_stock(self, checkpoint: str) -> None:
        """Whole weights, loaded as the Trainer itself loads them. Ranks: any, each for itself."""
        with types_kept(self.model):
            if not load_renamed(self.model, Path(checkpoint)):
                super()._load_from_checkpoint(checkpoint)

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """Begin with a checkpoint's weights alone. Ranks: all, each for itself.

        Raises:
            ConfigError: the model is shared out among the ranks already.
        """
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ConfigError(
                [
                    Problem(
                        "resume_weights_only: under ZeRO-3 the model is shared out by now",
                        f"model={str(checkpoint.path)!r}, and leave resume_weights_only out",
                        "weights-only",
                    )
                ]
            )
        self.load_weights_as_stock(str(checkpoint.path))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if self.is_deepspeed_enabled:
            import_muon()
        with refused_by_libraries():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        own_start.ended("engine")
        self.contents.attach()
        if self.start is not None:
            assert self._seen is not None  # since train()
            with self.manager.time_sheet.within("restore"):
                with waiting(f"loading {self.start.path.name} …"):
                    self.resharded = restore(self, self._seen)
                self._take_up_counts(self.start.manifest.about)
                settle_gradients(self, train_dataloader)
            self.manager.time_sheet.step_ended(self.start.step)
            own_start.ended("restore")
        if self.resharded is not None:
            self.manager.time_sheet.move(self.resharded.seconds, "restore", "reshard")
            facts = self.resharded.as_json()
            self.manager.saver.on_main(
                "recording", lambda writer: writer.record("reshard", **facts)
            )
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # Some schedules ask for `defaults["lr"]`, which DeepSpeed's own optimizers do not have.
        sharded, own = getattr(self.optimizer, "optimizer", None), self.contents.optimizer()
        if sharded is not None and own is not None and not hasattr(sharded, "defaults"):
            sharded.defaults = own.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_best_model(self) -> None:
        best = self.manager.best_to_load()
        if best is None:
            return
        with only_listed(best) as shown:
            if self.is_deepspeed_enabled:
                restore(self, shown)  # it may be other processes that wrote it
            else:
                self.state.best_model_checkpoint = str(shown.path)
                with types_kept(self.model):
                    if not load_renamed(self.model, shown.path):
                        super()._load_best_model()
        self.state.best_model_checkpoint = str(best.path)

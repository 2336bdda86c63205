"""Evaluations of checkpoints that are there, as the run itself would have made them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from keepstep.policy.completeness import missing_state
from keepstep.policy.manifest import finite_metrics
from keepstep.policy.samples import Sample
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.listed import only_listed
from keepstep.trainer.reporter import tell_samples
from keepstep.trainer.restore import restore
from keepstep.trainer.sft import KeepstepTrainer


class Evaluator(KeepstepTrainer):
    """Trains nothing, and claims no run folder: the model and its engine are built as for training,
    given the state of one checkpoint after the other, and evaluated.

    Built so, weights have the numbers, and passes the precision, that they have in the run, under
    every strategy; a checkpoint of other processes is resharded as for a resume. It takes as much
    memory as training.

    Overridden beside (transformers 5.18 to 5.24): `_inner_training_loop`; callbacks are gone: no
    tracker hears of it, and nobody is asked for a save.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for callback in list(self.callback_handler.callbacks):
            if not isinstance(callback, DefaultFlowCallback):
                self.remove_callback(callback)
        self.add_callback(_Progress(self))
        self._wanted: Sequence[Checkpoint] = ()
        self._names: Collection[str] | None = None
        self._tell: Callable[[Checkpoint, dict[str, float]], None] = lambda checkpoint, metrics: (
            None
        )

    def evaluate_all(
        self,
        checkpoints: Sequence[Checkpoint],
        tell: Callable[[Checkpoint, dict[str, float]], None],
        names: Collection[str] | None = None,
    ) -> None:
        """Evaluate each of them, and tell of it before the next one. Ranks: all (collective).

        Args:
            names: one that has these metrics, and what a user's function gives, is passed over;
                None: none is.

        Raises:
            ReshardError: on every rank: the state of one cannot be given to these processes.
        """
        self._wanted, self._tell, self._names = checkpoints, tell, names
        self.take_kernels(checkpoints[0].manifest.settings)  # one run's are all the same
        Trainer.train(self)  # all that it does to a model before its loop; an attempt does more

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> None:
        loader = self.get_train_dataloader()
        steps = self.set_initial_training_values(self.args, loader)[-1]
        self._prepare_for_training(steps, loader, None)
        wanted = [checkpoint for checkpoint in self._wanted if self._lacks_some(checkpoint)]
        if not wanted:
            names = ", ".join(sorted({*(self._names or ()), *self.own_names}))
            say(f"every checkpoint has {names} already: nothing is evaluated")
        for checkpoint in wanted:
            self.every_step.progress("start")
            if not collectives.on_main("looking for it", checkpoint.path.is_dir):
                say(f"{checkpoint.path.name}: the run has pruned it meanwhile")
                continue
            with only_listed(checkpoint) as shown:
                self._take_state(shown)
            self.state.global_step, self.state.epoch = checkpoint.step, checkpoint.manifest.epoch
            self._take_up_counts(checkpoint.manifest.about)
            self._tell(checkpoint, finite_metrics(self.evaluate()))

    def _lacks_some(self, checkpoint: Checkpoint) -> bool:
        if self._names is None:
            return True
        return not {*self._names, *self.own_names} <= checkpoint.metrics.keys()

    def _take_state(self, checkpoint: Checkpoint) -> None:
        sharded = checkpoint.manifest.parallel_layout.is_sharded
        if self.is_deepspeed_enabled or (sharded and not missing_state(checkpoint.manifest)):
            restore(self, checkpoint)
        else:
            self.load_weights_as_stock(str(checkpoint.path))

    def _prepare_saves(self) -> None:
        """There will be none."""

    def keep_samples(self, samples: Sequence[Sample]) -> None:
        """Nothing is written into a run that may be at work: they are shown."""
        tell_samples(self, samples)

    def check_ranked(self, given: Collection[str]) -> None:
        """Nothing is ranked here: sets and metrics may be others than the run's."""


class _Progress(TrainerCallback):
    """Tells the watchdog of each batch."""

    def __init__(self, trainer: Evaluator) -> None:
        self.trainer = trainer

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.every_step.progress("evaluation")

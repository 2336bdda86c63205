"""A trainer's `train()` is one attempt: begun, chosen for, trained, and told of."""

from __future__ import annotations

import atexit
import math
from collections.abc import Mapping
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from keepstep.policy.batch import Batch
from keepstep.policy.kernels import ATTENTION, Kernels
from keepstep.policy.selection import SelectionError
from keepstep.preflight.agreement import agree, differing
from keepstep.preflight.saving import check_meeting
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.ranks.outcome import Outcome, ended
from keepstep.ranks.start_up import own_start
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.listed import only_listed
from keepstep.trainer.attempt import CurrentAttempt
from keepstep.trainer.description_mixin import VERSIONS
from keepstep.trainer.given import settings_of
from keepstep.trainer.health import RewindError
from keepstep.trainer.introduction import introduce
from keepstep.trainer.request import check_unchanged, request_of
from keepstep.trainer.row_plan import WORKERS
from keepstep.trainer.stops import StoppedError, stop_if_asked


class AttemptMixin(Trainer):
    """Overridden: `train` (see upstream.py)."""

    attempt: CurrentAttempt
    start: Checkpoint | None
    preempted: str | None

    @property
    def outcome(self) -> Outcome | None:
        """How `train()` ended; None before. Ranks: any; the same but for what publishing adds,
        which the main process knows."""
        return self.attempt.outcome

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the end, or until somebody asks for a stop; carries on by itself.

        Ranks: all (collective).

        Args:
            resume_from_checkpoint: `None` or `True`: what the config's field says (`auto`, unless
                it was set). A word (`auto`, `latest`, `best`, `never`), a step or a path: as that
                field. `False`: `never`.
            *args, **kwargs: of the Trainer's own `train()`.

        Returns:
            The Trainer's own `TrainOutput`: also of an attempt that was asked to stop.

        Raises:
            ValueError: two different checkpoints are asked for, here and in the config; or `args`
                were changed after the trainer was made.
            RuntimeError: this trainer has trained already.
            SelectionError: what is asked for cannot be had; the message lists what there is. Or
                the run is finished and has saved nothing that could be loaded.
            DriftError: settings have changed since the checkpoint was made; it lists them.
            NotOwnerError: another attempt is at work in this run folder.
            SpoiltError: a loss was not finite, or a spike, and the run stops for it; or it goes
                back (`on_nonfinite: rewind`): the same command again goes on from before.
            NoProgressError: all that there is to carry on from has been tried, and failed.
        """
        request = request_of(resume_from_checkpoint, self.attempt.recipe.training)
        if self.attempt.outcome is not None:
            raise RuntimeError(
                "this trainer has trained already, and a state is restored into a new one\n"
                f"    Hint: make a {type(self).__name__} again, with the same arguments: it "
                "carries on"
            )
        check_unchanged(self._args_as_made, self.args)
        if self._is_given_attempt:
            return self._attempted(args, kwargs)
        result = None
        atexit.unregister(collectives.leave)
        atexit.register(collectives.leave)  # with a live group, Python's end may be an abort
        try:
            self.attempt.check()
            with self.attempt:
                settings = collectives.on_all(
                    "looking at what is given",
                    lambda: settings_of(self.attempt.recipe, self._given, self),
                )
                agree(differing(settings, VERSIONS))
                self.attempt.begin()
                self.attempt.choose(settings, request)
                own_start.ended("choice")
                result = self._attempted(args, kwargs)
        except StoppedError:  # of which the attempt has told
            pass
        return result or TrainOutput(self.state.global_step, math.nan, {})

    def _attempted(self, args: Any, kwargs: Any) -> Any:
        """What follows once it is known what to carry on from. Ranks: all (collective)."""
        attempt = self.attempt
        assert attempt.choice is not None
        self.every_step.watchdog = attempt.watchdog
        self._take_up()
        stop_if_asked()
        attempt.hub.start(self)
        attempt.mirror.start(self)
        self.manager.begin_training()
        introduce(self, attempt.recipe, attempt.checkpoint, attempt.choice)
        result, attempt.outcome = self._carry_on(args, kwargs)
        return result

    def _take_up(self) -> None:
        """Make this trainer one that goes on from what was chosen. Ranks: all (collective).

        Raises:
            ConfigError: saves and evaluations do not meet, as is known by now.
            DriftError: the model computes in another way than the checkpoint's.
        """
        attempt, asked = self.attempt, self.attempt.recipe.training
        assert attempt.choice is not None
        self.start = attempt.start
        self._share_out(attempt.choice.batch or self.asked)
        if self.start is not None:
            self.args.eval_on_start = False  # this step has been evaluated
        elif attempt.checkpoint is not None and not attempt.weights_taken:
            with only_listed(attempt.checkpoint) as shown:
                self.take_weights(shown)
        manifest = self.start.manifest if self.start else None
        kernels = self.take_kernels(manifest.settings if manifest else None)
        of_data = attempt.settings.get("dataset")
        self.rows = self.plan(manifest, attempt.choice.rewinds, of_data)
        config = getattr(self.model, "config", None)
        computed = {ATTENTION: getattr(config, "_attn_implementation", None)}
        computed |= kernels.settings if kernels else {}
        if self.rows.told:
            say(self.rows.told)
        rows = {"rows_per_step": self.args.batch.rows}
        if self.rows.streamed and not self.rows.own:  # each worker reads a part
            rows[WORKERS] = self.args.dataloader_num_workers
        self.settings = attempt.settings | rows | computed
        self.about = attempt.facts()
        limit = self.manager.policy.limit
        if limit is not None and min(asked.save_steps, asked.eval_steps or 1) < 1:
            # Shares of a number of steps that is known only now.
            agree(list(check_meeting(asked, self.planned_steps())))
        if self.start is not None:
            why = kernels.reasons if kernels else {}
            self.manager.compare(self.start, computed, asked.allow_drift, why)

    def take_kernels(self, began: Mapping[str, Any] | None) -> Kernels | None:
        """Have the model compute as fast as it safely can, and say how; None: as the libraries do.

        Ranks: all (collective).

        Args:
            began: the settings of the checkpoint that this attempt goes on from, if there is one.
        """
        return None

    def _share_out(self, batch: Batch) -> None:
        """Share out the rows of a step in this way: for the Trainer, and for DeepSpeed."""
        self.args.per_device_train_batch_size = batch.per_device
        self.args.gradient_accumulation_steps = batch.accumulation
        self._train_batch_size = self.args.train_batch_size
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        settings = plugin.deepspeed_config if plugin else {}
        for name, value in (
            ("train_micro_batch_size_per_gpu", batch.per_device),
            ("gradient_accumulation_steps", batch.accumulation),
            ("train_batch_size", batch.rows),
        ):
            if isinstance(settings.get(name), int):  # `auto` is filled in by the Trainer
                settings[name] = value

    def _carry_on(self, args: Any, kwargs: Any) -> tuple[Any, Outcome]:
        """Train from the start to the end, if that has not been done. Ranks: all (collective)."""
        planned, finish, start = self.planned_steps(), self.manager.finish, self.start
        plan = {"steps": planned, **self.may_stop_early()}
        finished = finish is not None and finish.holds(plan, self.saves_at(finish.step, planned))
        step = finish.step if finish and finished else start.step if start else 0
        result = None
        if finished or (step >= planned and not self.owes_evaluation):
            of = f" of {planned}" if step <= planned else f", and {planned} are planned now"
            say(f"This run is finished, at step {step}{of}: there is nothing to train.")
            if self._is_given_attempt:
                self.trackers.make_up()
            else:
                result = self._load_end(step, planned, args, kwargs)
        else:
            result = self._train_from_start(args, kwargs)
            self.manager.confirm()
            step = self.state.global_step
        return result or TrainOutput(step, math.nan, {}), self._judged(step, plan)

    def _load_end(self, step: int, planned: int, args: Any, kwargs: Any) -> Any:
        """Make no step, and load what the run has saved: a script goes on with its model. A run
        that stopped early has steps left, which are taken away. Ranks: all (collective)."""
        if self.start is None:
            raise SelectionError(
                f"this run is finished, at step {step}, and has saved nothing: there is no trained "
                "model to load\n    Hint: another output_dir, or resume_from_checkpoint: never, "
                "trains it again",
                path=self.manager.run.path,
            )
        if self.start.step < step:
            say(f"warning: step {step} was not saved: the model is checkpoint-{self.start.step}'s")
        asked = self.args.max_steps
        self.args.max_steps = asked if self.start.step >= planned else self.start.step
        try:
            return self._train_from_start(args, kwargs)
        finally:
            self.args.max_steps = asked

    def _train_from_start(self, args: Any, kwargs: Any) -> Any:
        with self._shown:
            if self.start is not None:
                self._seen = self._shown.enter_context(only_listed(self.start))
            try:
                return super().train(str(self._seen.path) if self._seen else None, *args, **kwargs)
            except RewindError as error:
                error.asked = self.every_step.asked_to_stop()
                raise
            finally:
                self.reporter.close()
                self.attempt.trained_to = self.state.global_step or None

    def _judged(self, step: int, plan: Mapping[str, Any]) -> Outcome:
        """How it ended: finished is only what is saved. Ranks: all (collective)."""
        best = self.manager.best()
        facts: dict[str, Any] = {"global_step": step, "best_step": best.step if best else None}
        stopped, lost = self.preempted, self.manager.fault_of(self.last_saved)
        saved = self.saving.complete if stopped is None else self.saved_step() == step
        if lost is not None or not saved:
            reason = lost or self.saving.reason
            told = reason if stopped is None else f"stopped ({stopped}), and not saved: {reason}"
            return ended("failed", reason=told, **facts)
        if stopped is not None:
            return ended("preempted", reason=stopped, **facts)
        self.manager.record_finish(step, plan)
        return ended("finished", **facts)

    def may_stop_early(self) -> dict[str, Any]:
        """What may end the run before its last planned step, as far as the recipe says it."""
        policy, patience = self.manager.policy, self.args.early_stopping_patience
        ranked = {"metric": policy.metric, "greater_is_better": policy.greater_is_better}
        return {} if patience is None else {"patience": patience, **ranked}

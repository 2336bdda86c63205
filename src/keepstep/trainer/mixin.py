"""`CheckpointMixin`: any transformers Trainer, killed at any moment and carried on.

One mixin for each concern, and what they share:

- `rows_mixin`: which rows a step has;
- `evaluation_mixin`: evaluations that a stop cuts short;
- `resume_mixin`: the state of a checkpoint, given back;
- `saving_mixin`: saves, committed;
- `description_mixin`: what a manifest says of a step.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import TrainOutput

from keepstep.data.rows import Count
from keepstep.policy.batch import Batch
from keepstep.preflight.agreement import agree
from keepstep.preflight.saving import check_meeting
from keepstep.preflight.validate import validate_given
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.ranks.outcome import Outcome, ended
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.listed import only_listed
from keepstep.trainer.attempt import CurrentAttempt, StoppedError, stop_if_asked
from keepstep.trainer.description_mixin import DescriptionMixin
from keepstep.trainer.evaluation_mixin import EvaluationMixin
from keepstep.trainer.given import arguments_of, recipe_of, settings_of
from keepstep.trainer.pacing import EveryStep
from keepstep.trainer.reporter import RunReporter, introduce
from keepstep.trainer.request import request_of
from keepstep.trainer.resharded import Resharded
from keepstep.trainer.resume_mixin import ResumeMixin
from keepstep.trainer.rows_mixin import RowsMixin
from keepstep.trainer.saving import Saving
from keepstep.trainer.saving_mixin import SavingMixin
from keepstep.trainer.state import Contents
from keepstep.trainer.unrestored import check_restorable
from keepstep.trainer.upstream_check import check


class CheckpointMixin(RowsMixin, EvaluationMixin, SavingMixin, DescriptionMixin, ResumeMixin):
    """Any transformers Trainer, killed at any moment and carried on from its newest checkpoint.

    Two lines make one; the mixin comes first, and so do keepstep's fields in its config:

    ```python
    class MyTrainer(CheckpointMixin, DPOTrainer): ...

    @dataclass
    class MyConfig(CheckpointArguments, DPOConfig): ...
    ```

    It is used as the Trainer below it, and a script ends with its exit status:

    ```python
    trainer = MyTrainer(model="…", args=MyConfig(output_dir="runs/x"), train_dataset=rows)
    trainer.train()
    sys.exit(trainer.outcome.exit)
    ```

    The constructor (all ranks) checks the settings, loads what it is given, and touches no run
    folder. `train()` is one attempt; every rank calls it:

    1. (all ranks) From here on SIGTERM, SIGINT, SIGUSR1, SIGUSR2 and SIGHUP ask for a save and a
       stop, and a watchdog ends all ranks when one is dead or stuck.
    2. (main process) It looks whether the run can be saved and published, and claims the run
       folder: two attempts never write into one.
    3. (main process) It chooses the checkpoint to carry on from, compares every byte with its
       manifest, and the settings with those that it was made with. (all ranks) They hear of it.
    4. (all ranks) The rows of a step are shared out as the checkpoint's were, on however many
       processes there are; weights, optimizer, scheduler, loss scaler, random numbers, data
       position and callbacks are restored. There is no way to leave one of these out.
    5. (all ranks) A save is rehearsed, then training goes on. At each step's end the ranks agree on
       whether to save and whether to stop. (each rank) It copies its share to host memory and
       writes it behind training; (main process) it commits, by one rename, and prunes.
    6. (all ranks) When a commit has arrived, `on_checkpoint_committed(args, state, control,
       checkpoint=…)` is called on callbacks that have it. (`on_save` comes when a save begins.)
    7. (all ranks) The last save is waited for. (main process) It publishes the best checkpoint, if
       asked to, and writes down how the attempt ended: `outcome`.

    Attributes:
        outcome: how `train()` ended: finished, preempted, failed or no_progress, with the `exit`
            status that belongs to it; None before.
        manager: its checkpoints; `manager.run` lists them.
        start: the checkpoint whose state training goes on with, None for the beginning.
        asked: how the config shares out the rows of a step; `args.batch` is how it is done.
        settings: what a resume compares.
        about: what the model card says of the run.
        rows: which rows the steps have.
        resharded: what had to be done to give the state of `start` to these processes, or None.
        evaluation_due_at: the newest step with an evaluation, None before the first.
        preempted: why training stopped before its end, None when it did not.
        saving: its saves, and what came of them.
        sources, counts: `training` and `evaluation`: where the rows come from, and what became of
            them when they were made into tokens.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whether the Trainer that is extended, and all else of other libraries, is as known."""
        super().__init_subclass__(**kwargs)
        check(cls, CheckpointMixin)

    def __init__(
        self,
        *args: Any,
        attempt: CurrentAttempt | None = None,
        sources: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            *args, **kwargs: the Trainer's own. `args` is copied: yours stays as it is.
            attempt: one that has been begun already, with what it carries on from chosen; None:
                `train()` makes one.
            sources: `training` and `evaluation`: where the rows come from, for people.

        Raises:
            ConfigError: on every rank: `args` has none of keepstep's fields, or what it asks for
                could not be trained, saved or carried on; every problem at once.
        """
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        asked = arguments_of(given, type(self).__name__)
        self._is_given_attempt = attempt is not None
        if attempt is None:
            recipe = collectives.on_all("checking the settings", lambda: recipe_of(given, asked))
            own_metrics = self._has_metrics_of_its_own(given)
            name = type(self).__name__
            agree(
                collectives.on_all(
                    "checking the settings",
                    lambda: [
                        *validate_given(recipe, own_metrics),
                        *check_restorable(asked, name, given.get("model")),
                    ],
                )
            )
            attempt = CurrentAttempt(recipe)
            asked = recipe.training
            sources = sources or _sources_of(given)
        self.attempt, self.manager = attempt, attempt.manager
        self.sources = dict(sources or {})
        self.counts: dict[str, Count] = {}
        super().__init__(**given | {"args": _for_trainer(asked)})
        self._given = given
        self.settings: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self.start: Checkpoint | None = None
        self.asked: Batch = self.args.batch
        self.rows = self.plan(None)
        self._shown = contextlib.ExitStack()  # closed when all is loaded
        self._seen: Checkpoint | None = None  # `start`, as loaders are shown it
        self.resharded: Resharded | None = None
        self.evaluation_due_at: int | None = None
        self.preempted: str | None = None
        self.saving = Saving(self)
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._logged: dict[str, float] = {}
        self._finite: Any = True
        self._random_numbers: list[Any] | None = None  # as they are where the attempt starts
        self._pass = 0, 0  # of the data: its number, and the step at which it began
        self.contents = Contents(self)
        self.every_step = EveryStep(self)
        self.add_callback(self.every_step)
        self.remove_callback(PrinterCallback)
        self.add_callback(RunReporter(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

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
            ValueError: two different checkpoints are asked for, here and in the config.
            RuntimeError: this trainer has trained already.
            SelectionError: what is asked for cannot be had; the message lists what there is.
            DriftError: settings have changed since the checkpoint was made; it lists them.
            NotOwnerError: another attempt is at work in this run folder.
            NoProgressError: all that there is to carry on from has been tried, and failed.
        """
        request = request_of(resume_from_checkpoint, self.attempt.recipe.training)
        if self.attempt.outcome is not None:
            raise RuntimeError(
                "this trainer has trained already, and a state is restored into a new one\n"
                f"    Hint: make a {type(self).__name__} again, with the same arguments: it "
                "carries on"
            )
        if self._is_given_attempt:
            return self._attempted(args, kwargs)
        result = None
        try:
            self.attempt.check()
            with self.attempt:
                settings = settings_of(self.attempt.recipe, self._given, self)
                self.attempt.begin()
                self.attempt.choose(settings, request)
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
        self.rows = self.plan(manifest)
        config = getattr(self.model, "config", None)
        attention = {"attn_implementation": getattr(config, "_attn_implementation", None)}
        rows = {"rows_per_step": self.args.batch.rows}
        self.settings = attempt.settings | rows | attention
        self.about = attempt.facts()
        limit = self.manager.policy.limit
        if limit is not None and min(asked.save_steps, asked.eval_steps or 1) < 1:
            # Shares of a number of steps that is known only now.
            agree(list(check_meeting(asked, self.planned_steps())))
        if self.start is not None:
            self.manager.compare(self.start, attention, asked.allow_drift)

    def _share_out(self, batch: Batch) -> None:
        """Share out the rows of a step in this way: for the Trainer, and for DeepSpeed."""
        self.args.per_device_train_batch_size = batch.per_device
        self.args.gradient_accumulation_steps = batch.accumulation
        self._train_batch_size = self.args.train_batch_size
        settings = self.args.deepspeed_settings
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
            if start is not None and start.step >= planned and not self._is_given_attempt:
                result = self._train_from_start(args, kwargs)  # no step: its state is loaded
        else:
            result = self._train_from_start(args, kwargs)
            self.manager.confirm()
            step = self.state.global_step
        return result or TrainOutput(step, math.nan, {}), self._judged(step, plan)

    def _train_from_start(self, args: Any, kwargs: Any) -> Any:
        with self._shown:
            if self.start is not None:
                self._seen = self._shown.enter_context(only_listed(self.start))
            return super().train(str(self._seen.path) if self._seen else None, *args, **kwargs)

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

    def _has_metrics_of_its_own(self, given: Mapping[str, Any]) -> bool:
        """Whether an evaluation may give metrics that SFTTrainer's does not."""
        return True

    def may_stop_early(self) -> dict[str, Any]:
        """What may end the run before its last planned step, as far as the recipe says it."""
        policy, patience = self.manager.policy, self.args.early_stopping_patience
        ranked = {"metric": policy.metric, "greater_is_better": policy.greater_is_better}
        return {} if patience is None else {"patience": patience, **ranked}

    def remarks(self) -> Sequence[str]:
        """What else a person should know of this training, a line each. Ranks: any."""
        return ()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._shown.close()
        self.every_step.progress()
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite().all() & self._finite  # stays on the device: no wait
        return loss

    def pass_without_effect(self, batch: Any) -> None:
        """A forward and a backward pass, of which gradients alone are left. Ranks: all (collective
        where passes are)."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        told = {name: copy.deepcopy(getattr(self, name)) for name in names}
        self.current_gradient_accumulation_steps = 1  # the loop sets it before every step
        super().training_step(self.model_wrapped, batch)
        for name, value in told.items():
            setattr(self, name, value)


def _for_trainer(asked: Any) -> Any:
    """The config that the Trainer is given: a copy, without what keepstep does in its place."""
    args = copy.copy(asked)
    args.push_to_hub = False  # it would push what it finds, whatever is best
    args.save_total_limit = None  # with a limit of 1, it deletes folders at the end
    return args


def _sources_of(given: Mapping[str, Any]) -> dict[str, str]:
    """Where the rows come from, as far as a script says it."""
    names = {"training": "train_dataset", "evaluation": "eval_dataset"}
    return {what: name for what, name in names.items() if given.get(name) is not None}

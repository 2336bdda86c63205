"""`CheckpointMixin`: any transformers Trainer, killed at any moment and carried on.

One mixin for each concern, and what they share:

- `attempt_mixin`: `train()`, from the claim to the run folder to the outcome;
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
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PrinterCallback

from keepstep.data.rows import Count
from keepstep.policy.batch import Batch
from keepstep.preflight.agreement import agree
from keepstep.preflight.health import check_dealer
from keepstep.preflight.sequences import check_whole_rows
from keepstep.preflight.validate import validate_given
from keepstep.ranks import collectives
from keepstep.ranks.start_up import own_start
from keepstep.recipe.config import Recipe
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.trainer.attempt import CurrentAttempt
from keepstep.trainer.attempt_mixin import AttemptMixin
from keepstep.trainer.description_mixin import DescriptionMixin
from keepstep.trainer.early_stopping import EarlyStoppingCallback
from keepstep.trainer.evaluation_mixin import EvaluationMixin
from keepstep.trainer.given import arguments_of, check_rows, recipe_of, sees_images
from keepstep.trainer.pacing import EveryStep
from keepstep.trainer.reporter import RunReporter
from keepstep.trainer.request import plain_fields
from keepstep.trainer.resharded import Resharded
from keepstep.trainer.resume_mixin import ResumeMixin
from keepstep.trainer.rows_mixin import RowsMixin
from keepstep.trainer.saving import Saving
from keepstep.trainer.saving_mixin import SavingMixin
from keepstep.trainer.state import Contents
from keepstep.trainer.trackers import Trackers
from keepstep.trainer.unrestored import check_restorable
from keepstep.trainer.upstream_check import check


class CheckpointMixin(
    AttemptMixin, RowsMixin, EvaluationMixin, SavingMixin, DescriptionMixin, ResumeMixin
):
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
        outcome: how `train()` ended: finished, preempted, rewound, failed or no_progress, with the
            `exit` status that belongs to it; None before.
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
        sources, renamed, counts: of `training` and `evaluation` (of several sets, `evaluation math`
            and so on): where the rows come from, how columns of other names were understood, and
            what became of them when they were made into tokens.
    """

    shares_sequences = False  # whether processes may share out each row's tokens

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Whether the Trainer that is extended, and all else of other libraries, is as known."""
        super().__init_subclass__(**kwargs)
        check(cls, CheckpointMixin)

    def __init__(
        self,
        *args: Any,
        attempt: CurrentAttempt | None = None,
        sources: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            *args, **kwargs: the Trainer's own. `args` is copied: yours stays as it is.
            attempt: one that has been begun already, with what it carries on from chosen; None:
                `train()` makes one.
            sources: `training` and `evaluation`: where the rows come from, for people.
            renamed: likewise, how columns of other names were understood.

        Raises:
            ConfigError: on every rank: `args` has none of keepstep's fields, or what it asks for
                could not be trained, saved or carried on; every problem at once.
        """
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        asked = arguments_of(given, type(self).__name__)
        self._is_given_attempt = attempt is not None
        if attempt is None:
            attempt = CurrentAttempt(self._recipe_of(given, asked))
            asked = attempt.recipe.training
            sources = sources or _sources_of(given)
        self.attempt, self.manager = attempt, attempt.manager
        self.sources, self.renamed = dict(sources or {}), dict(renamed or {})
        self.counts: dict[str, Count] = {}
        super().__init__(**given | {"args": self._for_trainer(asked, given)})
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
        self._random_numbers: list[Any] | None = None  # as they are where the attempt starts
        self._pass = 0, 0  # of the data: its number, and the step at which it began
        self.contents = Contents(self)
        self.every_step = EveryStep(self)
        self.add_callback(self.every_step)
        self.remove_callback(PrinterCallback)
        self.reporter = RunReporter(self)
        self.add_callback(self.reporter)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.trackers = Trackers(self)
        self.callback_handler.callbacks.insert(0, self.trackers)
        self._args_as_made = plain_fields(self.args)
        own_start.ended("model")

    def _recipe_of(self, given: Mapping[str, Any], asked: Any) -> Recipe:
        """What is asked for, once it is in order. Ranks: all (collective).

        Raises:
            ConfigError: on every rank: it is not.
        """
        own_metrics, name = self._has_metrics_of_its_own(given), type(self).__name__
        recipe = collectives.on_all("checking the settings", lambda: recipe_of(given, asked))
        problems = collectives.on_all(
            "checking the settings",
            lambda: [
                *validate_given(recipe, own_metrics),
                *check_restorable(asked, name, given.get("model")),
                *(check_whole_rows(asked, name) if not self.shares_sequences else ()),
                *check_rows(given, recipe.training),
                *check_dealer(self.dealer, recipe),
            ],
        )
        agree(problems)
        return recipe

    def _has_metrics_of_its_own(self, given: Mapping[str, Any]) -> bool:
        """Whether an evaluation may give metrics that SFTTrainer's does not."""
        return True

    def _for_trainer(self, asked: Any, given: Mapping[str, Any]) -> Any:
        """The config that the Trainer is given: a copy, without what keepstep does in its place."""
        args = copy.copy(asked)
        args.metric_for_best_model = asked.ranking_metric or asked.metric_for_best_model
        args.push_to_hub = False  # it would push what it finds, whatever is best
        args.save_total_limit = None  # with a limit of 1, it deletes folders at the end
        if args.ddp_find_unused_parameters is None and not sees_images(given):
            args.ddp_find_unused_parameters = False  # transformers would look at every step
        return args

    def remarks(self) -> Sequence[str]:
        """What else a person should know of this training, a line each. Ranks: any."""
        return ()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._shown.close()
        self.every_step.micro_batch_begins()
        loss = super().training_step(*args, **kwargs)
        self.every_step.health.add_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.every_step.health.set_grad_norm(norm)
        return norm

    def pass_without_effect(self, batch: Any) -> None:
        """A forward and a backward pass, of which gradients alone are left. Ranks: all (collective
        where passes are)."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        told = {name: copy.deepcopy(getattr(self, name)) for name in names}
        self.current_gradient_accumulation_steps = 1  # the loop sets it before every step
        super().training_step(self.model_wrapped, batch)
        for name, value in told.items():
            setattr(self, name, value)


def _sources_of(given: Mapping[str, Any]) -> dict[str, str]:
    """Where the rows come from, as far as a script says it."""
    names = {"training": "train_dataset", "evaluation": "eval_dataset"}
    found = {what: name for what, name in names.items() if given.get(name) is not None}
    sets = given.get("eval_dataset")
    if isinstance(sets, dict):
        del found["evaluation"]
        found |= {f"evaluation {name}": f"eval_dataset[{name!r}]" for name in sets}
    return found

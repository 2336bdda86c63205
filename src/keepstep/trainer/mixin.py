"""KeepstepTrainer: the one seam to the Trainer's private save path.

What is overridden, and why (transformers 5.17 to 5.23, trl 1.16):
- `_save_checkpoint`: Trainer writes straight into `checkpoint-N`, and rotates by age.
- `_save`: Trainer stores its arguments, absolute paths and Hub token included, every time.
- `get_train_dataloader`, `_init_training_state`, `set_initial_training_values`, `_run_epoch`: which
  rows a step has, and where a run goes on, does not depend on the number of processes.
- `get_eval_dataloader`: an evaluation draws nothing from the generator that training goes on with.
- `_prepare_for_training`, `_load_rng_state`, `_load_from_checkpoint`: what other processes wrote
  is given to these.
- `_prepare_dataset`: rows are counted, and an error of one rank is everybody's.
- `compute_loss`: a rank without rows computes one, and learns nothing from it.
- `_prepare_for_training`: DeepSpeed saves and loads through our checkpoint engine.
- `create_scheduler`: some schedules ask DeepSpeed's optimizers for what they do not have.
- `_finalize_training`: the last save has to arrive before the best is chosen.
- `_load_best_model`: the best checkpoint may have been written by other processes.
- `_load_callback_state`: callbacks go on counting, with the recipe's arguments.
- `_evaluate`: a stop does not wait for the end of an evaluation, and training does not depend on
  the random numbers that one draws.
- `_run_epoch`, `_finalize_training`: an evaluation that a stop has cancelled is made up first.
- `_determine_best_metric`: given the metrics of each evaluation; an infinite one must not win.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import EarlyStoppingCallback, set_seed
from trl import SFTTrainer

from keepstep.data.rows import Count
from keepstep.data.tokenize import Positions, prepare, too_few, too_long
from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.evaluations import best_of
from keepstep.policy.manifest import Manifest, finite_metrics
from keepstep.policy.schedule import saves_at
from keepstep.ranks import collectives
from keepstep.recipe.config import ConfigError, refused_by_libraries
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.reader import Committed
from keepstep.run_folder.writer import Saved
from keepstep.save.manager import CheckpointManager
from keepstep.sharding.reshard import rng_seed
from keepstep.trainer.dealing import IGNORED, Fetched, plan_rows, settle_loader, tell_epoch
from keepstep.trainer.pacing import EvaluationStoppedError, EveryStep
from keepstep.trainer.restore import (
    Resharded,
    random_numbers,
    random_numbers_apart,
    restore,
    set_random_numbers,
    settle_gradients,
)
from keepstep.trainer.saving import Saving
from keepstep.trainer.state import Contents

logger = logging.getLogger(__name__)

LIBRARIES = (
    *("keepstep", "torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets"),
)
VERSIONS = {name: version(name) for name in LIBRARIES}


class KeepstepTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are committed by a `CheckpointManager`.

    Attributes:
        about: what the model card says of the run.
        start: the checkpoint whose state training goes on with, None for the beginning.
        asked: how the recipe shares out the rows of a step; `args.batch` is how it is done.
        rows: which rows the steps have.
        resharded: what had to be done to give the state of `start` to these processes, or None.
        evaluation_due_at: the newest step with an evaluation, None before the first.
        preempted: why training stopped before its end, None when it did not.
        saving: its saves, and what came of them.
        sources, counts: `training` and `evaluation`: where the rows come from, and what became of
            them when they were made into tokens.
    """

    control: Any

    def __init__(
        self,
        *args: Any,
        manager: CheckpointManager,
        settings: dict[str, Any] | None = None,
        start: Committed | None = None,
        asked: Batch | None = None,
        about: dict[str, Any] | None = None,
        sources: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.counts: dict[str, Count] = {}
        self.sources = sources or {}
        super().__init__(*args, **kwargs)
        self._judge_rows()
        self.manager = manager
        self.settings = settings or {}
        self.about = about or {}
        self.start = start
        self.asked: Batch = asked or self.args.batch
        self.rows = plan_rows(self.train_dataset, self.args, start.manifest if start else None)
        self._shown = contextlib.ExitStack()  # closed when all is loaded
        self._seen: Committed | None = None  # `start`, as loaders are shown it
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
        # Retention is the manager's: with a limit of 1, Trainer deletes folders at the end.
        self.args.save_total_limit = None
        self.every_step = EveryStep(self)
        self.add_callback(self.every_step)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train from `start`, with its whole state, to the end. Ranks: all (collective).

        Args:
            resume_from_checkpoint: nothing, or the path of `start`.

        Raises:
            ValueError: another checkpoint is named, or was chosen, than `start`: its state would
                not be restored.
        """
        start, chosen = (c.path.resolve() if c else None for c in (self.start, self.manager.chosen))
        named = resume_from_checkpoint or None
        other = named is not None and (named is True or Path(named).resolve() != start)
        if other or start != chosen:
            raise ValueError(
                f"start is {_name(start)}, the manager has chosen {_name(chosen)}, and train() is "
                f"given {named}: only the state of `start` is restored\n"
                "    Hint: checkpoint, choice = manager.choose(...); KeepstepTrainer(start="
                "checkpoint unless choice.weights_only, ...); train()"
            )
        self.manager.begin_training()
        with self._shown:
            if self.start is not None:
                self._seen = self._shown.enter_context(only_listed(self.start))
            path = str(self._seen.path) if self._seen else None
            return super().train(path, *args, **kwargs)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """All rows, counted, with an error of one rank made everybody's. Ranks: all (collective).

        Raises:
            ConfigError: a row cannot be prepared, or none is left.
        """
        inner = super()._prepare_dataset

        def stage(rows: Any, args: Any, packing: bool) -> Any:
            formatting = formatting_func if rows is dataset else None
            return inner(rows, processing_class, args, packing, formatting, dataset_name)

        what = {"train": "training", "eval": "evaluation"}.get(dataset_name, dataset_name)
        prepared, count = prepare(what, dataset, args, packing, stage)
        if count is not None:
            self.counts[what] = count
        return prepared

    def _judge_rows(self) -> None:
        """Whether the model takes the longest row, and an evaluation some. Ranks: any; the same."""
        positions = Positions.of(self.model.config)
        problems = [
            problem
            for what, count in self.counts.items()
            for problem in too_long(what, count.longest, positions)
        ]
        if self.eval_dataset is not None and not isinstance(self.eval_dataset, dict):
            problems += too_few(self.eval_dataset, self.args)
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise ConfigError(errors)
        for warning in problems if collectives.is_main() else []:
            logger.warning("%s", warning.told())

    def get_train_dataloader(self) -> Any:
        loader, order = super().get_train_dataloader(), self._get_train_sampler()
        settle_loader(loader, self.rows.seed)
        return self.rows.dealing(loader, order, collectives.rank())

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Each batch is progress: of ranks that wait for each other, one waits for its loader."""
        fetched = Fetched(epoch_iterator, self.every_step.progress)
        return super().get_batch_samples(fetched, *args, **kwargs)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        settle_loader(loader, self.rows.seed)
        return loader

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
        # Loaded from trainer_state.json are the intervals of the attempt that wrote it.
        self.state.compute_steps(self.args, max_steps)
        if self.start is not None:
            self._settle_best()
        if self.rows.lead:
            epochs, steps = divmod(self.state.global_step + self.rows.lead, per_epoch)
            batches = steps * self.args.gradient_accumulation_steps
        if self.rows.streamed:
            epochs = self.rows.passes
            batches = self.rows.done * self.args.gradient_accumulation_steps
        return epochs, batches

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        done = self.rows.done if kwargs["epoch"] == self.rows.passes else 0
        self._pass = kwargs["epoch"], self.state.global_step - done
        tell_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        self._make_up_evaluation()
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the step that this attempt starts at is still to be evaluated."""
        if self.start is None or self.args.eval_strategy == "no":
            return False
        return self.start.manifest.evaluation_due and self._evaluated[0] != self.start.step

    def _make_up_evaluation(self) -> None:
        """Evaluate the step that a stop had left without, as the undisturbed run did: its metric,
        the best one, early stopping and a plateau's schedule; and save it so. Ranks: all."""
        step = self.state.global_step
        if self.start is None or not self.owes_evaluation or self.preempted is not None:
            return
        if step != self.start.step:
            return  # a later epoch begins
        if collectives.is_main():
            logger.warning("step %s was not evaluated to the end: that is made up now", step)
        self.evaluation_due_at = step
        self._load_rng_state(str(self._seen.path) if self._seen else None)
        self._determine_best_metric(self._evaluate(None, None), None)
        if step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.preempted is None:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

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
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Else `restore` takes the weights, too, from DeepSpeed's shards.

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # A router's loss does not ask for labels, and a row that fills a place must teach nothing.
        routed = self.aux_loss_enabled and self.model.training
        filler = routed and bool((inputs["labels"] == IGNORED).all())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * 0 if filler else loss

    def planned_steps(self) -> int:
        """How many optimizer steps the whole run has. Ranks: all."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def saves_at(self, step: int, planned: int) -> bool:
        """Whether the recipe has this last step saved, whatever the clock says. Ranks: any."""
        return saves_at(step, planned, self.args.save_strategy, self.args.save_steps)

    def saves_on_its_way(self) -> bool:
        """Whether the recipe has anything saved while training goes on: a stop's or a request's
        save is worth a pause, but no memory that lies idle until then. Ranks: any."""
        args = self.args
        return bool(args.save_strategy != "no" or args.save_interval_seconds)

    def may_stop_early(self) -> dict[str, Any]:
        """What may end the run before its last planned step, as far as the recipe says it."""
        policy, patience = self.manager.policy, self.args.early_stopping_patience
        ranked = {"metric": policy.metric, "greater_is_better": policy.greater_is_better}
        return {} if patience is None else {"patience": patience, **ranked}

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            with self.every_step.evaluation(), random_numbers_apart():
                return dict(super()._evaluate(*args, **kwargs))
        except EvaluationStoppedError:
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.preempted is not None:
            return True  # save_strategy: best saves where this is true
        self._evaluated = (self.state.global_step, finite_metrics(metrics))
        name = self.manager.policy.metric
        is_best = False
        if name not in metrics or math.isfinite(metrics[name]):
            is_best = bool(super()._determine_best_metric(metrics, trial))
        return is_best

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        with refused_by_libraries():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.contents.attach()
        if self.start is not None:
            assert self._seen is not None  # since train()
            self.resharded = restore(self, self._seen)
            self._total_train_tokens = int(self.start.manifest.about.get("tokens") or 0)
            settle_gradients(self, train_dataloader)
        if self.resharded is not None:
            facts = self.resharded.as_json()
            self.manager.saver.on_main(
                "recording", lambda writer: writer.record("reshard", **facts)
            )
        self._training_since = time.monotonic()
        self._prepare_saves()
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        # Some schedules ask for `defaults["lr"]`, which DeepSpeed's own optimizers do not have.
        sharded, own = getattr(self.optimizer, "optimizer", None), self.contents.optimizer()
        if sharded is not None and own is not None and not hasattr(sharded, "defaults"):
            sharded.defaults = own.defaults
        return super().create_scheduler(num_training_steps, optimizer)

    def _prepare_saves(self) -> None:
        """Decide how saves are made, and set their memory aside. Ranks: all (collective)."""
        saver, optimizer = self.manager.saver, self.contents.optimizer()
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *arguments: saver.hold())
        (not_lazy,) = collectives.any_rank(not self.contents.may_be_lazy())
        if saver.mode == "lazy" and not_lazy:
            saver.mode = "snapshot"
        self.contents.rehearse()
        if saver.mode == "off" or not self.saves_on_its_way():
            return
        reason = saver.reserve(self.contents.snapshot_bytes())
        if reason is not None and collectives.is_main():
            logger.warning("%s: checkpoints are written in the foreground.", reason)

    def _load_best_model(self) -> None:
        best = self.manager.best()
        if best is None:
            return
        with only_listed(best) as shown:
            if self.is_deepspeed_enabled:
                restore(self, shown)  # it may be other processes that wrote it
            else:
                self.state.best_model_checkpoint = str(shown.path)
                super()._load_best_model()
        self.state.best_model_checkpoint = str(best.path)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._make_up_evaluation()  # of the last step: then there was no epoch to run
        self.saving.finish()
        finished = self.preempted is None and self.saving.complete
        best = self.manager.best() if finished else None
        self.state.best_model_checkpoint = str(best.path) if best else None
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saving.begin()

    def hear(self) -> None:
        """Wait for the save in flight, and for what came of it. Ranks: all (collective)."""
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

    @property
    def is_evaluated(self) -> bool:
        """Whether this step has been evaluated."""
        return self._evaluated[0] == self.state.global_step

    def saved_step(self) -> int | None:
        """The step of this attempt's newest commit, or that it starts at and has not left; None
        before the first commit."""
        if self.last_saved is None and self.start and self.start.step == self.state.global_step:
            return self.start.step
        return self.last_saved.checkpoint.step if self.last_saved else None

    def stores_weights(self) -> bool:
        """Whether this step's checkpoint gets a weights file. Without shards it is the state."""
        wanted, args = self.args.save_weights, self.args
        if wanted == "every" or args.zero_stage == 0 or args.save_only_model:
            return True
        return bool(wanted == "best" and self.state.best_global_step == self.state.global_step)

    def describe(self) -> Manifest:
        """What is known of this step before its files are written. Ranks: any."""
        step, metrics = self._evaluated
        return Manifest(
            run_id="",
            attempt=0,
            parent=None,
            global_step=self.state.global_step,
            epoch=round(self.state.epoch or 0.0, 6),
            samples=self.rows.samples_at(self.state.global_step),
            metrics=metrics if step == self.state.global_step else {},
            evaluation_due=self.evaluation_due_at == self.state.global_step != step,
            world_size=self.args.world_size,
            zero_stage=self.args.zero_stage,
            deepspeed=self.is_deepspeed_enabled,
            planned_steps=self.state.max_steps,
            settings=self.settings,
            health=self._health(),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            adapter=isinstance(self.model, PeftModel),
            versions=VERSIONS,
            saved_at="",
            save_seconds=0.0,
            about=self.about | self._counted(),
            dealt=self._dealt().as_json(),
        )

    def _dealt(self) -> Dealt:
        if self.rows.streamed:
            passes, began = self._pass
            done = self.state.global_step - began
            return Dealt(self.args.batch, self.asked, None, passes, done)
        course = self.rows.course
        return Dealt(self.args.batch, self.asked, course.rows if course else None)

    def parameter_counts(self) -> tuple[int, int]:
        """How many elements the model has, and how many of them are trained. Ranks: any."""
        # Under ZeRO-3 a parameter is empty here, and `ds_numel` is its size.
        sizes = {p: getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()}
        return sum(sizes.values()), sum(n for p, n in sizes.items() if p.requires_grad)

    def _counted(self) -> dict[str, Any]:
        """Sizes, and what was spent so far, by all attempts together."""
        before = self.start.manifest.about if self.start else {}
        seconds = float(before.get("train_seconds", 0.0)) + time.monotonic() - self._training_since
        parameters, trained = self.parameter_counts()
        return {
            "parameters": parameters,
            "trained": trained,
            "tokens": int(self._total_train_tokens),
            "train_seconds": round(seconds, 1),
        }

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._shown.close()
        self.every_step.progress()
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite().all() & self._finite  # stays on the device: no wait
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._logged |= {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        super().log(logs, *args, **kwargs)

    def _health(self) -> dict[str, Any]:
        """Whether every loss of this attempt was finite here, and what was logged last."""
        finite = bool(self._finite) and all(map(math.isfinite, self._logged.values()))
        return {"finite": finite, **finite_metrics(self._logged)}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, configuration and tokenizer in Hugging Face layout; no training_args.bin."""
        if not self.args.should_save:
            return

        if self.contents.gathering is None:
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
        else:
            self.contents.store_gathered(state_dict)


def _name(path: Path | None) -> str:
    return path.name if path else "the beginning"

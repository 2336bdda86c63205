"""An evaluation that a stop cuts short is made up; none changes what training does after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import Any

from transformers import Trainer

from keepstep.policy.manifest import finite_metrics
from keepstep.policy.metric import PREFIX, terms_of, value_of
from keepstep.ranks import collectives
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.trainer.pacing import EvaluationStoppedError
from keepstep.trainer.restore import random_numbers_apart

logger = logging.getLogger(__name__)


class EvaluationMixin(Trainer):
    """Evaluations of a run that may be stopped at any moment.

    Overridden (transformers 5.18 to 5.24): `evaluate` (a sum of several metrics ranks),
    `_evaluate`, `_determine_best_metric` (an infinite metric must not win), `_run_epoch` and
    `_finalize_training` (what was cut short is made up first).
    """

    control: Any

    @property
    def is_evaluated(self) -> bool:
        """Whether this step has been evaluated."""
        return self._evaluated[0] == self.state.global_step

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
        if self.preempted is None:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_evaluation()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # Trainer would make one step more
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._make_up_evaluation()  # of the last step: then there was no epoch to run
        return super()._finalize_training(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """The Trainer's; with what is measured beside, and, where a sum of several metrics ranks,
        with that. Ranks: all (collective).

        Of several sets each is logged, and told to callbacks, apart; then so is what is added.
        """
        with self.manager.time_sheet.within("evaluation"):
            metrics = super().evaluate(
                eval_dataset, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            if metric_key_prefix != PREFIX[:-1]:
                return metrics
            if eval_dataset is None:
                self._add(metrics, self.measured_beside())
        name = self.manager.policy.metric
        value = value_of(metrics, name)
        if value is not None and name not in metrics:
            self._add(metrics, {name: value})
        return metrics

    def measured_beside(self) -> dict[str, float]:
        """Metrics, by their full names, that come from elsewhere than the evaluation's rows.
        Ranks: all (collective)."""
        return {}

    def _add(self, metrics: dict[str, float], own: dict[str, float]) -> None:
        if own:
            self.log(dict(own))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, own
            )
            metrics |= own

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            with self.every_step.evaluation(), random_numbers_apart():
                metrics = dict(super()._evaluate(*args, **kwargs))
            self.check_ranked(metrics)
        except EvaluationStoppedError:
            return {}
        except ConfigError:  # mended, the run goes on from here, and makes the evaluation up
            self._save_without_evaluation()
            raise
        return metrics

    def check_ranked(self, given: Collection[str]) -> None:
        """Whether evaluations give what ranks checkpoints. Ranks: any; the same everywhere.

        Args:
            given: metrics, by their full names.

        Raises:
            ConfigError: one is not among them.
        """
        metric = self.manager.policy.metric
        if metric is None or metric in given:
            return
        lacking = [term.name for term in terms_of(metric) if term.name not in given]
        if lacking:
            what = f"metric_for_best_model: the evaluation has not given {', '.join(lacking)}"
            told = f"it gives {', '.join(sorted(given))}"
            raise ConfigError([Problem(what, told, "unknown-metric")])

    def _save_without_evaluation(self) -> None:
        """Ranks: all (collective)."""
        step = self.state.global_step
        if step and not (self.start is not None and self.start.step == step):
            self._save_checkpoint(self.model, None)
            self.saving.hear()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.preempted is not None:
            return True  # save_strategy: best saves where this is true
        self._evaluated = (self.state.global_step, finite_metrics(metrics))
        name = self.manager.policy.metric
        is_best = False
        if name not in metrics or math.isfinite(metrics[name]):
            is_best = bool(super()._determine_best_metric(metrics, trial))
        return is_best

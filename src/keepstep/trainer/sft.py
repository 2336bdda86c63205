"""`KeepstepTrainer`: TRL's SFTTrainer with checkpoints that are committed."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import ProcessorMixin
from trl import SFTTrainer

from keepstep.data.tokenize import Positions, prepare, too_few, too_long
from keepstep.policy.manifest import finite_metrics
from keepstep.policy.metric import PREFIX, SAMPLED, names_of
from keepstep.policy.samples import Sample, exact_match
from keepstep.preflight.model import NO_COMPLETIONS
from keepstep.ranks import collectives
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.trainer.dealing import IGNORED
from keepstep.trainer.kernels_mixin import KernelsMixin
from keepstep.trainer.own_metrics import OwnMetrics
from keepstep.trainer.reporter import tell_samples
from keepstep.trainer.restore import random_numbers_apart
from keepstep.trainer.sampling import Sampler
from keepstep.trainer.token_counts import TokenCounts

logger = logging.getLogger(__name__)


class KeepstepTrainer(KernelsMixin, SFTTrainer):
    """SFTTrainer, killed at any moment and carried on; its rows are counted, and judged.

    Overridden beside what `CheckpointMixin` is for (trl 1.16):
    - `_prepare_dataset`: rows are counted, and an error of one rank is everybody's.
    - `compute_loss`: a rank without rows computes one, and learns nothing from it; an evaluation's
      tokens are counted.
    - `evaluation_loop`: what it says of tokens is exact, and told of each set; a user's metrics.
    - `_prepare_for_training`: these are rehearsed before the first step.
    """

    _tokens: TokenCounts | None = None  # of the evaluation that is being made
    _own_metrics: OwnMetrics | None = None
    sampler: Sampler | None = None
    own_names: frozenset[str] = frozenset()  # that the function was seen to give, in full

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._judge_rows()
        metrics = getattr(self.args, "metrics", None)
        if metrics is not None:
            self._own_metrics = collectives.on_all(
                "looking at metrics", lambda: OwnMetrics(metrics, self.processing_class)
            )
        self.sampler = self._sampler()

    def _sampler(self) -> Sampler | None:
        """What writes completions at evaluations, None: nothing is to. Ranks: all (collective).

        Raises:
            ConfigError: on every rank: it cannot.
        """
        if getattr(self.args, "sample_prompts", None) is None:
            return None
        if isinstance(self.processing_class, ProcessorMixin):
            raise ConfigError([Problem(NO_COMPLETIONS, "leave it out", "samples")])
        return Sampler(self.args, self.processing_class, self.model)

    def _has_metrics_of_its_own(self, given: Mapping[str, Any]) -> bool:
        several = isinstance(given.get("eval_dataset"), Mapping)
        return several or given.get("compute_metrics") is not None

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

        known = {"train": "training", "eval": "evaluation"}
        what = known.get(dataset_name, f"evaluation {dataset_name}")
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
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for rows in sets.values():
            problems += too_few(rows, self.args) if rows is not None else []
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise ConfigError(errors)
        for warning in problems if collectives.is_main() else []:
            logger.warning("%s", warning.told())

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._tokens is not None and not self.model.training:
            model = self._tokens.watching(model, inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not (self.aux_loss_enabled and self.model.training):
            return loss
        # A router's loss does not ask for labels, and a row that fills a place must teach nothing.
        # (On the device: the host does not wait to see which it is.)
        teaches = (inputs["labels"] != IGNORED).any()
        return (loss[0] * teaches, *loss[1:]) if isinstance(loss, tuple) else loss * teaches

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        self._tokens = TokenCounts(self.accelerator, dataloader, self._own_metrics)
        told = self._metrics["eval"]
        told.clear()  # of one that was broken off
        try:
            output = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            found = {name: sum(values) / len(values) for name, values in told.items()}
            found |= self._tokens.summed()
            if not self._tokens.is_finite:  # whose batches the mean would leave out
                found["loss"] = math.nan
        finally:
            self._tokens = None
        told.clear()  # `log` would give them the name of a set without a name
        output.metrics.update({f"{metric_key_prefix}_{n}": value for n, value in found.items()})
        return output

    def measured_beside(self) -> dict[str, float]:
        if self.sampler is None:
            return {}
        on_token = partial(self.every_step.on_prediction_step, self.args, self.state, self.control)
        with self._sampling() as model:
            samples = self.sampler.complete(model, self.state.global_step, on_token)
        self.keep_samples(samples)
        match = exact_match(samples)
        return {} if match is None else {PREFIX + SAMPLED: match}

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[Any]:
        """The model, as evaluations pass it; what is drawn within is of no consequence."""
        model = self._wrap_model(self.model, training=False)
        model.eval()
        with random_numbers_apart(), torch.no_grad(), self.compute_loss_context_manager():
            yield model

    def keep_samples(self, samples: Sequence[Sample]) -> None:
        """Write them down, and show them: in the log and to trackers. Ranks: all (collective)."""
        if self.is_in_train:
            self.manager.saver.on_main("writing samples", lambda w: w.record_samples(samples))
        tell_samples(self, samples)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.sampler is not None:
            with self._sampling() as model:
                self.sampler.rehearse(model)
        if self._own_metrics is not None:
            with random_numbers_apart():
                self._rehearse(self._own_metrics)
        return prepared

    def _rehearse(self, own: OwnMetrics) -> None:
        """Count a batch of each evaluation set: what the function gives is known before hours are
        spent. Ranks: all (collective).

        Raises:
            ConfigError: on every rank: it fails, or does not give what ranks.
        """
        several = isinstance(self.eval_dataset, dict)
        prefixes = {name: f"{PREFIX}{name}_" for name in self.eval_dataset} if several else {}
        model, given = self._wrap_model(self.model, training=False), set[str]()
        model.eval()
        try:
            for name, prefix in (prefixes or {None: PREFIX}).items():
                loader = self.get_eval_dataloader(name)
                self._tokens = TokenCounts(self.accelerator, loader, own)
                self.prediction_step(model, next(iter(loader.base_dataloader)), True)
                given |= {prefix + name for name in own.names()}
                found = finite_metrics(own.means())
                self.own_names |= {prefix + name for name in found}
        finally:
            self._tokens = None
            self._metrics["eval"].clear()
            model.train()
        if self.sampler is not None and self.sampler.compares:
            given.add(PREFIX + SAMPLED)
        self.check_ranked(given | names_of(tuple(prefixes)).keys())

    def remarks(self) -> Sequence[str]:
        told = [] if self.kernels is None else [f"speed: {self.kernels.line}"]
        told += [] if self.sampler is None else [self.sampler.told()]
        if self.sequences is not None:
            told.append(
                f"each row's tokens are shared out among {self.args.sequence_size} processes "
                "(DeepSpeed ALST/Ulysses); evaluations have whole rows"
            )
        if self.aux_loss_enabled:
            coefficient = f"{self.router_aux_loss_coef:g}"
            told.append(f"eval_loss holds the router's loss, too: {coefficient} x eval_aux_loss")
        return told

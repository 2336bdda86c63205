"""A run as it was asked for: what follows from the fields of its recipe."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Literal

from trl import ModelConfig

from keepstep.output.units import parse_bytes, parse_duration, parse_moment
from keepstep.policy.batch import Batch
from keepstep.policy.manifest import strategy_name
from keepstep.policy.retention import Policy
from keepstep.policy.schedule import Schedule
from keepstep.ranks import signals
from keepstep.recipe import trajectory
from keepstep.recipe.fields import DataConfig as DataConfig
from keepstep.recipe.fields import Fields
from keepstep.recipe.problems import ConfigError as ConfigError
from keepstep.recipe.problems import Problem as Problem
from keepstep.recipe.problems import refused_by_libraries as refused_by_libraries
from keepstep.recipe.trajectory import word
from keepstep.save.saver import Mode

# May differ between attempts that do the same; secrets are in no digest.
NOT_IN_FINGERPRINT = (
    *("output_dir", "resume_from_checkpoint", "max_attempts_without_progress", "deadline"),
    *("time_limit", "run_name", "logging_dir", "local_rank", "hub_token"),
)

RESHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # `optim`, as tested


@dataclass
class KeepstepConfig(Fields):
    """Of a run's training: every field, and what follows from them."""

    def schedule(self) -> Schedule:
        """When to save beside `save_steps`, and when to stop."""
        wall, steady = signals.started()
        moments = [float(end) for end in [os.environ.get("SLURM_JOB_END_TIME")] if end]
        if self.deadline:
            moments.append(parse_moment(str(self.deadline)))
        moment = min(moments, default=None)
        deadlines = [] if moment is None else [steady + moment - wall]
        if self.time_limit:
            deadlines.append(steady + parse_duration(str(self.time_limit)))
        deadline = min(deadlines, default=None)
        return Schedule(self.save_interval_seconds, deadline, self.stop_margin_seconds, moment)

    @property
    def ranking_metric(self) -> str | None:
        """`metric_for_best_model` by its full name; None: nothing is ranked."""
        metric = self.metric_for_best_model
        if not metric or self.eval_strategy == "no":
            return None
        return metric if metric.startswith("eval_") else f"eval_{metric}"

    def policy(self) -> Policy:
        """What retention is asked to do."""
        return Policy(
            limit=self.save_total_limit,
            ranking=self.keep_ranking,
            metric=self.ranking_metric,
            greater_is_better=bool(self.greater_is_better),
            every_n_steps=self.keep_every_n_steps,
            total_bytes=parse_bytes(self.keep_total_bytes) if self.keep_total_bytes else None,
        )

    @property
    def min_free(self) -> int:
        """`min_free_bytes` as a number."""
        return parse_bytes(self.min_free_bytes or 0)

    @property
    def save_mode(self) -> Mode:
        """`async_save`, decided: `lazy` is the default where it has been measured."""
        if self.async_save != "auto":
            return self.async_save
        return "lazy" if self.use_cpu else "snapshot"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 where nothing is sharded: also DDP or a single process."""
        return int(self.deepspeed_plugin.zero_stage) if self.deepspeed_plugin else 0

    @property
    def strategy(self) -> str:
        """The name of how state is shared out among the processes."""
        return strategy_name(self.zero_stage, self.deepspeed_plugin is not None)

    def offloaded(self, what: Literal["optimizer", "param"]) -> str:
        """Where DeepSpeed keeps it: `none` (on the device), `cpu`, `nvme`."""
        zero = self._deepspeed_settings.get("zero_optimization", {})
        return str((zero.get(f"offload_{what}") or {}).get("device") or "none")

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def card_data(self) -> dict[str, Any]:
        """`card`, of which HfArgumentParser has made a mapping."""
        return dict(self.card or {})  # type: ignore[arg-type]

    @property
    def batch(self) -> Batch:
        """How the rows of one optimizer step are shared out."""
        per_device, times = self.per_device_train_batch_size, self.gradient_accumulation_steps
        return Batch(per_device, times, self.world_size)

    def take(self, batch: Batch) -> None:
        """Share out the rows of a step in this way; before a trainer is built."""
        self.per_device_train_batch_size = batch.per_device
        self.gradient_accumulation_steps = batch.accumulation
        settings = self._deepspeed_settings
        for name, value in (
            ("train_micro_batch_size_per_gpu", batch.per_device),
            ("gradient_accumulation_steps", batch.accumulation),
            ("train_batch_size", batch.rows),
        ):
            if isinstance(settings.get(name), int):  # `auto` is filled in by the Trainer
                settings[name] = value

    @property
    def rows_are_dealt(self) -> bool:
        """Whether keepstep deals the rows of a step; else the Trainer's sampler does."""
        return word(self.train_sampling_strategy) != "batch_rebalance"

    @property
    def _deepspeed_settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration, the live one; empty without DeepSpeed."""
        return self.deepspeed_plugin.deepspeed_config if self.deepspeed_plugin else {}

    @property
    def rigid(self) -> str | None:
        """Why this attempt can only resume what as many processes with its ZeRO stage have written;
        None: it can resume any."""
        if "nvme" in (self.offloaded("optimizer"), self.offloaded("param")):
            return "an optimizer or parameters on NVMe are not resharded"
        if not self.average_tokens_across_devices:
            return "average_tokens_across_devices: false makes the loss depend on that number"
        if self.zero_stage and word(self.optim) not in RESHARDED_OPTIMIZERS:
            return f"optim: {word(self.optim)} has not been tested with another number"
        if word(self.train_sampling_strategy) == "batch_rebalance":
            return "train_sampling_strategy: batch_rebalance deals out rows by that number"
        return None


@dataclass
class Recipe:
    """One run, as asked for."""

    data: DataConfig
    training: KeepstepConfig
    model: ModelConfig

    def settings(self) -> dict[str, Any]:
        """What determines the trajectory of training, to be compared at a resume.

        Not in it: `max_steps` and `num_train_epochs`, which extend a run, and how the rows of a
        step are shared out among processes.
        """
        found = trajectory.settings(self.training, self.model, self.data)
        return found | {"rows_per_step": self.training.batch.rows}

    def fingerprint(self) -> str:
        """A digest of what is asked for, and of whom: the same for attempts that do the same."""
        training = self.training
        asked: dict[str, Any] = {"processes": training.world_size}
        asked["deepspeed"] = training._deepspeed_settings
        for part in (self.data, training, self.model):
            names = [f.name for f in fields(part) if f.name not in NOT_IN_FINGERPRINT]
            asked |= {name: getattr(part, name, None) for name in names}
        text = json.dumps(asked, default=_word_or_type)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _word_or_type(value: Any) -> str:
    """For JSON: an object's text may hold its address."""
    return str(value.value) if isinstance(value, Enum) else type(value).__name__

"""A run as it was asked for: what follows from the fields of its recipe."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from trl import ModelConfig, SFTConfig

from keepstep.recipe import trajectory
from keepstep.recipe.arguments import CheckpointArguments
from keepstep.recipe.fields import DataConfig as DataConfig
from keepstep.recipe.problems import ConfigError as ConfigError
from keepstep.recipe.problems import Problem as Problem
from keepstep.recipe.problems import refused_by_libraries as refused_by_libraries

# May differ between attempts that do the same; secrets are in no digest.
NOT_IN_FINGERPRINT = (
    *("output_dir", "resume_from_checkpoint", "max_attempts_without_progress", "deadline"),
    *("time_limit", "run_name", "logging_dir", "local_rank", "hub_token"),
)


@dataclass
class KernelArguments:
    """What SFT computes with; where nothing is said, a run's beginning decides it."""

    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "Liger's kernels for norms, rotary positions and MLPs; null: on a GPU, where "
            "liger-kernel is installed and knows the model, and as the run began."
        },
    )
    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Training batches in one line, without padding (packed ones are in any case); "
            "null: with flash attention, and as the run began."
        },
    )


@dataclass
class KeepstepConfig(CheckpointArguments, KernelArguments, SFTConfig):
    """SFT's settings: TRL's `SFTConfig` with keepstep's fields, and defaults that keep a run safe.

    ```python
    args = KeepstepConfig(output_dir="runs/x", max_steps=1000, save_steps=100)
    ```

    Every field of SFTConfig is there under its name. Where keepstep's default is another one
    (`eval_strategy: steps`, `save_total_limit: 3`, …), `CheckpointArguments` has it, or
    `KernelArguments`.
    """

    metrics: str | None = field(
        default=None,
        metadata={
            "help": "A function of yours that every evaluation calls with each batch, "
            "`module:function` or `path/to/file.py:function`: what it returns, "
            "`{name: (sum, count)}`, becomes `eval_name`, the sum over the count of all batches."
        },
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": "A file of prompts that every evaluation writes completions of, into "
            "`samples.jsonl` of the run folder: `.txt`, one a line, or `.jsonl`, rows as those of "
            "the data. Those with a reference give `eval_sample_exact_match`."
        },
    )
    sample_max_new_tokens: int = field(
        default=64, metadata={"help": "Tokens of a completion, at most."}
    )
    sample_temperature: float = field(
        default=0.0,
        metadata={"help": "Completions are drawn at this temperature; 0: the likeliest token."},
    )


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
        asked["deepspeed"] = training.deepspeed_settings
        for part in (self.data, training, self.model):
            names = [f.name for f in fields(part) if f.name not in NOT_IN_FINGERPRINT]
            asked |= {name: getattr(part, name, None) for name in names}
        text = json.dumps(asked, default=_word_or_type)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _word_or_type(value: Any) -> str:
    """For JSON: an object's text may hold its address."""
    return str(value.value) if isinstance(value, Enum) else type(value).__name__

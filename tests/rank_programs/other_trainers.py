"""Trainers made of `CheckpointMixin` in two lines: other_trainers.py KIND DEMO STOP RUN [FIELDS].

In step STOP (0: never), or as soon as there is a checkpoint after that, the last rank kills itself.
FIELDS (JSON) go to the config.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from keepstep import CheckpointArguments, CheckpointMixin, RunFolder
from keepstep.ranks import collectives

KIND, DEMO, STOP, RUN, *MORE = sys.argv[1:]
ROWS = 19  # an epoch's last step of 8 rows has 3: one of four micro-batches has none


class PlainTrainer(CheckpointMixin, Trainer): ...


@dataclass
class PlainConfig(CheckpointArguments, TrainingArguments): ...


class MySFTTrainer(CheckpointMixin, SFTTrainer): ...


@dataclass
class MySFTConfig(CheckpointArguments, SFTConfig): ...


class MyDPOTrainer(CheckpointMixin, DPOTrainer): ...


@dataclass
class MyDPOConfig(CheckpointArguments, DPOConfig): ...


class MyRewardTrainer(CheckpointMixin, RewardTrainer): ...


@dataclass
class MyRewardConfig(CheckpointArguments, RewardConfig): ...


class MyGRPOTrainer(CheckpointMixin, GRPOTrainer): ...


@dataclass
class MyGRPOConfig(CheckpointArguments, GRPOConfig): ...


class KillAt(TrainerCallback):
    """SIGKILL in the middle of a step, on the last rank; its peers end through the watchdog."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = collectives.rank() == collectives.world_size() - 1
        if last and 0 < int(STOP) <= state.global_step + 1 and RunFolder(RUN).checkpoints():
            os.kill(os.getpid(), signal.SIGKILL)


def reward_for_letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(map(str.isalpha, text)) / (1 + len(text)) for text in completions]


def talks(split: str) -> list[tuple[str, str]]:
    """A question and its answer, each."""
    lines = (Path(DEMO) / f"data/{split}.jsonl").read_text().splitlines()
    count = 6 if split == "eval" else 7 if KIND == "grpo" else ROWS  # GRPO: 3 steps an epoch
    rows = [json.loads(line)["messages"] for line in lines[:count]]
    return [(row[-2]["content"], row[-1]["content"]) for row in rows]


def rows_for(split: str) -> Dataset:
    """What this kind of trainer trains on."""
    found = talks(split)
    others = [answer[::-1] for _, answer in found]
    if KIND == "trainer":
        tokens = [TOKENIZER(f"{q} {a}", truncation=True, max_length=32) for q, a in found]
        return Dataset.from_list([{"input_ids": t["input_ids"]} for t in tokens])
    if KIND == "sft":
        return Dataset.from_list([{"prompt": q, "completion": a} for q, a in found])
    if KIND == "grpo":
        return Dataset.from_list([{"prompt": q} for q, _ in found])
    pairs = zip(found, others, strict=True)
    return Dataset.from_list([{"prompt": q, "chosen": a, "rejected": o} for (q, a), o in pairs])


KINDS: dict[str, tuple[Any, Any]] = {
    "trainer": (PlainTrainer, PlainConfig),
    "sft": (MySFTTrainer, MySFTConfig),
    "dpo": (MyDPOTrainer, MyDPOConfig),
    "reward": (MyRewardTrainer, MyRewardConfig),
    "grpo": (MyGRPOTrainer, MyGRPOConfig),
}
TOKENIZER = AutoTokenizer.from_pretrained(f"{DEMO}/model")


def build() -> Any:
    kind, config = KINDS[KIND]
    fields: dict[str, Any] = {
        "output_dir": RUN,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 4e-3,
        "gradient_checkpointing": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 9,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    more: dict[str, Any] = {"processing_class": TOKENIZER}
    model: Any = f"{DEMO}/model"
    if KIND == "trainer":
        more = {"data_collator": DataCollatorForLanguageModeling(TOKENIZER, mlm=False)}
        model = AutoModelForCausalLM.from_pretrained(model)
    if KIND == "dpo":
        fields["max_length"] = 48
    if KIND == "grpo":
        more["reward_funcs"] = reward_for_letters
        fields |= {"num_generations": 2, "max_completion_length": 8, "eval_strategy": "no"}
        fields["save_total_limit"] = None
    fields |= json.loads(MORE[0]) if MORE else {}
    rows = {"train_dataset": rows_for("train")}
    if fields["eval_strategy"] != "no":
        rows["eval_dataset"] = rows_for("eval")
    return kind(model=model, args=config(**fields), callbacks=[KillAt()], **rows, **more)


if __name__ == "__main__":
    trainer = build()
    trainer.train()
    sys.exit(trainer.outcome.exit)

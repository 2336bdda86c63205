"""What no checkpoint holds is named before a run that needs it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from keepstep import CheckpointArguments
from keepstep.trainer.unrestored import check_restorable


@dataclass
class MyGRPOConfig(CheckpointArguments, GRPOConfig): ...


def told(config: type, folder: Path, **fields: Any) -> list[tuple[str, str]]:
    args = config(output_dir=str(folder), use_cpu=True, bf16=False, **fields)
    problems = check_restorable(args, "MyTrainer")
    return [(problem.what.partition(":")[0], problem.severity) for problem in problems]


@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig, DPOConfig, RewardConfig])
def test_nothing_is_refused_of_what_is_restored(tmp_path: Path, config: type) -> None:
    assert told(config, tmp_path) == []


@pytest.mark.parametrize("config", [DPOConfig, GRPOConfig, MyGRPOConfig])
def test_a_reference_model_that_changes(tmp_path: Path, config: type) -> None:
    assert told(config, tmp_path, sync_ref_model=True) == [("sync_ref_model", "error")]


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "refused"),
    [
        *((1, None, 1, False), (4, None, 1, False), (4, 2, 1, False), (4, 2, 2, False)),
        *((1, 2, 1, True), (4, 8, 1, True), (4, None, 2, True), (2, 3, 1, True)),
    ],
)
def test_completions_of_several_steps(
    tmp_path: Path, accumulation: int, per_generation: int | None, iterations: int, refused: bool
) -> None:
    fields = {"gradient_accumulation_steps": accumulation, "num_iterations": iterations}
    fields |= {} if per_generation is None else {"steps_per_generation": per_generation}
    found = told(MyGRPOConfig, tmp_path, **fields, per_device_train_batch_size=8)
    assert [severity for _, severity in found] == ["error"] * refused
    if refused:
        assert found[0][0].startswith("MyTrainer trains on the same completions")


def test_what_a_generator_beside_the_process_draws(tmp_path: Path) -> None:
    assert told(GRPOConfig, tmp_path, use_vllm=True) == [("use_vllm", "warning")]
    adapted = told(GRPOConfig, tmp_path, use_adaptive_entropy=True)
    assert adapted == [("use_adaptive_entropy", "error")]


def test_a_model_that_no_checkpoint_can_be_made_of(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    (problem,) = check_restorable(args, "MyTrainer", torch.nn.Linear(2, 2))
    assert problem.what.startswith("model: Linear is no PreTrainedModel")
    tiny = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    for model in ("a/name", None, LlamaForCausalLM(tiny)):
        assert list(check_restorable(args, "MyTrainer", model)) == []

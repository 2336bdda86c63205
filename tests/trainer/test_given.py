"""What a script asks for: its config, its rows, what train() is given."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from trl import DPOConfig, SFTConfig

from keepstep import ConfigError, KeepstepConfig, KeepstepTrainer
from keepstep.policy.drift import drift
from keepstep.trainer.given import arguments_of, digest_of_rows, recipe_of, settings_of
from keepstep.trainer.request import request_of

CPU = {"output_dir": "runs/x", "use_cpu": True, "bf16": False, "report_to": "none"}
ROWS = Dataset.from_dict({"text": ["a", "b"]})


@pytest.mark.parametrize(
    "args", [None, TrainingArguments(**CPU), SFTConfig(**CPU), DPOConfig(**CPU)]
)
def test_a_config_without_keepsteps_fields_is_refused(args: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        KeepstepTrainer(model="no/model", args=args, train_dataset=ROWS)
    (problem,) = caught.value.problems
    kind = "nothing" if args is None else type(args).__name__
    assert (
        problem.what
        == f"KeepstepTrainer is given args: {kind}, which has none of keepstep's fields"
    )
    combined = "SFTConfig" if args is None else kind
    assert f"class MyConfig(CheckpointArguments, {combined})" in problem.hint


def test_every_problem_is_told_before_anything_is_loaded() -> None:
    args = KeepstepConfig(**CPU, save_total_limit=1, learning_rate=-1, hub_token="hf_x" * 10)
    with pytest.raises(ConfigError) as caught:
        KeepstepTrainer(model="no/model", args=args, train_dataset=ROWS, eval_dataset=ROWS)
    assert {"best-is-lost", "number", "token"} <= {p.code for p in caught.value.problems}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"save_strategy": "best"}, "save_strategy: best"),
        ({"early_stopping_patience": 2}, "early_stopping_patience"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub"),
    ],
)
def test_what_needs_an_evaluation_is_refused_without_rows(fields: dict, told: str) -> None:
    args = KeepstepConfig(**CPU, **fields)
    with pytest.raises(ConfigError, match=f"{told}.* needs an evaluation, and there is no eval_da"):
        recipe_of({"args": args, "train_dataset": ROWS}, args)


def test_the_config_stays_as_it_was() -> None:
    args = KeepstepConfig(**CPU)
    before = copy.copy(vars(args))
    training = recipe_of({"args": args, "train_dataset": ROWS}, args).training
    assert (training.eval_strategy, training.keep_ranking) == ("no", "recency")
    assert vars(args) == before


def test_arguments_by_name() -> None:
    args = KeepstepConfig(**CPU)
    assert arguments_of({"args": args}, "T") is args


@pytest.mark.parametrize(
    ("configured", "given", "request_"),
    [
        *(("auto", None, "auto"), ("auto", True, "auto"), ("auto", False, "never")),
        *(("best", None, "best"), ("best", True, "best"), ("best", "best", "best")),
        *(("auto", "latest", "latest"), ("auto", 500, "500"), ("auto", "500", "500")),
        *(("auto", "runs/x/checkpoint-5", "runs/x/checkpoint-5"), ("never", False, "never")),
        ("auto", Path("runs/x/checkpoint-5"), "runs/x/checkpoint-5"),
    ],
)
def test_what_train_is_given(configured: str, given: Any, request_: str) -> None:
    training: Any = SimpleNamespace(resume_from_checkpoint=configured)
    assert request_of(given, training) == request_


@pytest.mark.parametrize(
    ("configured", "given"),
    [
        *(("never", True), ("best", "latest"), ("4", 5), ("best", False), ("latest", "a/b")),
        *(("auto", "newest"), ("auto", 1.5), ("auto", object())),
    ],
)
def test_what_contradicts_itself_or_means_nothing(configured: str, given: Any) -> None:
    training: Any = SimpleNamespace(resume_from_checkpoint=configured)
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        request_of(given, training)


def test_rows_are_known_by_their_content() -> None:
    class Listed:
        """As torch has data sets."""

        def __init__(self, *values: int) -> None:
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"x": self.values[index]}

    assert digest_of_rows(Listed(1, 2)) == digest_of_rows(Listed(1, 2))
    assert digest_of_rows(Listed(1, 2)) != digest_of_rows(Listed(1, 3))
    assert digest_of_rows({"a": ROWS, "b": None}).keys() == {"a", "b"}
    assert digest_of_rows(ROWS.to_iterable_dataset()) is None


TINY = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
)


def model(seed: int = 0, adapted: bool = False) -> Any:
    torch.manual_seed(seed)
    made = LlamaForCausalLM(TINY)
    torch.manual_seed(0)
    return get_peft_model(made, LoraConfig(target_modules=["q_proj"])) if adapted else made


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of the settings that a resume refuses."""
    compared = []
    for given in (before, now):
        args = KeepstepConfig(**CPU)
        recipe = recipe_of({"args": args, "train_dataset": ROWS} | given, args)
        trainer: Any = SimpleNamespace(model=given.get("model"), processing_class=None)
        compared.append(settings_of(recipe, {"train_dataset": ROWS} | given, trainer))
    return [line.partition(":")[0] for line in drift(*compared)]


def test_the_weights_under_an_adapter_are_known_by_content() -> None:
    before = {"model": model(0, adapted=True)}
    assert changed(before, {"model": model(0, adapted=True)}) == []
    assert changed(before, {"model": model(1, adapted=True)}) == ["base_weights"]
    with torch.no_grad():  # what is trained is in the checkpoint
        trained = model(0, adapted=True)
        for weight in trained.parameters():
            weight.add_(1.0 if weight.requires_grad else 0.0)
    assert changed(before, {"model": trained}) == []


def test_a_whole_model_is_in_the_checkpoint_itself() -> None:
    assert changed({"model": model(0)}, {"model": model(1)}) == []


@pytest.mark.parametrize("layers", [(None, 0), (0, 1)])
def test_which_weights_are_trained_is_compared(layers: tuple[int | None, int]) -> None:
    """Also where as many are: the optimizer's state would be taken for another weight's."""
    models = [model(0), model(0)]
    for made, frozen in zip(models, layers, strict=True):
        if frozen is not None:
            made.model.layers[frozen].requires_grad_(False)
    assert changed({"model": models[0]}, {"model": models[1]}) == ["trained_weights"]


def test_a_formatting_function_is_known_by_what_it_makes() -> None:
    given = {"model": model(0), "formatting_func": lambda row: row["text"]}
    same = {"model": model(0), "formatting_func": lambda row: str(row["text"])}
    other = {"model": model(0), "formatting_func": lambda row: row["text"] + "!"}
    drawing = {"model": model(0), "formatting_func": lambda row: f"{torch.rand(1) * 0} {row}"}
    before = torch.get_rng_state()
    assert changed(given, same) == []
    assert changed(given, other) == ["formatted_rows"]
    assert changed(drawing, drawing) == []
    assert torch.get_rng_state().equal(before), "random numbers were used up"

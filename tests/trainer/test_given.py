"""What a script asks for: its config, its rows, what train() is given."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from keepstep import ConfigError, KeepstepConfig, KeepstepTrainer
from keepstep.trainer.given import arguments_of, digest_of_rows, recipe_of
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

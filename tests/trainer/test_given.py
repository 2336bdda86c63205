"""What a script asks for: its config, its rows, what train() is given."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import DPOConfig, SFTConfig

from keepstep import CheckpointMixin, ConfigError, KeepstepConfig, KeepstepError, KeepstepTrainer
from keepstep.policy.drift import drift
from keepstep.trainer.given import arguments_of, check_rows, digest_of_rows, recipe_of, settings_of
from keepstep.trainer.program import known_by
from keepstep.trainer.request import check_unchanged, plain_fields, request_of

CPU: dict[str, Any] = {"output_dir": "runs/x", "use_cpu": True, "bf16": False, "report_to": "none"}
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


def test_a_trainer_that_deals_its_rows_itself_cannot_leave_them_out() -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return super().get_train_dataloader()

    class Combined(CheckpointMixin, Own): ...

    args = KeepstepConfig(**CPU, on_nonfinite="rewind")
    with pytest.raises(ConfigError, match="on_nonfinite: rewind: Own deals the rows of a step"):
        Combined(model="no/model", args=args, train_dataset=ROWS, eval_dataset=ROWS)


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


def test_a_config_that_is_changed_after_the_trainer_was_made() -> None:
    """What a resume compares, and where checkpoints lie, is what the trainer was made with."""
    args = KeepstepConfig(**CPU)
    made = plain_fields(args)
    check_unchanged(made, args)
    args.output_dir, args.learning_rate, args.model_init_kwargs = "runs/y", 1.0, {"a": 1}
    told = {"output_dir", "learning_rate", "model_init_kwargs"}
    with pytest.raises(ValueError, match="was made: ") as caught:
        check_unchanged(made, args)
    assert set(str(caught.value).splitlines()[0].partition("made: ")[2].split(", ")) == told
    args.output_dir, args.learning_rate, args.model_init_kwargs = "runs/y", 1e-3, None
    with pytest.raises(ValueError, match="was made: output_dir, learning_rate\n"):
        check_unchanged(made, args)


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
    was, wanted = compared
    return [line.partition(":")[0] for line in drift(was, wanted)]


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


SEVERAL = {"a": ROWS, "b": ROWS}
NONE = Dataset.from_dict({"text": []})


@pytest.mark.parametrize(
    ("rows", "fields", "told"),
    [
        ({"train_dataset": NONE, "eval_dataset": ROWS}, {}, "train_dataset has no rows"),
        ({"eval_dataset": NONE}, {}, "eval_dataset has no rows"),
        ({"eval_dataset": {"a": ROWS, "b": NONE}}, {}, "eval_dataset 'b' has no rows"),
        ({"eval_dataset": SEVERAL}, {}, "metric_for_best_model: eval_loss: of several"),
        ({"eval_dataset": SEVERAL}, {"metric_for_best_model": "c_loss"}, "eval_a_loss, eval_b"),
    ],
)
def test_rows_that_cannot_be_meant_are_told_at_once(rows: dict, fields: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeepstepTrainer(
            model="no/model", args=KeepstepConfig(**CPU, **fields), **{"train_dataset": ROWS} | rows
        )
    assert any(told in str(problem) for problem in caught.value.problems)


def test_a_stream_without_rows_is_told() -> None:
    empty = IterableDataset.from_generator(lambda: iter(()))
    (told,) = check_rows({"train_dataset": empty}, KeepstepConfig(**CPU))
    assert told.what == "train_dataset is a stream without rows"


@pytest.mark.parametrize(("stage", "processes"), [(3, 2), (0, 2), (3, 1)])
def test_rows_without_an_image_hang_under_zero(stage: int, processes: int) -> None:
    """A rank with such rows alone does not enter the vision tower with the others."""
    rows = Dataset.from_dict({"images": [["a.png"], [], []], "text": ["a", "b", "c"]})
    training = SimpleNamespace(ranking_metric=None, zero_stage=stage, world_size=processes)
    processor = ProcessorMixin.__new__(ProcessorMixin)
    given = {"train_dataset": ROWS, "eval_dataset": {"seen": rows}, "processing_class": processor}
    told = [problem.what for problem in check_rows(given, training)]
    expected = "2 of 3 rows of eval_dataset 'seen' have no image: under ZeRO-3 a rank with such "
    expected += "rows alone leaves the others waiting in the vision tower"
    assert told == ([expected] if (stage, processes) == (3, 2) else [])
    assert list(check_rows(given | {"processing_class": object()}, training)) == []


def test_one_of_several_sets_ranks() -> None:
    args = KeepstepConfig(**CPU, metric_for_best_model="a_loss")
    assert list(check_rows({"train_dataset": ROWS, "eval_dataset": SEVERAL}, args)) == []


def test_no_evaluation_by_name_is_no_evaluation() -> None:
    args = KeepstepConfig(**CPU, eval_strategy="no")
    assert recipe_of({"train_dataset": ROWS}, args).training.keep_ranking == "recency"


def scaled(by: float) -> Any:
    return lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean() * by


class Collator:
    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, rows: list) -> list:
        return rows[: self.longest]


def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.loss  # as it comes


def otherwise(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return -outputs.loss


otherwise.__qualname__ = "loss"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (loss, otherwise),
        (scaled(1.0), scaled(2.0)),
        (partial(loss, labels=1), partial(loss, labels=2)),
        (Collator(3), Collator(4)),
        (DataCollatorWithPadding(None, padding=True), DataCollatorWithPadding(None, padding=False)),
        (eval("lambda o, l: o"), eval("lambda o, l: -o")),
    ],
)
def test_code_that_does_another_thing_is_known(one: Any, other: Any) -> None:
    assert known_by(one) == known_by(one)
    assert known_by(one) != known_by(other)


def test_a_function_whose_closure_is_not_filled_yet() -> None:
    def loss(outputs: Any) -> Any:
        return outputs * factor * later

    factor = 2.0
    known = known_by(loss)
    assert known is not None
    later = 3.0
    assert known_by(loss) != known


def test_a_comment_and_a_library_change_nothing(tmp_path: Path) -> None:
    texts = ["def loss(o):\n    return o\n", "# why\n\ndef loss(o):\n    return  o  # as it is\n"]
    found = []
    for number, text in enumerate(texts):
        path = tmp_path / f"m{number}.py"
        path.write_text(text)
        spec: Any = spec_from_file_location(path.stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(known_by(module.loss))
    assert found[0] == found[1]
    assert known_by(default_data_collator) == "default_data_collator"
    assert known_by(None) is None


def test_code_without_a_source_is_the_same_in_every_process() -> None:
    code = "from keepstep.trainer.program import known_by; "
    code += "print(known_by(eval(\"lambda o: o in {'a', 'b', 'c', 'd'}\")))"
    told = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.add(done.stdout.splitlines()[-1])
    assert len(told) == 1


def test_a_push_by_hand_is_refused() -> None:
    made = object.__new__(KeepstepTrainer)
    manager: Any = SimpleNamespace(run=SimpleNamespace(path=Path("runs/x")))
    made.manager = manager
    with pytest.raises(KeepstepError, match="keepstep push runs/x --repo_id"):
        made.push_to_hub()

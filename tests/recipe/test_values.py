"""Every field of every config class, from YAML and from flags: as TRL's own parser takes it."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from trl import TrlParser

from keepstep.recipe.config import KeepstepConfig
from keepstep.recipe.parse import PARTS, RecipeParser, parse_recipe
from keepstep.recipe.values import kinds_of, takes, takes_several

FIELDS = RecipeParser().fields
# Values that the libraries take, where not every value of the type is.
SAMPLES: dict[str, list[Any]] = {
    "accelerator_config": [{"split_batches": True}],
    "column_names": [{"prompt": "question"}],
    "datasets": [[{"path": "a", "columns": ["x"], "fraction": 0.5}, {"path": "b", "fraction": 1}]],
    "data_files": [{"train": "x"}],
    "eval_datasets": [{"math": "math.jsonl"}],
    "debug": [["underflow_overflow"], "underflow_overflow"],
    "deepspeed": [{"zero_optimization": {"stage": 0}}],
    "dataloader_prefetch_factor": [],  # not without workers
    "ddp_backend": [None],  # others need a launcher
    "fsdp": ["full_shard"],
    "fsdp_config": [{"version": 2}],
    "include_num_input_tokens_seen": [True, False],
    "liger_kernel_config": [{"rope": True}],
    "load_best_model_at_end": [False],
    "local_rank": [-1],
    "lora_dropout": [0.5, "5e-1"],
    "lora_target_modules": [["q", "v"]],
    "pad_to_multiple_of": [8, "8", "auto"],
    "parallelism_config": [{"tp_size": 1}],
    "report_to": [["a", "b"], "a"],
    "save_steps": [2, 50, "60"],
    "eval_steps": [2, 50, "60"],
    "logging_steps": [2, 50, "60"],
    "tf32": [False],
    "trackio_static_space_id": ["a/b", False],
}
TRL_REFUSES_AS_FLAGS = {  # several values; JSON where it has no reader; words beside yes and no
    *("report_to", "optim_target_modules", "liger_kernel_config", "parallelism_config"),
    *("column_names", "eval_datasets"),
}


def samples(name: str) -> list[Any]:
    """Values of a field, as YAML holds them."""
    if name in SAMPLES:
        return SAMPLES[name]
    field, hint = FIELDS[name]
    choices = field.metadata.get("choices")
    if choices:
        return [choice for choice in choices if choice is not None][:2]
    found: list[Any] = []
    for kind in kinds_of(hint):
        if get_origin(kind) is list:
            found.append(["a", "b"])
        elif kind is dict or get_origin(kind) is dict:
            found.append({"a": 1, "b": {"c": "d"}})
        elif isinstance(kind, type) and hasattr(kind, "__members__"):
            found.extend(member.value for member in list(kind.__members__.values())[:2])
        elif get_args(kind):
            found.extend(get_args(kind)[:2])
        else:
            found += {bool: [True, "no"], int: [2, "3"], float: [0.25, "2e-1", 1]}.get(kind, [])
    if str in kinds_of(hint) and len(found) == 0:
        found.append("word")
    return found + [None] * (type(None) in kinds_of(hint))


def taken(parser: Any, name: str, *argv: str) -> Any:
    parts = parser(list(argv))
    value = next(getattr(p, name) for p in parts if name in {f.name for f in fields(p)})
    return plain(value)


def plain(value: Any) -> Any:
    """Without a library's objects, which may not know when they are equal."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def theirs(argv: list[str]) -> Any:
    return TrlParser(PARTS, allow_abbrev=False).parse_args_and_config(argv)


def ours(argv: list[str]) -> Any:
    recipe = parse_recipe(argv)
    return recipe.data, recipe.training, recipe.model


def test_there_is_a_value_for_every_field() -> None:
    assert len(FIELDS) > 170
    without = [name for name in FIELDS if not samples(name)]
    assert without == ["dataloader_prefetch_factor"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_yaml_is_what_trl_makes_of_it(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for value in samples(name):
        recipe.write_text(yaml.safe_dump({name: value}))
        expected = taken(theirs, name, "--config", str(recipe))
        if name == "parallelism_config" and value:  # TRL leaves a mapping, which transformers
            expected = {"tp_size": 1, **taken(ours, name, "--config", str(recipe))}  # cannot use
        if name == "output_dir" and value is None:
            expected = None  # not `trainer_output`
        assert taken(ours, name, "--config", str(recipe)) == expected, value


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_is_what_trl_makes_of_it(name: str) -> None:
    for value in samples(name):
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        words = [json.dumps(w) if isinstance(w, dict) else str(w) for w in listed]
        flag = [f"--{name}", *words]
        try:
            expected = taken(theirs, name, *flag)
        except (ValueError, SystemExit):
            assert name in TRL_REFUSES_AS_FLAGS
            expected = value
        if any(isinstance(w, dict) for w in listed) and name in ("datasets", "parallelism_config"):
            expected = taken(ours, name, *flag)
            assert (
                json.loads(words[0]).items()
                <= (expected[0] if value is listed else expected).items()
            )
        assert taken(ours, name, *flag) == expected, flag


@pytest.mark.parametrize(
    "name", sorted(n for n, (_, hint) in FIELDS.items() if takes_several(hint))
)
def test_one_value_for_a_list_is_a_list_of_one(name: str, tmp_path: Path) -> None:
    """TRL's parser leaves the text, which is a list of letters to most of the libraries."""
    recipe = tmp_path / "r.yaml"
    word = "underflow_overflow" if name == "debug" else "lm_head"
    recipe.write_text(f"{name}: {word}\n")
    found = taken(ours, name, "--config", str(recipe))
    assert found == taken(ours, name, f"--{name}", word)
    if name == "datasets":
        assert found[0]["path"] == word
    elif name in ("report_to", "debug"):
        assert found == [word]  # TrainingArguments makes a list of it
    else:
        assert found == (word if name == "optim_target_modules" else [word])


def test_a_mapping_in_json_on_the_command_line() -> None:
    for name in KeepstepConfig._VALID_DICT_FIELDS:
        assert {dict, str} & set(kinds_of(FIELDS[name][1])), name
    mappings = {n for n, (_, hint) in FIELDS.items() if "dict" in str(hint)}
    own = {"liger_kernel_config", "column_names", "eval_datasets"}
    assert mappings == {*KeepstepConfig._VALID_DICT_FIELDS, *own}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("max_steps", "1e3", 1000),
        ("max_steps", "1_000", 1000),
        ("save_total_limit", "none", None),
        ("save_total_limit", "null", None),
        ("bf16", "null", False),  # then where the hardware has it
        ("report_to", "none", []),
        ("time_limit", "3:30:00", "3:30:00"),  # no number of base 60, as YAML has it
        ("deadline", "2026-11-25T08:00:00", "2026-11-25T08:00:00"),
        ("deadline", "2026-11-25", "2026-11-25"),
        ("run_name", "7", "7"),
        ("output_dir", "~/x", str(Path.home() / "x")),
        ("model_name_or_path", "~/m", str(Path.home() / "m")),
        ("eval_dataset_name", "~nobody_of_this_name/x", "~nobody_of_this_name/x"),
        ("chat_template_path", "~/t.jinja", str(Path.home() / "t.jinja")),
        ("resume_from_checkpoint", "~/r/checkpoint-3", str(Path.home() / "r/checkpoint-3")),
        ("resume_from_checkpoint", "3", "3"),
        ("eval_strategy", "no", "no"),
        ("packing", "0", False),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("lora_target_modules", "[q_proj]", ["q_proj"]),  # to peft a text is a pattern
        ("lora_target_modules", ".*_proj", ".*_proj"),
        (
            "debug",
            "underflow_overflow tpu_metrics_debug",
            ["underflow_overflow", "tpu_metrics_debug"],
        ),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),  # TRL's parser refuses it
    ],
)
def test_values_as_people_write_them(tmp_path: Path, name: str, text: str, expected: Any) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"{name}: {text}\n")
    assert taken(ours, name, "--config", str(recipe)) == expected


def test_a_flag_for_yes_or_no_needs_no_value() -> None:
    elsewhere = (
        "tf32",
        "load_best_model_at_end",
        "dataloader_pin_memory",
    )  # asks for a GPU, or more
    for name, (_, hint) in FIELDS.items():
        if takes(hint, bool) and name not in elsewhere:
            assert taken(ours, name, f"--{name}") in (True, "all"), name
    assert taken(ours, "packing", "--packing", "--seed", "3") is True
    assert taken(ours, "gradient_checkpointing", "--no_gradient_checkpointing") is False
    assert taken(ours, "learning_rate", "--learning-rate", "1") == 1.0

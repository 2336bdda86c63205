"""Recipes: YAML and flags, and what is said of mistakes. Needs torch, not several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.trainer_utils import SchedulerType

from keepstep.policy.auto_interval import AutoInterval
from keepstep.preflight.libraries import _compiled
from keepstep.preflight.validate import validate
from keepstep.recipe.config import ConfigError, KeepstepConfig
from keepstep.recipe.parse import parse_recipe
from tests.helpers.folders import commit
from tests.helpers.ranks import ROOT

MINIMAL = {
    "model_name_or_path": "owner/model",
    "dataset_name": "owner/data",
    "output_dir": "runs/x",
}


AUTO: dict[str, object] = {"save_interval_seconds": "auto"}
QUANTIZED: dict[str, object] = {"use_peft": True, "load_in_8bit": True}


def flags(**fields: object) -> list[str]:
    return [text for n, v in (MINIMAL | fields).items() for text in (f"--{n}", str(v))]


def problems(argv: list[str]) -> list[str]:
    try:
        return [str(problem) for problem in validate(parse_recipe(argv, validate=validate))]
    except ConfigError as error:
        return [str(problem) for problem in error.problems]


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=str)
def test_shipped_recipes_parse(recipe: Path) -> None:
    parsed = parse_recipe(["--config", str(recipe)])
    missing = ["there is no ", "no folder with a config.json"]  # made by the demo, or the user
    missing += ["bitsandbytes is not installed"]  # QLoRA's
    found = [str(p) for p in validate(parsed)]
    assert [p for p in found if not any(text in p for text in missing)] == []


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("max_steps: 7\nlearning_rate: 1e-3\nlora_r: 4\n")
    recipe = parse_recipe(["--config", str(tmp_path / "r.yaml"), "--max_steps", "9"])
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (9, 1e-3)
    assert recipe.model.lora_r == 4


def test_an_interval_is_a_number_or_auto() -> None:
    """From a recipe, as a flag, from HfArgumentParser (text), in a script."""
    given = {"auto": "auto", "600": 600.0, "1e3": 1000.0, "null": None}
    for text, expected in given.items():
        training = parse_recipe(flags(save_interval_seconds=text)).training
        assert training.save_interval_seconds == expected
    training = KeepstepConfig(output_dir="x", save_interval_seconds="auto", save_min_seconds=3)
    assert training.save_interval == AutoInterval(0.01, 3) == training.schedule().interval
    assert KeepstepConfig(output_dir="x", save_interval_seconds="90").save_interval == 90
    recipe = parse_recipe(flags())
    recipe.training = KeepstepConfig(output_dir="x", save_interval_seconds="often")
    (problem,) = validate(recipe)
    assert "save_interval_seconds: 'often' is neither a number of seconds nor auto" in str(problem)


def test_defaults_keep_a_run_safe() -> None:
    training = parse_recipe(flags(save_steps=50)).training
    assert training.resume_from_checkpoint == "auto"
    assert training.eval_steps == 50
    policy = training.policy()
    assert (policy.limit, policy.ranking, policy.metric) == (3, "metric", "eval_loss")
    assert not policy.greater_is_better
    assert problems(flags()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_step: 3", "unknown field max_step\n    Hint: did you mean `max_steps`?"),
        ("max_steps: many", "max_steps: 'many' is not a value of type int"),
        ("max_steps: 2.5", "max_steps: 2.5 is not a value of type int"),
        ("learning_rate: [1]", "learning_rate: [1] is not a value of type float"),
        ("output_dir: 7\nlearning_rate: true", "learning_rate: True is not a value of type float"),
        ("eval_strategy: sometimes", "eval_strategy: 'sometimes' is none of: no, steps, epoch"),
        ("- a\n- b", "holds no `field: value` lines"),
        ("", "holds no `field: value` lines"),
        ("a: [", "is not YAML"),
        ("{{x}}", "is not YAML"),
        ("a: 1\n---\na: 2", "is not YAML"),
        ("[" * 2000, "is not YAML"),
        ("deadline: 2026-13-77", "is not YAML: month must be in 1..12"),
        ("caf\xe9: 1".encode("latin-1"), "is not YAML: unacceptable character #x00e9"),
        ("seed: 1\noutput_dir: x\nseed: 2", "says twice: seed: in line 1, and in line 3"),
        ("card: {license: mit, license: gpl}", "says twice: license: in line 1, and in line 1"),
        ("max_steps:", "max_steps: it is empty"),
        ("packing: [yes]", "packing: [True] is not true or false"),
        ("packing: 2", "packing: 2 is not true or false"),
        ("learning_rate: .nan", "learning_rate: nan is not a value of type float"),
        ("run_name: {a: b}", "run_name: {'a': 'b'} is not a value of type str"),
        ("run_name: on", "True is not a value of type str (YAML reads a bare yes, no, on, off so"),
        ("model_revision: 1.10", "1.1 is a number to YAML, which keeps not all of its digits"),
        ("lr_scheduler_kwargs: min_lr", "'min_lr' is not a mapping, as in `{name: value}`"),
        ("lr_scheduler_kwargs: '{min_lr: 1}'", "'{min_lr: 1}' is no JSON"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: [1] is not a mapping"),
        ("lora_target_modules: [[q]]", "lora_target_modules: ['q'] is not a value of type str"),
        ("report_to: {a: b}", "report_to: {'a': 'b'} is not a value of type str"),
        ("liger_kernel_config: {rope: maybe}", "rope: 'maybe' is not true or false"),
        ("datasets: [{pth: x}]", "datasets: unknown: pth; it has path, name, "),
        ("datasets: [{split: x}]", "datasets: path is missing"),
        ("datasets: [{path: x, fraction: a}]", "fraction: 'a' is not a value of type float"),
        ("datasets: 7", "datasets: 7 is not what it takes"),
        ("debug: overflow", "debug: 'overflow' is none of: underflow_overflow"),
        ("deepspeed: no.json", "deepspeed: there is no file no.json"),
        ("output_dir: $HOME/x", "output_dir: $HOME/x: variables are not replaced here; write /"),
        ("model_name_or_path: ${NOWHERE}/x", "model_name_or_path: ${NOWHERE}/x: variables"),
        ("1: 2", "unknown field 1"),
        ("env: {A: b}", "unknown field env\n    Hint: environment variables are set in the shell"),
        ("training: {lr: 1, seed: 2}", "a recipe has no sections: write lr, seed at its top"),
        ("lr: 1e-4", "unknown field lr\n    Hint: did you mean `learning_rate`?"),
        ("epochs: 3", "did you mean `num_train_epochs`?"),
        ("batch_size: 3", "did you mean `per_device_train_batch_size`?"),
        ("per_device_batch_size: 3", "did you mean `per_device_train_batch_size`?"),
        ("Learning-Rate: 3", "did you mean `learning_rate`?"),
        ("xyzzy: 3", "unknown field xyzzy\n    Hint: `--help` lists every field."),
        ("accelerator_config: {x: 1}", "unexpected keyword argument 'x'"),
        ("deepspeed: {zero_optimization: 3}", "AttributeError: 'int' object has no attribute"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str | bytes, expected: str) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "r.yaml").write_bytes(raw)
    own = {name for name in MINIMAL if f"{name}:".encode() in raw}
    rest = [t for n, v in MINIMAL.items() if n not in own for t in (f"--{n}", v)]
    (problem,) = problems(["--config", str(tmp_path / "r.yaml"), *rest])
    assert expected in problem


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["learning_rate=1"], "learning_rate=1 is no flag\n    Hint: --learning_rate 1"),
        (["lr=1"], "lr=1 is no flag\n    Hint: --learning_rate 1"),
        (["b"], "command line: 'b' belongs to no flag"),
        (["r.yaml"], "r.yaml belongs to no flag\n    Hint: --config r.yaml"),
        (["--lr", "1"], "unknown flag --lr\n    Hint: did you mean `learning_rate`?"),
        (["--lr=1"], "unknown flag --lr\n    Hint: did you mean `learning_rate`?"),
        (["-lr", "1"], "unknown flag --lr\n    Hint: did you mean `learning_rate`?"),
        (["--num_processes", "2"], "Hint: the launcher's: KEEPSTEP_PROCESSES"),
        (["--max_steps"], "max_steps: it is given no value"),
        (["--max_steps", "--seed", "3"], "max_steps: it is given no value"),
        (["--report_to"], "report_to: it is given no value"),
        (["--max_steps", "1", "2"], "command line: '2' belongs to no flag"),
        (["--packing", "maybe"], "packing: 'maybe' is not true or false"),
        (["--no_packing", "1"], "unknown flag --no_packing"),
        (["--max_steps=x"], "max_steps: 'x' is not a value of type int"),
        (["--config"], "command line: argument --config: expected one argument"),
        (["--config", "a.yaml", "--config", "b.yaml"], "given 2 times: a.yaml, b.yaml"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], expected: str) -> None:
    (problem,) = problems([*flags(), *arguments])
    assert expected in problem


def test_all_mistakes_of_a_recipe_stand_in_one_report(tmp_path: Path) -> None:
    """Of the fields, of what libraries refuse of them together, and of what preflight sees; but
    nothing that only follows from another one."""
    lines = ["max_step: 3", "learning_rate: fast", "fp16: true", "bf16: true", "tf32: yes"]
    lines += ["save_total_limit: 1", "load_in_8bit: true", "load_in_4bit: true", "outputdir: x"]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "seed: 1", "seed: 2"]))
    named = ["--model_name_or_path", "owner/model", "--lr", "3"]
    found = problems(["--config", str(tmp_path / "r.yaml"), *named])
    expected = [
        "says twice: seed: in line 10, and in line 11",
        "unknown field max_step\n",
        "unknown field outputdir\n    Hint: did you mean `output_dir`?",
        "unknown flag --lr\n",
        "learning_rate: 'fast' is not",
        "At most one of fp16 and bf16 can be True",
        "--tf32 requires Ampere",
        "You can't use 8 bit and 4 bit precision at the same time",
        "neither dataset_name nor datasets is set",
        "save_total_limit: 1 keeps the newest checkpoint only",
    ]
    assert len(found) == len(expected), found
    for text, problem in zip(expected, found, strict=True):
        assert text in problem


def test_a_file_that_is_not_there() -> None:
    (problem,) = problems(["--config", "nowhere.yaml"])
    assert problem == "the recipe nowhere.yaml cannot be read: No such file or directory"


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("max_steps: 0100\nseed: 1_000\nlearning_rate: 1.5e-4\nlogging_steps: 0x10\n")
    training = parse_recipe(["--config", str(path), *flags()]).training
    assert (training.max_steps, training.seed, training.logging_steps) == (100, 1000, 16)
    assert training.learning_rate == 1.5e-4
    path.write_text("max_steps: 1:30\nlearning_rate: 1:30.5\n")
    found = problems(["--config", str(path), *flags()])
    assert "max_steps: '1:30' is not a value of type int" in "\n".join(found)
    assert "learning_rate: '1:30.5' is not a value of type float" in "\n".join(found)
    path.write_text("time_limit: 3:30\n")
    assert "'3:30' is no length of time" in "\n".join(problems(["--config", str(path), *flags()]))


def test_yaml_reads_no_as_false(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("eval_strategy: no\nsave_strategy: no\n")
    training = parse_recipe(["--config", str(tmp_path / "r.yaml"), *flags()]).training
    assert training.eval_strategy == "no"


SETS = {"eval_datasets": '{"math": "x/y"}', "metric_for_best_model": "eval_math_loss"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eval_strategy": "no"}, "leaves nothing to rank them by"),
        ({"save_total_limit": 1}, "so the best one is lost"),
        ({"save_total_limit": 0}, "save_total_limit: 0 is not above 0"),
        (
            {"save_steps": 0.2, "eval_steps": 0.1, "max_steps": 25},
            "save_steps: 0.2 (5 of 25 steps) is no multiple of eval_steps: 0.1 (3 of 25 steps)",
        ),
        (
            {"save_steps": 0.2, "eval_steps": 4, "max_steps": 25},
            "save_steps: 0.2 (5 of 25 steps) is no multiple of eval_steps: 4,",
        ),
        ({"save_steps": 0.95, "max_steps": 10}, "there is no checkpoint inside of it"),
        ({"save_steps": 30, "eval_steps": 20}, "is no multiple of eval_steps"),
        ({"save_strategy": "epoch"}, "save_strategy: epoch and eval_strategy: steps do not meet"),
        ({"eval_strategy": "epoch"}, "save_strategy: steps and eval_strategy: epoch do not meet"),
        ({"hub_token": "hf_x"}, "export HF_TOKEN"),
        ({"model_name_or_path": "./gone"}, "no folder with a config.json"),
        ({"dataset_name": "./gone.jsonl"}, "there is no ./gone.jsonl"),
        ({"eval_split_fraction": 1.5}, "is not between 0 and 1"),
        ({"resume_from_checkpoint": "sometimes"}, "none of auto, latest, best, never"),
        ({"keep_total_bytes": "lots"}, "no size like 200GB"),
        ({"metric_for_best_model": ""}, "metric_for_best_model is not set"),
        ({"min_free_bytes": "some"}, "min_free_bytes: 'some' is no size"),
        ({"node_local": True}, "node_local: each machine has a part of every checkpoint, and"),
        ({"mirror": "file:///d", "output_dir": "/d/run"}, r"to /d/run, which is not apart from"),
        ({"mirror": "file:///d/run/m", "output_dir": "/d/run"}, "to /d/run/m/run, which is not"),
        ({"mirror": "file:///d", "output_dir": "/d/run/run"}, "to /d/run, which is not apart from"),
        ({"metric_for_best_model": "rouge"}, "rouge is nothing that the evaluation gives"),
        ({"metric_for_best_model": "entropy"}, "entropy: is more of it better?"),
        ({"greater_is_better": True}, "true keeps the worst checkpoints by eval_loss"),
        (
            {"metric_for_best_model": "0.5*eval_loss + 2"},
            "neither a metric nor a weight * a metric",
        ),
        ({"metric_for_best_model": "0.5*loss + 0.5*rouge"}, "eval_rouge is nothing that"),
        (
            {"metric_for_best_model": "loss + mean_token_accuracy"},
            "of one more is better, of another less",
        ),
        (
            SETS | {"eval_datasets": '{"math": "gone.jsonl"}'},
            "eval_datasets: math: there is no gone.jsonl",
        ),
        (
            SETS | {"eval_datasets": '{"math": "x/y", "a*b": "x/y"}'},
            "'a*b' cannot be a part of a metric's name",
        ),
        ({"eval_datasets": '{"math": "x/y"}'}, "eval_loss is nothing that the evaluation gives"),
        (
            SETS | {"eval_dataset_name": "x/z"},
            "eval_dataset_name and eval_datasets are both set",
        ),
        ({"save_strategy": "no"}, "a run that is killed begins again"),
        (
            {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 1},
            "the first checkpoint is the last",
        ),
        ({"save_steps": 40, "max_steps": 40}, "there is no checkpoint inside of it"),
        ({"save_only_model": True}, "checkpoints hold weights and no state"),
        ({"card": "mit"}, "card: 'mit' is not a mapping"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would change the rows"),
        ({"save_timeout_seconds": 9e9}, "save_timeout_seconds: 9e+09 is not between 0 and"),
        ({"save_interval_seconds": 0}, "save_interval_seconds: 0 is not above 0"),
        ({"save_interval_seconds": "soon"}, "'soon' is not a value of type float, nor auto"),
        ({"save_interval": "auto"}, "did you mean `save_interval_seconds`?"),
        ({"max_save_overhead": 0.1}, "0.1 has no effect without save_interval_seconds: auto"),
        (AUTO | {"save_min_seconds": -1}, "save_min_seconds: -1 is below 0"),
        (AUTO | {"max_save_overhead": 1}, "max_save_overhead: 1 is not above 0 and below 1"),
        (AUTO | {"max_save_overhead": 0}, "max_save_overhead: 0 is not above 0 and below 1"),
        (AUTO | {"save_total_limit": "null"}, "keeps every checkpoint, and may save every 10 s"),
        ({"max_failed_saves": 0}, "max_failed_saves: 0 is not above 0"),
        ({"spike_sigma": 0}, "spike_sigma: 0 is no number of standard deviations above 0"),
        ({"spike_window": 4}, "spike_window: 4 is not between 5 and 10000 steps"),
        ({"max_rewinds": -1}, "max_rewinds: -1 is below 0"),
        ({"on_spike": "stop"}, "on_spike: stop: without spike_sigma no spike is looked for"),
        (
            {"on_nonfinite": "rewind", "dataset_streaming": True, "max_steps": 900},
            "on_nonfinite: rewind: rows of a stream have no number",
        ),
        (
            {"on_spike": "rewind", "spike_sigma": 6, "train_sampling_strategy": "batch_rebalance"},
            "on_spike: rewind: train_sampling_strategy: batch_rebalance deals the rows itself",
        ),
        ({"last_save_retry_seconds": -1}, "last_save_retry_seconds: -1 is below 0"),
        ({"time_limit": "soon"}, "'soon' is no length of time"),
        ({"ignore_data_skip": True}, "would be given the same rows again"),
        ({"dataset_streaming": True}, "a stream has no length that is known"),
        (
            {"dataset_streaming": True, "max_steps": 900, "save_strategy": "epoch"}
            | {"keep_ranking": "recency"},
            "save_strategy: epoch: where a pass over a stream ends is not known",
        ),
        ({"deadline": "2020-01-01T00:00"}, "the deadline is over before a step can be made"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is not above 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size: 0 is not above 0"),
        ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps: -2 is not above 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: 0 leaves nothing to train"),
        ({"max_steps": 0}, "max_steps: 0 is not above 0"),
        ({"max_steps": -2}, "max_steps: -2 is not above 0"),
        ({"learning_rate": -1}, "learning_rate: -1 is below 0"),
        ({"learning_rate": "inf"}, "learning_rate: inf is not finite"),
        ({"adam_beta2": 1}, "adam_beta2: 1 is not between 0 and below 1"),
        ({"seed": 2**32}, "seed: 4.29497e+09 is not between 0 and 4294967295"),
        ({"save_steps": -5, "keep_ranking": "recency"}, "save_steps: -5 is not above 0"),
        ({"logging_steps": -5}, "logging_steps: -5 is not above 0"),
        ({"max_length": 0}, "max_length: 0 is not above 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: 0 is not above 0"),
        ({"keep_every_n_steps": 0}, "keep_every_n_steps: 0 is not above 0"),
        ({"hang_timeout_seconds": 0}, "hang_timeout_seconds: 0 is not above 0"),
        ({"use_peft": True, "lora_r": 0}, "lora_r: 0 is not above 0"),
        ({"use_peft": True, "lora_dropout": 1}, "lora_dropout: 1 is not between 0 and below 1"),
        ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "lora_task_type: SEQ_CLS: a causal"),
        ({"lora_r": 8}, "lora_r: 8 has no effect without use_peft: true"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs: {}: One of min_lr or",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_kwargs takes num_decay_steps, num_stable_steps, warmup_type, decay_type",
        ),
        ({"lr_scheduler_kwargs": '{"power": 2}'}, "got an unexpected keyword argument 'power'"),
        ({"optim": "adamw_bnb_8bit"}, "optim: adamw_bnb_8bit: You need to install `bitsandbytes`"),
        ({"optim": "lomo"}, "optim: lomo: You need to install `lomo_optim`"),
        ({"optim_args": "betas"}, "optim: adamw_torch_fused: not enough values to unpack"),
        ({"report_to": "wandbb"}, "report_to: wandbb is none of: none, all, azure_ml, clearml"),
        ({"chat_template_path": "gone.jinja"}, "chat_template_path: there is no gone.jinja"),
        ({"chat_template_path": "./a/gone"}, "chat_template_path: there is no ./a/gone"),
        ({"chat_template_path": "README.md"}, "README.md is no file ending in .jinja"),
    ],
)
def test_preflight(fields: dict[str, object], expected: str) -> None:
    (problem,) = problems(flags(**fields))
    assert expected in problem


def test_one_step_has_no_checkpoint_inside_of_it() -> None:
    assert problems(flags(max_steps=1, save_steps=1, eval_steps=1)) == []


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"report_to": "wandb"}, "report_to: wandb is not installed\n    Hint: pip install wandb"),
        ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
        ({"use_peft": True, "load_in_4bit": True}, "load_in_4bit: bitsandbytes is not installed"),
        ({"use_peft": True, "load_in_8bit": True}, "load_in_8bit: bitsandbytes is not installed"),
    ],
)
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], package: str
) -> None:
    for name in ("is_liger_kernel_available", "is_bitsandbytes_available"):
        monkeypatch.setattr(f"keepstep.preflight.libraries.{name}", lambda: False)
    there = "keepstep.preflight.libraries.get_available_reporting_integrations"
    monkeypatch.setattr(there, lambda: ["tensorboard"])
    (problem,) = problems(flags(**fields))
    assert problem.startswith(package)
    assert problems(flags(report_to="tensorboard")) == []


def test_comet_without_a_key_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does not find it then, though it is there."""
    room = "keepstep.preflight.libraries"
    monkeypatch.setattr(f"{room}.find_spec", lambda name: name == "comet_ml")
    monkeypatch.setattr(f"{room}.get_available_reporting_integrations", list)
    (problem,) = problems(flags(report_to="comet_ml"))
    assert "comet_ml is installed, but has no API key" in problem


def test_a_folder_of_two_runs(tmp_path: Path) -> None:
    commit(tmp_path, 10)
    commit(tmp_path, 20, run_id="ba9876543210")
    (problem,) = problems(flags(output_dir=tmp_path))
    assert "does not tell which run this is, and the checkpoints are of 2" in problem
    assert problem.endswith("Hint: move those of the other run out of the folder.")


def test_a_template_that_is_none(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}")
    (problem,) = problems(flags(chat_template_path=template))
    assert f"chat_template_path: {template}: Unexpected end of template" in problem
    template.write_bytes(b"\xff")
    (problem,) = problems(flags(chat_template_path=template))
    assert "'utf-8' codec can't decode byte 0xff" in problem
    template.write_text("{{ messages }}")
    assert problems(flags(chat_template_path=template)) == []


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_schedules_that_are_complete(name: str) -> None:
    kwargs = {
        "cosine_with_min_lr": {"min_lr": 1e-6},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 10},
    }
    given = {"lr_scheduler_kwargs": json.dumps(kwargs[name])} if name in kwargs else {}
    assert problems(flags(lr_scheduler_type=name, max_steps=100, save_steps=10, **given)) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hub_model_id": "name"}, "hub_model_id is 'name'"),
        ({}, "there is no token"),
        ({}, "HF_HUB_OFFLINE is set"),
        ({"hub_revision": "dev"}, "hub_revision: dev: the best goes to main"),
        ({"eval_strategy": "no", "keep_ranking": "recency"}, "there is nothing to rank them by"),
        (
            {"use_peft": True, "model_name_or_path": "./m"},
            "is of no use without its base model's name on the Hub",
        ),
        ({"card": '{"author": "hf_abcdefghijklmnop"}'}, "card holds what looks like a token"),
    ],
)
def test_publishing_without_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, object], expected: str
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("keepstep.preflight.validate.get_token", lambda: None)
    found = problems(flags(**{"push_to_hub": True, "hub_model_id": "a/b", **fields}))
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_strategy": "no", "keep_ranking": "recency"},
        {"save_total_limit": 1, "keep_ranking": "recency"},
        {"save_steps": 40, "eval_steps": 20},
        {"save_steps": 0.3, "eval_steps": 0.1},
        {"save_steps": 0.2, "eval_steps": 0.1, "max_steps": 40},
        {"save_steps": 0.2, "eval_steps": 5, "max_steps": 25},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"resume_from_checkpoint": "gone/checkpoint-20"},
        {"metric_for_best_model": "mean_token_accuracy"},
        {"metric_for_best_model": "perplexity"},
        {
            "eval_datasets": '{"math": "x/y", "code": "x/z"}',
            "metric_for_best_model": "0.7*eval_math_loss + 0.3*eval_code_loss",
        },
        {"metric_for_best_model": "eval_entropy", "greater_is_better": False},
        {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 2},
        {"save_strategy": "no", "save_interval_seconds": 600},
        {"save_interval_seconds": "null"},
        AUTO,
        AUTO | {"save_strategy": "no", "max_save_overhead": 0.05, "save_min_seconds": 0},
        AUTO | {"save_strategy": "best", "max_steps": 40},
        AUTO | {"save_total_limit": "null", "keep_total_bytes": "20GB"},
        {"save_steps": 10, "max_steps": 40},
        {"save_only_model": True, "resume_from_checkpoint": "never"},
        {"card": '{"license": "mit"}', "min_free_bytes": "1GB"},
        {"time_limit": "4h", "save_interval_seconds": 60},
    ],
)
def test_preflight_stays_silent(fields: dict[str, object]) -> None:
    assert problems(flags(**fields)) == []


@pytest.mark.parametrize(
    ("fields", "zero", "expected"),
    [
        ({}, {"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param_device: cpu needs"),
        ({}, {"stage": 3, "offload_param": {"device": "cpu"}}, None),
        (QUANTIZED, {"stage": 3}, "ZeRO-3 cannot share out 8-bit weights"),
        (QUANTIZED, {"stage": 2}, None),
        (
            {"save_only_model": True, "load_best_model_at_end": True},
            {"stage": 2},
            "DeepSpeed loads a checkpoint whole, or not at all",
        ),
    ],
)
def test_what_zero_cannot_combine(
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object],
    zero: dict[str, object],
    expected: str | None,
) -> None:
    monkeypatch.setattr("keepstep.preflight.libraries.is_bitsandbytes_available", lambda: True)
    recipe = parse_recipe(flags(resume_from_checkpoint="never", **fields))
    recipe.training.deepspeed_plugin = FakePlugin(zero_optimization=zero)
    found = [str(problem) for problem in validate(recipe)]
    assert len(found) == (0 if expected is None else 1)
    assert expected is None or expected in found[0]


def test_a_launch_on_cpu_leaves_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_cpu: true` of an accelerate config, on a machine that has one."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    training = parse_recipe(flags()).training
    assert training.use_cpu
    assert training.precision == "fp32"
    assert training.save_mode == "lazy"


@pytest.mark.parametrize(
    ("there", "settings", "missing"),
    [
        (["c++", "ninja"], {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, []),
        (
            ["c++"],
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            [("offload_optimizer_device: cpu", "ninja", "error")],
        ),
        (
            ["ninja"],
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            [("offload_optimizer_device: cpu", "c++", "warning")],
        ),
        (["c++", "ninja"], {"optimizer": {"type": "AdamW"}}, [("AdamW", "nvcc", "warning")]),
        (["c++", "ninja", "nvcc"], {"optimizer": {"type": "AdamW"}}, []),
        ([], {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ([], {"optimizer": {"type": "SGD"}}, []),
        ([], {"zero_optimization": {"stage": 3}}, []),
    ],
)
def test_what_deepspeed_would_compile(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    there: list[str],
    settings: dict[str, dict[str, object]],
    missing: list[tuple[str, str, str]],
) -> None:
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    training = parse_recipe(flags()).training
    training.use_cpu = False
    training.deepspeed_plugin = FakePlugin(**settings)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = list(_compiled(training))
    assert len(found) == len(missing)
    for problem, (what, tool, severity) in zip(found, missing, strict=True):
        assert what in problem.what
        assert problem.what.endswith(tool)
        assert problem.severity == severity


def test_the_best_of_nothing_cannot_be_loaded() -> None:
    (problem,) = problems(
        flags(load_best_model_at_end=True, eval_strategy="no", keep_ranking="recency")
    )
    assert "load_best_model_at_end requires the save and eval strategy to match" in problem


def test_one_process_with_several_gpus_and_two_ways_to_shard() -> None:
    recipe = parse_recipe(flags())
    recipe.training._n_gpu = 2
    recipe.training.fsdp = "full_shard"
    recipe.training.deepspeed_plugin = FakePlugin(zero_optimization={"stage": 2})
    assert [problem.code for problem in validate(recipe)] == ["batch", "launch"]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keepstep.preflight.validate.requires", lambda name: ["peft>=99", "typer>=0.20"]
    )
    (problem,) = validate(parse_recipe(flags()))
    assert (problem.code, problem.severity) == ("version", "warning")
    assert problem.what.startswith("peft ")
    assert problem.what.endswith("tested with >=99")


class FakePlugin:
    """Stands for Accelerate's plugin: what the launcher's environment would make of a config."""

    def __init__(self, **settings: dict[str, object]) -> None:
        self.deepspeed_config = settings
        self.zero_stage = settings.get("zero_optimization", {}).get("stage", 0)


@pytest.mark.parametrize(
    ("fields", "settings", "reason"),
    [
        ({}, {"zero_optimization": {"stage": 3}}, None),
        ({"optim": "sgd"}, None, None),
        ({"optim": "sgd"}, {}, None),  # stage 0: whole on every rank
        ({"optim": "sgd"}, {"zero_optimization": {"stage": 2}}, "optim: sgd has not been tested"),
        (
            {},
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "an optimizer or parameters on NVMe are not resharded",
        ),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            None,
            "train_sampling_strategy: batch_rebalance deals out rows by that number",
        ),
    ],
)
def test_what_is_not_resharded_is_known_before_a_model_is_loaded(
    fields: dict[str, object], settings: dict | None, reason: str | None
) -> None:
    training = parse_recipe(flags(**fields)).training
    training.deepspeed_plugin = None if settings is None else FakePlugin(**settings)
    found = training.rigid
    assert found is None if reason is None else reason in (found or "")


def test_the_same_recipe_is_known_again() -> None:
    """In another process too; at another time, in another place, it is still the same."""

    def fingerprint(**fields: object) -> str:
        return parse_recipe(flags(**fields)).fingerprint()

    here = fingerprint(learning_rate=1e-3)
    code = "import sys; from keepstep.recipe.parse import parse_recipe; "
    code += "print(parse_recipe(sys.argv[1:]).fingerprint())"
    there = subprocess.run(
        [sys.executable, "-c", code, *flags(learning_rate=1e-3)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert there.stdout.splitlines()[-1] == here
    moved = {"output_dir": "elsewhere", "time_limit": "3h", "resume_from_checkpoint": "best"}
    assert fingerprint(learning_rate=1e-3, **moved) == here
    for field, value in (
        ("learning_rate", 2e-3),
        ("use_peft", True),
        ("gradient_checkpointing", False),
    ):
        assert fingerprint(**{"learning_rate": 1e-3, field: value}) != here

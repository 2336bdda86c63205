"""What a model's own code refuses is told before its weights are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.preflight.model import check_model_of
from keepstep.recipe.parse import parse_recipe
from tests.helpers.vision import make_vision


def found(demo: Path, **fields: object) -> list[str]:
    values = {"model_name_or_path": demo / "model", "dataset_name": "x", "output_dir": "y"}
    flags = [t for n, v in {**values, **fields}.items() for t in (f"--{n}", *str(v).split())]
    return [str(problem) for problem in check_model_of(parse_recipe(flags))]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_target_modules": "q_prj"}, "lora_target_modules: the model has no module q_prj"),
        (
            {"lora_target_modules": "q_proj v_prj"},
            "lora_target_modules: the model has no module v_prj",
        ),
        ({"lora_target_modules": ".*_prj"}, "use_peft: Target modules .*_prj not found in the"),
        ({"lora_modules_to_save": "head"}, "lora_modules_to_save: the model has no module head"),
        ({"lora_target_parameters": "w"}, "lora_target_parameters: the model has no parameter w"),
        (
            {"lora_target_modules": "q_proj lm_head"},
            "lora_target_modules: TRL trains no adapter of the model's head (lm_head)",
        ),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: 0.1: the model has no experts"),
        ({"attn_implementation": "flash_attention_9"}, "attn_implementation: flash_attention_9: "),
        (
            {"model_init_kwargs": '{"attn_implementation":"nope"}'},
            'attn_implementation: nope: Specified `attn_implementation="nope"` is not supported',
        ),
    ],
)
def test_what_the_model_has_not(demo: Path, fields: dict[str, object], expected: str) -> None:
    (problem,) = found(demo, use_peft=True, **fields)
    assert problem.startswith(expected)
    if "no module" in problem:
        assert problem.endswith(
            "Hint: its modules: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, input_layernorm, post_attention_layernorm, norm, lm_head"
        )


def test_no_completions_of_a_model_that_sees(tmp_path: Path) -> None:
    vision = make_vision(tmp_path, rows=2)
    assert found(vision) == []
    (problem,) = found(vision, sample_prompts="prompts.txt")
    assert problem.startswith("sample_prompts: of a vision-language model")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_peft": True},
        {"use_peft": True, "lora_target_modules": "all-linear"},
        {"use_peft": True, "lora_target_modules": "q_proj"},
        {"use_peft": True, "lora_target_modules": "self_attn.q_proj mlp.up_proj"},
        {"use_peft": True, "lora_target_modules": ".*_proj", "lora_modules_to_save": "lm_head"},
        {"attn_implementation": "eager"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"model_name_or_path": "owner/not-here"},
        {"use_peft": True, "lora_r": 0},  # told of the recipe alone
    ],
)
def test_what_it_has(demo: Path, fields: dict[str, object]) -> None:
    assert found(demo, **fields) == []


def test_a_configuration_that_is_none(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (problem,) = found(demo, model_name_or_path=tmp_path)
    assert "is not a valid JSON file" in problem
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama99"}))
    (problem,) = found(demo, model_name_or_path=tmp_path)
    assert "llama99" in problem


def test_it_stands_in_the_report_of_the_recipe(demo: Path, tmp_path: Path) -> None:
    """With what the recipe alone tells, and in the end of `keepstep check`."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model_name_or_path: {demo}/model\ndataset_name: {demo}/data/train.jsonl\n"
        f"output_dir: {tmp_path}/run\nuse_peft: true\nlora_target_modules: [q_prj]\nseed: -1\n"
    )
    told = CliRunner().invoke(app, ["check", str(recipe)])
    assert told.exit_code == 2
    assert "the recipe has 2 problems" in told.stdout
    assert "seed: -1 is below 0 [number]" in told.stdout
    assert "the model has no module q_prj [adapter]" in told.stdout


@pytest.mark.parametrize("given", ["launcher", "recipe"])
def test_a_launch_with_zero3_is_as_it_was_afterwards(
    demo: Path, tmp_path: Path, given: str
) -> None:
    """The model is built whole on the meta device meanwhile, by one rank alone."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("ACCELERATE_")}
    environment |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    flags = ["--model_name_or_path", demo / "model", "--dataset_name", "x", "--output_dir", "y"]
    if given == "launcher":
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    else:
        config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        flags += ["--deepspeed", tmp_path / "zero3.json"]
    done = subprocess.run(
        [sys.executable, "-c", ZERO3, *map(str, flags)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["459392", "True", "True"]


ZERO3 = """
import sys
from keepstep.preflight.shapes import shapes_of
from keepstep.recipe.parse import parse_recipe
from transformers.integrations import deepspeed

recipe = parse_recipe(sys.argv[1:])
before = deepspeed.deepspeed_config()
assert deepspeed.is_deepspeed_zero3_enabled()
print(shapes_of(recipe).total)
print(deepspeed.is_deepspeed_zero3_enabled(), deepspeed.deepspeed_config() is before)
"""

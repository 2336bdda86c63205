"""What a launch may share out among its processes; the rest is refused by name, before step 1."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.preflight.launch import Launch, check_launch, launch_in
from keepstep.preflight.sequences import check_attention
from keepstep.preflight.validate import validate
from keepstep.recipe.config import ConfigError, Recipe
from keepstep.recipe.parse import parse_recipe
from tests.helpers.ranks import ROOT
from tests.recipe.test_config import flags

TRL = Path(str(files("trl") / "accelerate_configs"))
SAGEMAKER = {"ec2_instance_type": "ml.p3", "iam_role_name": "x"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(flags())


def found(config: Any, recipe: Recipe, folder: Path) -> tuple[Launch, list[str]]:
    path = folder / "launch.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    launch = launch_in(path, recipe)
    return launch, [f"{p.what} [{p.code}]" for p in check_launch(launch, recipe)]


@pytest.mark.parametrize("path", [*TRL.glob("*"), *(ROOT / "accelerate_configs").glob("*")])
def test_configs_that_come_with_trl_and_keepstep(path: Path, recipe: Recipe) -> None:
    problems = [p.what for p in check_launch(launch_in(path, recipe), recipe)]
    refused = ["FSDP (fully sharded data parallelism) is not supported"]
    assert problems == (refused if "fsdp" in path.name else [])
    if path.stem[-1] in "123" and "zero" in path.stem:
        assert launch_in(path, recipe).stage == int(path.stem[-1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "FSDP"),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {}}, "Megatron-LM"),
        ({"distributed_type": "XLA"}, "torch_xla (TPU)"),
        (
            {"compute_environment": "AMAZON_SAGEMAKER", "distributed_type": "DATA_PARALLEL"}
            | {**SAGEMAKER, "mixed_precision": "no", "use_cpu": False, "debug": False},
            "SageMaker",
        ),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"}, "mixed_precision: fp8"),
        *(
            (
                {"distributed_type": "MULTI_GPU", "parallelism_config": {f"{prefix}{name}": 2}},
                f"{told} (parallelism_config: {name}: 2)",
            )
            for prefix in ("", "parallelism_config_")
            for name, told in (
                ("tp_size", "tensor parallelism"),
                ("cp_size", "context parallelism"),
                ("dp_shard_size", "FSDP"),
            )
        ),
    ],
)
def test_what_shares_out_in_another_way_is_refused(
    config: dict[str, Any], expected: str, recipe: Recipe, tmp_path: Path
) -> None:
    _, (problem,) = found(config, recipe, tmp_path)
    assert problem.startswith(f"{expected}")
    assert problem.endswith("is not supported [launch]")


SHARED: dict[str, Any] = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3},
    "parallelism_config": {"parallelism_config_sp_size": 4},
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"attn_implementation": "sdpa"}, None),
        ({"packing": True}, "does not go with packing"),
        ({"eval_packing": True}, "does not go with eval_packing"),
        ({"padding_free": True}, "does not go with padding_free"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "does not go with train_sampling_strategy",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            "is launched with sp_attn_implementation: sdpa",
        ),
    ],
)
def test_sequences_that_are_shared(
    fields: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    launch, problems = found(SHARED, parse_recipe(flags(**fields)), tmp_path)
    assert launch.sequences == 4
    assert [str(expected) in problem for problem in problems] == (
        [] if expected is None else [True]
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2, None),
        (4, "the model has 4 attention heads and 2 key and value heads"),
        (3, "the model has 4 attention heads and 2 key and value heads"),
    ],
)
def test_sequences_are_shared_by_heads(
    demo: Path, tmp_path: Path, size: int, expected: str | None
) -> None:
    recipe = parse_recipe(flags(model_name_or_path=demo / "model"))
    config = SHARED | {"parallelism_config": {"sp_size": size}}
    problems = found(config, recipe, tmp_path)[1]
    assert [str(expected) in problem for problem in problems] == (
        [] if expected is None else [True]
    )


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (LlamaConfig(), False),
        (Qwen3Config(), False),
        (Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=2), True),
        (MistralConfig(), True),
        (MistralConfig(sliding_window=None), False),
        (Gemma3TextConfig(), True),
    ],
)
def test_ulysses_keeps_no_mask_but_the_causal_one(config: Any, refused: bool) -> None:
    found = [p.what for p in check_attention(config, 2) if "window" in p.what]
    assert bool(found) == refused
    assert list(check_attention(config, 1)) == []


def test_sequences_are_shared_by_deepspeed_alone(recipe: Recipe, tmp_path: Path) -> None:
    for other in ({"distributed_type": "MULTI_GPU"}, {"deepspeed_config": {"zero_stage": 0}}):
        _, (problem,) = found(SHARED | other, recipe, tmp_path)
        assert problem.startswith("sequence parallelism (sp_size: 4) needs DeepSpeed")
    groups = SHARED["parallelism_config"] | {"parallelism_config_dp_shard_size": 2}
    assert found(SHARED | {"parallelism_config": groups}, recipe, tmp_path)[1] == []
    flash = {"parallelism_config_sp_attn_implementation": "flash_attention_2"}
    config = SHARED | {"parallelism_config": SHARED["parallelism_config"] | flash}
    named = parse_recipe(flags(attn_implementation="flash_attention_2"))
    assert found(config, named, tmp_path)[1] == []


@pytest.mark.parametrize(
    "config",
    [
        {"distributed_type": "NO"},
        {"distributed_type": "MULTI_GPU", "fsdp_config": {"fsdp_version": 2}},  # not in use
        {"distributed_type": "MULTI_GPU", "parallelism_config": {"tp_size": 1}},
        {"distributed_type": "MULTI_CPU"},
        {"distributed_type": "MULTI_NPU", "mixed_precision": "bf16"},
    ],
)
def test_what_keeps_everything_everywhere_is_accepted(
    config: dict[str, Any], recipe: Recipe, tmp_path: Path
) -> None:
    launch, problems = found(config, recipe, tmp_path)
    assert problems == []
    assert launch.deepspeed is None


DEEPSPEED = [
    ({"zero_optimization": {"stage": 3}}, None),
    ({"zero_optimization": {"stage": 0}}, None),
    ({}, None),
    ({"tensor_parallel": {"autotp_size": 2}}, "DeepSpeed's tensor parallelism"),
    ({"tensor_parallel": {"autotp_size": 1}}, None),
    ({"sequence_parallel_size": 2}, "DeepSpeed's sequence parallelism"),
    ({"pipeline": {"stages": 2}}, "DeepSpeed's pipeline parallelism"),
    ({"expert_parallel": {"enabled": True}}, "DeepSpeed's expert parallelism"),
    ({"elasticity": {"enabled": True}}, "DeepSpeed's elasticity"),
    ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ({"bf16": {"enabled": True}}, "zero_stage: 0 with bf16"),
    ({"fp16": {"enabled": True}}, "zero_stage: 0 with fp16"),
    ({"torch_autocast": {"enabled": True}}, "zero_stage: 0 with torch_autocast"),
    ({"bf16": {"enabled": "auto"}}, None),
    ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, None),
]


@pytest.mark.parametrize(("settings", "expected"), DEEPSPEED)
def test_deepspeeds_own_file_is_read(
    settings: dict[str, Any], expected: str | None, recipe: Recipe, tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    named = {"deepspeed_config_file": str(file)}
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": named}
    launch, problems = found(config, recipe, tmp_path)
    assert launch.stage == settings.get("zero_optimization", {}).get("stage", 0)
    assert [p.startswith(str(expected)) for p in problems] == ([] if expected is None else [True])


def test_what_accelerate_says_of_deepspeed(recipe: Recipe, tmp_path: Path) -> None:
    launch, problems = found({"distributed_type": "DEEPSPEED"}, recipe, tmp_path)
    assert (launch.stage, problems) == (2, [])  # Accelerate's default
    compiled = parse_recipe(flags(torch_compile=True))
    assert found({"distributed_type": "DEEPSPEED"}, compiled, tmp_path)[1] == []
    three = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}
    _, (problem,) = found(three, compiled, tmp_path)
    assert problem.startswith("torch_compile: a compiled graph holds parameters that ZeRO-3")
    zero = {"zero_stage": 3, "offload_param_device": "cpu"}
    launch, _ = found({"distributed_type": "DEEPSPEED", "deepspeed_config": zero}, recipe, tmp_path)
    assert (launch.stage, launch.offloaded("param"), launch.offloaded("optimizer")) == (
        *(3, "cpu"),
        "none",
    )
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}
    _, (problem,) = found(config | {"mixed_precision": "bf16"}, recipe, tmp_path)
    assert problem.startswith("zero_stage: 0 with bf16")
    recipe_in_16_bit = parse_recipe(flags(fp16=True))
    _, (problem,) = found(config, recipe_in_16_bit, tmp_path)
    assert problem.startswith("zero_stage: 0 with fp16")


@pytest.mark.parametrize(
    "content",
    [
        "- a list\n",
        "distributed_type: [unclosed\n",
        "plain words",
        "",
        "distributed_type: NOTHING_KNOWN\n",
        "num_processes: 2\n",
        "distributed_type: MULTI_GPU\nno_such_key: 1\n",
        "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: high}\n",
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: /no/such.json}\n",
        "distributed_type: DEEPSPEED\ndeepspeed_config: [3]\n",
        "distributed_type: MULTI_GPU\nparallelism_config: {tp_size: two}\n",
    ],
)
def test_a_config_that_cannot_be_read_is_a_problem(
    content: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--config_file .*launch\.yaml cannot be read") as error:
        found(content, recipe, tmp_path)
    assert "has no attribute 'get'" not in str(error.value) or "[3]" in content


def test_what_no_launcher_knows(recipe: Recipe, tmp_path: Path) -> None:
    config: dict[str, Any] = {"distributed_type": "MULTI_GPU", "mixed_precision": "bf17"}
    assert found(config, recipe, tmp_path)[1][0].startswith("mixed_precision: bf17 is not")
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 5}}
    assert found(config, recipe, tmp_path)[1][0].startswith("zero_stage: 5 is none of 0, 1, 2, 3")


def test_bytes_that_are_no_text(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        launch_in(tmp_path / "launch.yaml", recipe)
    with pytest.raises(ConfigError, match="cannot be read"):
        launch_in(tmp_path / "none.yaml", recipe)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "context parallelism",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision: fp8"),
    ],
)
def test_the_environment_of_a_launch(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (problem,) = validate(parse_recipe(flags()))
    assert problem.what.startswith(expected)
    assert problem.code == "launch"


def test_what_a_recipe_shares_out() -> None:
    recipe = parse_recipe(flags(model_init_kwargs='{"tp_plan": "auto"}'))
    (problem,) = validate(recipe)
    assert "shared out as it is loaded (model_init_kwargs: tp_plan)" in problem.what
    recipe = parse_recipe(flags())
    recipe.training.parallelism_config = {"tp_size": 4}
    (problem,) = validate(recipe)
    assert problem.what.startswith("tensor parallelism (parallelism_config: tp_size: 4)")


def test_check_refuses_what_a_launch_would(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            dict(zip(*[iter(text.removeprefix("--") for text in flags())] * 2, strict=True))
        )
    )
    command = ["check", str(recipe), "--config_file", str(TRL / "fsdp2.yaml")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "FSDP (fully sharded data parallelism) is not supported [launch]" in done.output
    assert "Hint: ZeRO-3 shares out as much" in done.output
    (tmp_path / "broken.yaml").write_text("a: [")
    command = ["check", str(recipe), "--json", "--config_file", str(tmp_path / "broken.yaml")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert [p["code"] for p in json.loads(done.output)["problems"]] == ["launch"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_launcher_s_precision_is_the_recipe_s(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Accelerate computes in it, on CPU, too; and DeepSpeed refuses two different ones."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    training = parse_recipe(flags()).training
    assert training.precision == training.mixed_precision == precision
    other = {"bf16": "fp16", "fp16": "bf16"}[precision]
    training = parse_recipe(flags(**{other: True})).training
    assert training.precision == training.mixed_precision == other
    (problem,) = validate(parse_recipe(flags(bf16=False)))
    told = f"mixed_precision: {precision} of the launch, and bf16: false of the recipe"
    assert problem.what == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="as on a login node: without a GPU")
def test_what_needs_a_gpu_is_checked_where_there_is_none(demo: Path, tmp_path: Path) -> None:
    """`keepstep check` of a launch elsewhere, as by slurm/submit.sh; a launch on CPU is refused."""
    recipe = tmp_path / "recipe.yaml"
    fields: dict[str, Any] = {"model_name_or_path": f"{demo}/model"}
    fields["dataset_name"] = f"{demo}/data/train.jsonl"
    fields |= {"output_dir": f"{tmp_path}/run", "tf32": True, "ddp_backend": "nccl"}
    recipe.write_text(yaml.safe_dump(fields))
    told = {}
    for name in ("zero3", "cpu_zero3"):
        config = f"{ROOT}/accelerate_configs/{name}.yaml"
        told[name] = CliRunner().invoke(app, ["check", str(recipe), "--config_file", config])
    assert told["zero3"].exit_code == 0, told["zero3"].stdout
    assert "tf32: true, for this machine has no GPU" in told["zero3"].stdout
    assert told["cpu_zero3"].exit_code == 2
    for text in ("tf32: true needs GPUs", "ddp_backend: nccl needs GPUs"):
        assert text in told["cpu_zero3"].stdout
    with pytest.raises(ConfigError, match="tf32"):  # a rank is where it is
        parse_recipe(flags(tf32="true"))

"""How a launch shares a run out among its processes; what of that is not supported, by name.

A launch is read from an accelerate config (`keepstep check`), or from the environment that
`accelerate launch` makes of one, and the recipe (accelerate 1.15, deepspeed 0.19.8).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import HfDeepSpeedConfig

from keepstep.preflight.sequences import SEQUENCES, check_sequences
from keepstep.recipe.config import ConfigError, Problem, Recipe

INSTEAD = "ZeRO-3 shares out as much: --config_file accelerate_configs/zero3.yaml"
GROUPS = ("dp_replicate_size", "dp_shard_size")  # beside it: how many groups share rows, no more
ATTENTION = "sp_attn_implementation"
KINDS = {
    "FSDP": "FSDP (fully sharded data parallelism)",
    "MEGATRON_LM": "Megatron-LM",
    "XLA": "torch_xla (TPU)",
}
DIMENSIONS = {
    "dp_replicate_size": "hybrid sharding",
    "dp_shard_size": "FSDP",
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
# Of `model_init_kwargs`: transformers 5.23 shares the model out while it loads it.
SHARDED_LOADING = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
ENVIRONMENT = {  # of `accelerate launch`
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


@dataclass(frozen=True)
class Launch:
    """How the processes of a launch share a run out.

    Attributes:
        kind: Accelerate's `distributed_type`.
        sizes: of its `parallelism_config`.
        precision: its `mixed_precision`.
        deepspeed: DeepSpeed's settings, under their names in its JSON; None without it.
        cpu: its processes use no GPU.
        sequence_attention: the attention that sequence parallelism is made for.
    """

    kind: str = "NO"
    sizes: Mapping[str, int] = field(default_factory=dict)
    precision: str = "no"
    deepspeed: Mapping[str, Any] | None = None
    cpu: bool = False
    sequence_attention: str = "sdpa"  # Accelerate's default

    @property
    def sequences(self) -> int:
        """How many processes share out each row's tokens."""
        return self.sizes.get(SEQUENCES, 1)

    @property
    def stage(self) -> int:
        """ZeRO's; 0 without DeepSpeed."""
        return int(self._zero.get("stage") or 0)

    def offloaded(self, what: str) -> str:
        """Where DeepSpeed keeps `optimizer` or `param`: `none` (on the device), `cpu`, `nvme`."""
        return str((self._zero.get(f"offload_{what}") or {}).get("device") or "none")

    @property
    def _zero(self) -> Mapping[str, Any]:
        return (self.deepspeed or {}).get("zero_optimization") or {}


def check_launch(launch: Launch, recipe: Recipe) -> Iterator[Problem]:
    """What would train, and could not be saved or resumed. Ranks: any."""
    kind = launch.kind
    if kind not in ("NO", "DEEPSPEED") and not kind.startswith("MULTI_"):
        yield _refused(KINDS.get(kind, kind))
    for name, size in launch.sizes.items():
        if size > 1 and name == SEQUENCES:
            stage = launch.stage if launch.deepspeed is not None else 0
            yield from check_sequences(size, stage, launch.sequence_attention, recipe)
        elif size > 1 and not (name in GROUPS and launch.sequences > 1):
            yield _refused(f"{DIMENSIONS.get(name, name)} (parallelism_config: {name}: {size})")
    if launch.precision not in ("no", "fp16", "bf16"):
        told = f"mixed_precision: {launch.precision} is not supported"
        yield Problem(told, "mixed_precision: bf16", "launch")
    given, asked = recipe.training.precision_is_given, recipe.training.precision
    if given and asked == "fp32" and launch.precision in ("bf16", "fp16"):
        yield Problem(
            f"mixed_precision: {launch.precision} of the launch, and bf16: false of the recipe",
            "leave one of them out",
            "launch",
        )
    wants = {"tf32: true": recipe.training.tf32 is True}
    wants["ddp_backend: nccl"] = recipe.training.ddp_backend == "nccl"
    for wanted in [told for told, holds in wants.items() if holds and launch.cpu]:
        yield Problem(f"{wanted} needs GPUs, and this launch is on CPU", code="launch")
    for name in SHARDED_LOADING:
        if (getattr(recipe.training, "model_init_kwargs", None) or {}).get(name) is not None:
            yield _refused(
                f"a model that is shared out as it is loaded (model_init_kwargs: {name})"
            )
    if launch.deepspeed is not None:
        yield from _deepspeed(launch.deepspeed)
        yield from _zero(launch, recipe)


def _refused(what: str) -> Problem:
    return Problem(f"{what} is not supported", INSTEAD, "launch")


def _deepspeed(settings: Mapping[str, Any]) -> Iterator[Problem]:
    """Its ways of sharing out that are not ZeRO's."""
    for section, name, told in (
        ("tensor_parallel", "autotp_size", "tensor parallelism"),
        ("pipeline", "stages", "pipeline parallelism"),
        ("expert_parallel", "enabled", "expert parallelism"),
        ("elasticity", "enabled", "elasticity, which changes the rows of a step"),
    ):
        value = (settings.get(section) or {}).get(name)
        if value not in (None, False, 0, 1) or value is True:
            yield _refused(f"DeepSpeed's {told} ({section}: {name}: {value})")
    if settings.get("sequence_parallel_size", 1) not in (None, 0, 1):
        yield _refused("DeepSpeed's sequence parallelism (sequence_parallel_size)")


def _zero(launch: Launch, recipe: Recipe) -> Iterator[Problem]:
    """What DeepSpeed's ZeRO cannot combine."""
    stage, parameters, optimizer = launch.stage, *map(launch.offloaded, ("param", "optimizer"))
    if stage not in (0, 1, 2, 3):
        yield Problem(f"zero_stage: {stage} is none of 0, 1, 2, 3", code="zero")
    if parameters != "none" and stage < 3:
        yield Problem(
            f"offload_param_device: {parameters} needs ZeRO-3, and this is ZeRO-{stage}",
            "zero_stage: 3, or offload the optimizer alone",
            "zero",
        )
    if optimizer != "none" and stage < 1:
        yield Problem(
            f"offload_optimizer_device: {optimizer} needs ZeRO-1, 2 or 3, and this is ZeRO-0",
            "zero_stage: 2",
            "zero",
        )
    if stage == 3 and recipe.training.torch_compile:
        # Tried with two processes (torch 2.13, deepspeed 0.19.8): "modified by an inplace
        # operation" in the first backward pass, with inductor and with aot_eager.
        told = "torch_compile: a compiled graph holds parameters that ZeRO-3 gives up in between"
        yield Problem(told, "ZeRO-2 or DDP; or leave it out", "zero")
    if stage == 3 and recipe.model.load_in_8bit:
        yield Problem(
            "load_in_8bit: ZeRO-3 cannot share out 8-bit weights", "ZeRO-2, or load_in_4bit", "zero"
        )
    sections = ("fp16", "bf16", "torch_autocast")
    half = [s for s in sections if ((launch.deepspeed or {}).get(s) or {}).get("enabled") is True]
    half += [precision for precision in (launch.precision,) if precision != "no"]
    if stage == 0 and half:
        yield Problem(
            f"zero_stage: 0 with {half[0]}: DeepSpeed keeps its fp32 masters in a form that cannot "
            "be resumed on other processes",
            "zero_stage: 1; or DDP (accelerate_configs/ddp.yaml); or no mixed precision",
            "zero",
        )


def launch_of(recipe: Recipe) -> Launch:
    """This process's launch. Ranks: any; the same everywhere."""
    training = recipe.training
    plugin, kind = training.deepspeed_plugin, training.distributed_state.distributed_type.value
    asked = [kind for name, kind in ENVIRONMENT.items() if os.environ.get(name) == "true"]
    prefix, parallel = "PARALLELISM_CONFIG_", training.parallelism_config or {}
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        named = {n.removeprefix(prefix): v for n, v in os.environ.items() if n.startswith(prefix)}
        parallel = {name.lower(): value for name, value in named.items()}
    return Launch(
        kind="FSDP" if training.fsdp else (asked or [kind])[0],
        sizes=_sizes(parallel if isinstance(parallel, dict) else vars(parallel)),
        precision=training.mixed_precision,
        deepspeed=plugin.deepspeed_config if plugin else None,
        sequence_attention=os.environ.get(f"{prefix}{ATTENTION}".upper()) or "sdpa",
    )


def launch_in(path: Path, recipe: Recipe) -> Launch:
    """The launch that an accelerate config asks for.

    Raises:
        ConfigError: it, or DeepSpeed's file that it names, cannot be read.
    """
    try:
        if not isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no `name: value` lines")
        config = load_config_from_file(str(path))  # as the launcher reads it
        kind, deepspeed = str(config.distributed_type.value), None
        if kind == "DEEPSPEED":
            deepspeed = _settings(config.deepspeed_config)
        if config.compute_environment.value == "AMAZON_SAGEMAKER":
            kind = "SageMaker"
        precision = recipe.training.precision
        launch = Launch(
            kind=kind,
            sizes=_sizes(_named(config)),
            precision=(config.mixed_precision or "no") if precision == "fp32" else precision,
            deepspeed=deepspeed,
            cpu=bool(config.use_cpu),
            sequence_attention=str(_named(config).get(ATTENTION) or "sdpa"),
        )
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        problem = Problem(f"--config_file {path} cannot be read: {error}", code="launch")
        raise ConfigError([problem]) from error
    return launch


def _named(config: Any) -> dict[str, Any]:
    """An accelerate config's `parallelism_config`, whose keys may have its name before them."""
    named = getattr(config, "parallelism_config", None) or {}
    return {name.removeprefix("parallelism_config_"): value for name, value in named.items()}


def _settings(named: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's settings of an accelerate config, which names them, or a file with them."""
    if "deepspeed_config_file" in named:
        settings: dict[str, Any] = HfDeepSpeedConfig(named["deepspeed_config_file"]).config
        zero = dict(settings.get("zero_optimization") or {})
        return settings | {"zero_optimization": zero | {"stage": int(zero.get("stage", 0))}}
    zero = {"stage": int(named.get("zero_stage", 2))}  # Accelerate's own default
    for what in ("optimizer", "param"):
        zero[f"offload_{what}"] = {"device": named.get(f"offload_{what}_device")}
    return {"zero_optimization": zero}


def _sizes(named: Mapping[str, Any]) -> dict[str, int]:
    """Of a `parallelism_config`."""
    return {name: int(named[name]) for name in DIMENSIONS if named.get(name) is not None}

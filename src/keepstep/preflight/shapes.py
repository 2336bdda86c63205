"""A model's shapes, from its configuration alone: built on the meta device, without a weight."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.deepspeed import (
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from trl import get_peft_config

from keepstep.preflight.estimate import Shapes, Step, Strategy
from keepstep.recipe.config import Recipe
from keepstep.recipe.data_files import looks_local
from keepstep.recipe.model import is_vision_language

logger = logging.getLogger(__name__)
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def shapes_of(recipe: Recipe) -> Shapes | None:
    """The shapes of the recipe's model, adapter included; None where they cannot be had: a model
    with code of its own, no configuration within reach. Ranks: any.
    """
    try:
        return _measure(recipe)
    except Exception as error:  # of libraries, and of a model's own code
        logger.info("the model's shapes are not known: %s", error)
        return None


def configuration_of(recipe: Recipe, **arguments: Any) -> Any:
    """The model's configuration. Raises: whatever transformers does where there is none."""
    model = recipe.model
    arguments |= {"revision": model.model_revision}
    return AutoConfig.from_pretrained(model.model_name_or_path, **arguments)


def on_meta(recipe: Recipe, **arguments: Any) -> Any:
    """The recipe's model without a weight. Raises: whatever transformers does, or the model's own
    code."""
    configuration = configuration_of(recipe)
    with torch.device("meta"), _without_zero3(recipe):
        sees = is_vision_language(configuration)
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return kind.from_config(configuration, **arguments)


def adapted(model: Any, recipe: Recipe) -> Any:
    """The same with the recipe's adapter, if it asks for one. Raises: whatever peft does."""
    adapter = get_peft_config(recipe.model)
    if adapter is None:
        return model
    with torch.device("meta"), _without_zero3(recipe):
        return get_peft_model(model, adapter)


def _measure(recipe: Recipe) -> Shapes:
    model_recipe, training = recipe.model, recipe.training
    config = configuration_of(recipe)
    dtype = (getattr(training, "model_init_kwargs", None) or {}).get("dtype") or model_recipe.dtype
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = adapted(on_meta(recipe), recipe)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    text = config.get_text_config()
    quantized, quantized_bytes = _quantized(model, recipe)
    return Shapes(
        total=sum(sizes.values()),
        trained=sum(trained),
        stored=sum(trained) if model_recipe.use_peft else sum(sizes.values()),
        tensors=len(trained),
        largest=_largest_module(model),
        layers=int(getattr(text, "num_hidden_layers", 1)),
        hidden=int(getattr(text, "hidden_size", 1)),
        vocabulary=int(getattr(text, "vocab_size", 1)),
        element=torch.empty((), dtype=dtype).element_size(),
        companions=_companions(str(model_recipe.model_name_or_path)),
        quantized=quantized,
        quantized_bytes=quantized_bytes,
    )


@contextmanager
def _without_zero3(recipe: Recipe) -> Iterator[None]:
    """Else transformers (5.23) would share the model out at once, which all ranks must do.

    Raises:
        RuntimeError: the configuration of DeepSpeed that is in force is none of the recipe's.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    plugin, in_force = recipe.training.deepspeed_plugin, deepspeed_config()
    held = [getattr(plugin, "dschf", None), getattr(plugin, "hf_ds_config", None)]
    ours = [config for config in held if config is not None and config.config is in_force]
    if not ours:
        raise RuntimeError("another configuration of DeepSpeed is in force than this launch's")
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(ours[0])


def _largest_module(model: torch.nn.Module) -> int:
    """Of those that hold parameters themselves: ZeRO-3 gathers module by module."""
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())


def _quantized(model: Any, recipe: Recipe) -> tuple[int, int]:
    """Elements that bitsandbytes quantizes, and their bytes: of linear layers, but for the output's
    and the adapter's. In 4 bits, 64 elements share a scale of 4 bytes; nested, of one byte, with
    another of 4 bytes for 256 of those (Dettmers et al., "QLoRA", 2023, section 3).
    """
    four, eight = recipe.model.load_in_4bit, recipe.model.load_in_8bit
    if not (four or eight):
        return 0, 0
    output = model.get_output_embeddings()
    elements = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not output and "lora_" not in name
    )
    if eight:
        return elements, elements
    scale = (1 + 4 / 256) if recipe.model.use_bnb_nested_quant else 4
    return elements, int(elements * (0.5 + scale / 64))


def _companions(name: str) -> int:
    """Bytes of what lies beside the weights of a local model: mostly the tokenizer."""
    if not looks_local(name):
        return 0
    files = (p for p in Path(name).expanduser().iterdir() if p.is_file())
    return sum(p.stat().st_size for p in files if not p.name.endswith(WEIGHTS))


def strategy_of(recipe: Recipe, processes: int | None = None) -> Strategy:
    """How this launch shares the model out. Ranks: any."""
    training = recipe.training
    return Strategy(
        training.zero_stage,
        processes or training.world_size,
        bool(training.bf16 or training.fp16),
        training.offloaded("optimizer") != "none",
        training.offloaded("param") != "none",
        training.sequence_size,
    )


def step_of(recipe: Recipe) -> Step:
    """What one pass works on, at most."""
    training = recipe.training
    length = int(getattr(training, "max_length", None) or 1024)
    checkpointing = bool(training.gradient_checkpointing)
    return Step(int(training.per_device_train_batch_size), length, checkpointing)

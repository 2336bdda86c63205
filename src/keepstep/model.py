"""Tokenizer, model arguments, adapter. SFTTrainer builds the model: under ZeRO-3, sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from .config import ConfigError, KeepstepConfig, Problem


def build_tokenizer(model: ModelConfig, training: KeepstepConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token.

    Ranks: all, each for itself.

    Raises:
        ConfigError: there is none at `model_name_or_path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
    except Exception as error:  # OSError, ValueError, tokenizers' own Exception
        raise ConfigError(
            [
                Problem(
                    f"model_name_or_path: {model.model_name_or_path} has no usable tokenizer: "
                    f"{str(error).splitlines()[0]}",
                    code="model",
                )
            ]
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint(model: ModelConfig) -> str:
    """A short digest of the base model: its configuration, and its weight files' names and sizes.

    For a Hub model its name and revision. Ranks: any; the same everywhere.
    """
    name = str(model.model_name_or_path)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"{name}@{model.model_revision}"
    weights = sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))
    content = (folder / "config.json").read_bytes() + json.dumps(weights).encode()
    return f"{folder.name}, {xxhash.xxh3_64_hexdigest(content)}"


def model_arguments(model: ModelConfig, training: KeepstepConfig) -> dict[str, Any]:
    """What `from_pretrained` is given; `model_init_kwargs` of the recipe wins."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def trainer_arguments(
    model: ModelConfig, training: KeepstepConfig, weights: Path | None = None
) -> dict[str, Any]:
    """The model, quantization and adapter arguments of SFTTrainer.

    Args:
        model: the recipe's model fields.
        training: the recipe's training fields; `model_init_kwargs` is filled in.
        weights: a checkpoint to take the weights (or the adapter) from instead of the base model's.
    """
    arguments = model_arguments(model, training)
    if weights is not None and model.use_peft:
        training.model_init_kwargs = None
        # Not AutoPeftModelForCausalLM: under ZeRO-3 it takes the sharded embedding for one of
        # another size and resizes it (peft 0.21.2).
        base = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **arguments)
        return {"model": PeftModel.from_pretrained(base, weights, is_trainable=True)}
    training.model_init_kwargs = arguments
    return {
        "model": str(weights or model.model_name_or_path),
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }

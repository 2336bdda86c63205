"""Tokenizer, model arguments, adapter. SFTTrainer builds the model: under ZeRO-3, sharded."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
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
                    f"{str(error).splitlines()[0]}"
                )
            ]
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_arguments(model: ModelConfig, training: KeepstepConfig) -> dict[str, Any]:
    """What `from_pretrained` is given; `model_init_kwargs` of the recipe wins."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }


def trainer_arguments(model: ModelConfig, training: KeepstepConfig) -> dict[str, Any]:
    """The model, quantization and adapter arguments of SFTTrainer."""
    training.model_init_kwargs = model_arguments(model, training)
    return {
        "model": model.model_name_or_path,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }

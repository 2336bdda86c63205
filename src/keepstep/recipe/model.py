"""Tokenizer or processor, model arguments, adapter. SFTTrainer builds the model: under ZeRO-3,
sharded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeAlias

import transformers
import xxhash
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION_LANGUAGE,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from keepstep.recipe.config import ConfigError, KeepstepConfig, Problem

ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin  # SFTTrainer's word
WEIGHT_BLOCKS, BLOCK_BYTES = 8, 1 << 16  # of a weights file that it is known by


def build_tokenizer(model: ModelConfig, training: KeepstepConfig) -> ProcessingClass:
    """The model's tokenizer, with a pad token; of a vision-language model its processor, with that.

    Ranks: all, each for itself.

    Raises:
        ConfigError: there is none at `model_name_or_path`.
    """
    try:
        kind = AutoProcessor if sees(model, training) else AutoTokenizer
        processing = kind.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
    except Exception as error:  # OSError, ValueError, ImportError, tokenizers' own Exception
        raise ConfigError(
            [
                Problem(
                    f"model_name_or_path: {model.model_name_or_path} has no usable tokenizer: "
                    f"{str(error).strip().splitlines()[0]}",
                    code="model",
                )
            ]
        ) from error
    tokenizer = tokenizer_in(processing)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing


def sees(model: ModelConfig, training: KeepstepConfig) -> bool:
    """Whether it is a vision-language model, by its configuration. Raises: what transformers does
    where there is none."""
    config = AutoConfig.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    return is_vision_language(config)


def is_vision_language(config: Any) -> bool:
    """Whether a model's configuration is a vision-language one's."""
    named = set(getattr(config, "architectures", None) or ()) & set(VISION_LANGUAGE.values())
    own = getattr(config, "auto_map", None) or {}
    return bool(named) or AutoModelForImageTextToText.__name__ in own


def model_class(config: Any) -> Any:
    """The class that SFTTrainer (trl 1.16) builds a model of: the one that its configuration names,
    an auto class for one with code of its own."""
    for name in (config.architectures or ())[:1]:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    own = getattr(config, "auto_map", None) or {}
    kinds = AutoModelForImageTextToText, AutoModelForCausalLM
    return next((kind for kind in kinds if kind.__name__ in own), AutoModelForCausalLM)


def tokenizer_in(processing: ProcessingClass) -> PreTrainedTokenizerBase:
    """A processor's tokenizer; a tokenizer itself."""
    return processing.tokenizer if isinstance(processing, ProcessorMixin) else processing


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


def weights_fingerprint(model: ModelConfig) -> str | None:
    """A short digest of the weights under an adapter: blocks of each file of a local base model.

    None where a checkpoint holds all the weights itself, and for a Hub model (`fingerprint` has its
    revision). Ranks: any; the same everywhere.
    """
    folder = Path(str(model.model_name_or_path)).expanduser()
    if not model.use_peft or not folder.is_dir():
        return None
    digest = xxhash.xxh3_64()
    for path in sorted({*folder.glob("*.safetensors"), *folder.glob("*.bin")}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(WEIGHT_BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * number // (WEIGHT_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def tokenizer_settings(
    processing: ProcessingClass, training: KeepstepConfig
) -> dict[str, str | None]:
    """What determines how a row becomes tokens, by content: vocabulary, template, special tokens;
    and images pixels: what a processor does with them.

    Ranks: any; the same everywhere.

    Raises:
        ConfigError: there is no chat template at `chat_template_path`.
    """
    tokenizer = tokenizer_in(processing)
    vocabulary = sorted(tokenizer.get_vocab().items())
    template = chat_template(processing, training)
    settings = {
        "tokenizer": f"{len(vocabulary)} tokens, {_digest(vocabulary)}",
        "chat_template": None if template is None else _digest(template),
        "eos_token": getattr(training, "eos_token", None) or tokenizer.eos_token,
        "pad_token": getattr(training, "pad_token", None) or tokenizer.pad_token,
    }
    if isinstance(processing, ProcessorMixin):
        done = json.loads(processing.to_json_string())
        settings["processor"] = f"{type(processing).__name__}, {_digest(done)}"
    return settings


def chat_template(processing: ProcessingClass, training: KeepstepConfig) -> Any:
    """The one that SFTTrainer will use (trl 1.16): of a file, of another tokenizer, its own. Other
    Trainers have no such field, and use the tokenizer's own."""
    path = getattr(training, "chat_template_path", None)
    if path is None:
        return processing.chat_template
    try:
        if path.endswith((".jinja", ".j2")) and Path(path).is_file():
            return Path(path).read_text(encoding="utf-8")
        return AutoTokenizer.from_pretrained(path).chat_template
    except Exception as error:  # OSError, ValueError, tokenizers' own Exception
        what = f"chat_template_path: {path} cannot be read: {str(error).splitlines()[0]}"
        raise ConfigError([Problem(what, code="model")]) from error


def with_chat_template(processing: ProcessingClass, training: KeepstepConfig) -> Any:
    """A copy of the tokenizer (or processor), with the chat template that SFTTrainer will use."""
    rendering = copy.deepcopy(processing)
    rendering.chat_template = chat_template(processing, training)
    return rendering


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


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
    """The arguments of SFTTrainer: its config, model, quantization and adapter.

    Args:
        model: the recipe's model fields.
        training: the recipe's training fields; `args` is a copy with `model_init_kwargs`.
        weights: a checkpoint to take the weights (or the adapter) from instead of the base model's.
    """
    arguments = model_arguments(model, training)
    if weights is not None and model.use_peft:
        # Not AutoPeftModelForCausalLM: under ZeRO-3 it takes the sharded embedding for one of
        # another size and resizes it (peft 0.21.2).
        config = AutoConfig.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
        base = model_class(config).from_pretrained(model.model_name_or_path, **arguments)
        adapted = PeftModel.from_pretrained(base, weights, is_trainable=True)
        return {"args": _with_model_arguments(training, None), "model": adapted}
    return {
        "args": _with_model_arguments(training, arguments),
        "model": str(weights or model.model_name_or_path),
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def _with_model_arguments(
    training: KeepstepConfig, arguments: dict[str, Any] | None
) -> KeepstepConfig:
    """A copy: the recipe stays as it was asked for."""
    args = copy.copy(training)
    args.model_init_kwargs = arguments
    return args

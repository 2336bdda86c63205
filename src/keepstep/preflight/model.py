"""What the model's own code refuses of a recipe: asked of the model on the meta device, which has
every module and no weights. (transformers 5.23, peft 0.21)"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from keepstep.preflight.shapes import adapted, configuration_of, on_meta
from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.data_files import looks_local
from keepstep.recipe.model import is_vision_language

logger = logging.getLogger(__name__)
CAUSAL = "CAUSAL_LM"
NO_COMPLETIONS = "sample_prompts: of a vision-language model no completions are written"


def check_model_of(recipe: Recipe) -> list[Problem]:
    """Every such problem; none of a model that cannot be had here, or has code of its own. Ranks:
    any; one process looks."""
    if not recipe.model.model_name_or_path or recipe.training.trust_remote_code:
        return []
    try:
        model = on_meta(recipe)
    except Exception as error:  # of libraries: another auto class may know the model
        logger.info("the model cannot be built without its weights: %s", error)
        return list(_configuration(recipe, error))
    images = _prompts(recipe, model)
    return [*_attention(recipe), *_router(recipe, model), *_adapter(recipe, model), *images]


def _configuration(recipe: Recipe, error: Exception) -> Iterator[Problem]:
    """A folder with a config.json that no library will read either."""
    name = str(recipe.model.model_name_or_path)
    if looks_local(name) and (Path(name) / "config.json").is_file():
        try:
            configuration_of(recipe)
        except (OSError, ValueError, TypeError, KeyError) as error:
            told = " ".join(str(error).split())[:300]
            yield Problem(f"model_name_or_path: {name}: {told}", code="model")


def _attention(recipe: Recipe) -> Iterator[Problem]:
    given = dict(recipe.training.model_init_kwargs or {})
    attention = given.get("attn_implementation", recipe.model.attn_implementation)
    if attention is None or "/" in attention:  # a kernel, to be fetched from the Hub
        return
    try:
        on_meta(recipe, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        what = f"attn_implementation: {attention}: {' '.join(str(error).split())}"
        yield Problem(what, "leave it out: the best that is there is taken", "attention")


def _router(recipe: Recipe, model: Any) -> Iterator[Problem]:
    coefficient = recipe.training.router_aux_loss_coef
    if coefficient and not hasattr(model.config.get_text_config(), "output_router_logits"):
        told = f"router_aux_loss_coef: {coefficient}: the model has no experts to route to"
        yield Problem(told, "leave it out", "model")


def _prompts(recipe: Recipe, model: Any) -> Iterator[Problem]:
    if recipe.training.sample_prompts and is_vision_language(model.config):
        yield Problem(NO_COMPLETIONS, "leave it out", "samples")


def _adapter(recipe: Recipe, model: Any) -> Iterator[Problem]:
    asked = recipe.model
    if not asked.use_peft or asked.lora_r < 1 or asked.lora_task_type != CAUSAL:
        return
    names = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    hint, found = f"its modules: {', '.join(_kinds(parameters))}", False
    for field, among in (
        ("lora_target_modules", names),
        ("lora_modules_to_save", names),
        ("lora_target_parameters", parameters),
    ):
        wanted = getattr(asked, field)
        for one in wanted if isinstance(wanted, list) else []:
            if not any(name == one or name.endswith(f".{one}") for name in among):
                told = f"the model has no {'parameter' if among is parameters else 'module'}"
                found = True
                yield Problem(f"{field}: {told} {one}", hint, "adapter")
    if found or not 0 <= asked.lora_dropout < 1:
        return
    try:
        output = adapted(model, recipe).get_output_embeddings()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        yield Problem(f"use_peft: {' '.join(str(error).split())}", code="adapter")
        return
    if isinstance(output, BaseTunerLayer):  # its loss is taken from the weight of the base alone
        told = "lora_target_modules: TRL trains no adapter of the model's head (lm_head)"
        yield Problem(told, "leave it out, or lora_modules_to_save: [lm_head]", "adapter")


def _kinds(parameters: list[str]) -> list[str]:
    """The names of modules that have parameters, without their place: `q_proj`, `down_proj`, …"""
    return list(dict.fromkeys(name.split(".")[-2] for name in parameters if "." in name))

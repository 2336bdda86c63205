"""What this machine and a model have of the kernels that `policy.kernels` decides about."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from keepstep.policy.kernels import Asked, Kernels, Machine, choose, lacks
from keepstep.preflight.shapes import on_meta
from keepstep.recipe.config import Recipe
from keepstep.recipe.model import is_vision_language
from keepstep.run_folder.reader import RunFolder

logger = logging.getLogger(__name__)
LIGER_TABLE = "liger_kernel.transformers.monkey_patch"


def machine_of(training: Any) -> Machine:
    """What this process has to compute with. Ranks: any, each for itself."""
    if training.use_cpu or not torch.cuda.is_available():
        return Machine("no CUDA device" if not torch.cuda.is_available() else "on CPU")
    return Machine(
        capability=torch.cuda.get_device_capability(),
        flash=_fault("flash_attn", is_flash_attn_2_available(), "flash-attn"),
        liger=_fault(LIGER_TABLE, is_liger_kernel_available(), "liger-kernel"),
    )


def _fault(module: str, is_there: bool, package: str) -> str:
    """Why a package cannot be used: one that was compiled for another torch fails as it is
    imported, and what nobody has asked for must end no run."""
    if not is_there:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # ImportError, OSError of a library, Triton's own
        logger.warning("%s is installed, and cannot be imported: %s", package, error)
        return f"{package} cannot be imported"
    return ""


def asked_of(recipe: Recipe, model: Any, machine: Machine, **known: Any) -> Asked:
    """What is asked for, of this model (one on the meta device will do). Ranks: any.

    Args:
        recipe: all of it.
        model: the recipe's.
        machine: this one.
        known: what a script's objects say otherwise.
    """
    training = recipe.training
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, init = base.config, getattr(training, "model_init_kwargs", None) or {}
    packing = bool(getattr(training, "packing", False))
    values: dict[str, Any] = {
        "attention": init.get("attn_implementation") or recipe.model.attn_implementation,
        "liger": training.use_liger_kernel,
        "padding_free": getattr(training, "padding_free", None),
        "packing": training.packing_strategy if packing else None,
        "compiled": training.torch_compile_backend if training.torch_compile else None,
        "precision": training.precision,
        "rows_at_once": training.per_device_train_batch_size,
        # Code of a model's own need not know what TRL's collator says of rows in one line.
        "text": not (training.trust_remote_code or is_vision_language(config)),
        "takes_flash": bool(getattr(base, "_supports_flash_attn", False)),
        "takes_liger": not init.get("use_kernels") and _takes_liger(config, machine),
        "widest_head": _widest_head(config),
        "own": config._attn_implementation,
    }
    return Asked(**values | known)


def _takes_liger(config: Any, machine: Machine) -> bool:
    if machine.without or machine.liger:
        return False  # for that reason
    table = getattr(importlib.import_module(LIGER_TABLE), "MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    return config.model_type in table


def _widest_head(config: Any) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    shared = getattr(text, "hidden_size", 0) // (heads if isinstance(heads, int) else 1)
    named = [getattr(text, name, None) or 0 for name in ("head_dim", "global_head_dim")]
    return max(n if isinstance(n, int) else 0 for n in (named if any(named) else [shared]))


def kernels_here(recipe: Recipe) -> Kernels | None:
    """What a run of this recipe would compute with on this machine; None where its model cannot be
    looked at. Ranks: any."""
    try:
        model = on_meta(recipe)
    except Exception as error:  # of libraries, and of a model's own code: others tell of it
        logger.info("the model cannot be built without its weights: %s", error)
        return None
    machine = machine_of(recipe.training)
    asked = asked_of(recipe, model, machine)
    return choose(asked, lacks(asked, machine), _began(recipe))


def _began(recipe: Recipe) -> Mapping[str, Any] | None:
    """The settings that a run went on with, if one is there."""
    folder, request = recipe.training.output_dir, str(recipe.training.resume_from_checkpoint)
    newest = RunFolder(folder).latest() if folder and request != "never" else None
    return newest.manifest.settings if newest else None

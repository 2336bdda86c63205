"""What a model card says of a run that its manifests do not know otherwise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from keepstep.publish.card import license_of
from keepstep.recipe.config import Recipe
from keepstep.recipe.data_files import looks_local

logger = logging.getLogger(__name__)


def describe(recipe: Recipe, license_there: str | None = None) -> dict[str, Any]:
    """Base model, data, license, hardware: Hub names only, never a path. Ranks: any.

    The license is what the recipe asks for, or the base model's own (`license_there`: as the Hub
    has it); it is never made up.
    """
    base, training = recipe.model.model_name_or_path, recipe.training
    names = [recipe.data.dataset_name, *(d.path for d in recipe.data.datasets or [])]
    local = base is not None and looks_local(base)
    return {
        "base_model": None if local else base,
        "datasets": [name for name in names if name and not looks_local(name)],
        "license": training.card_data.get("license")
        or (_license_in(Path(str(base)).expanduser()) if local else license_there),
        "precision": training.precision,
        "hardware": hardware(recipe),
        "card": training.card_data,
    }


def hardware(recipe: Recipe) -> str:
    """What this rank computes on. Ranks: any."""
    on_gpu = torch.cuda.is_available() and not recipe.training.use_cpu
    return torch.cuda.get_device_name() if on_gpu else "CPU"


def _license_in(folder: Path) -> str | None:
    """What the base model's card says; that it cannot be read ends no run."""
    try:
        return license_of(folder / "README.md")
    except (OSError, ValueError) as error:
        logger.warning("the license of %s is not known: README.md: %s", folder, error)
        return None

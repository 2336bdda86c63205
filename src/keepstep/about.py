"""What a model card says of a run that its manifests do not know otherwise."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from .config import Recipe
from .preflight import looks_local


def describe(recipe: Recipe, license_there: str | None = None) -> dict[str, Any]:
    """Base model, data, license, hardware: Hub names only, never a path. Ranks: any.

    The license is what the recipe asks for, or the base model's own (`license_there`: as the Hub
    has it); it is never made up.
    """
    base, training = str(recipe.model.model_name_or_path), recipe.training
    card: dict[str, Any] = dict(training.card or {})  # type: ignore[arg-type]
    names = [recipe.data.dataset_name, *(d.path for d in recipe.data.datasets or [])]
    local = looks_local(base)
    return {
        "base_model": None if local else base,
        "datasets": [name for name in names if name and not looks_local(name)],
        "license": card.get("license") or (_license_in(Path(base)) if local else license_there),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "card": card,
    }


def _license_in(folder: Path) -> str | None:
    """What a model's card in its folder says."""
    with contextlib.suppress(Exception):  # there is none, or one that is not readable
        card = ModelCard.load(folder.expanduser() / "README.md")
        return str(card.data.license or "") or None
    return None

"""What a model card says of a run that its manifests do not know otherwise."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from .config import Recipe
from .preflight import looks_local


def describe(recipe: Recipe) -> dict[str, Any]:
    """Base model, data, license, hardware: Hub names only, never a path. Ranks: any.

    The license is what the recipe asks for, or the base model's own; it is never made up.
    """
    base, card = str(recipe.model.model_name_or_path), dict(recipe.training.card or {})  # type: ignore[arg-type]
    names = [recipe.data.dataset_name, *(d.path for d in recipe.data.datasets or [])]
    training = recipe.training
    return {
        "base_model": None if looks_local(base) else base,
        "datasets": [name for name in names if name and not looks_local(name)],
        "license": card.get("license") or _license_of(base),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "card": card,
    }


def _license_of(base: str) -> str | None:
    """What the base model's card says, if it is at hand: in its folder, or in the local cache."""
    with contextlib.suppress(Exception):  # no card, one that is not readable, no network
        source = Path(base).expanduser() / "README.md" if looks_local(base) else base
        return str(ModelCard.load(source).data.license or "") or None
    return None

"""Whole weights, loaded into a model that stands, where their names in the file are others.

transformers 5 has a vision-language model (and one of experts) in memory otherwise than it stores
it, and its Trainer (5.23) loads a file by the names in memory: what it does not find, it leaves as
it was, with a warning.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from keepstep.trainer.restore import random_numbers_apart


def load_renamed(model: Any, folder: Path) -> bool:
    """Load the weights in `folder` by way of a second model, if the file has other names for them.

    Ranks: any, each for itself; not where a model is shared out among the ranks.

    Returns: whether that was so; else nothing was done.
    """
    if not isinstance(model, PreTrainedModel) or not _names(folder) - model.state_dict().keys():
        return False
    with random_numbers_apart():
        config = copy.deepcopy(model.config)
        stored = type(model).from_pretrained(folder, config=config, dtype=model.dtype)
    model.load_state_dict(stored.state_dict())
    model.tie_weights()
    return True


def _names(folder: Path) -> set[str]:
    """Of the weights in a folder, in one file or several."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())

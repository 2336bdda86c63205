"""What the Hub finds wrong with the metadata of a README, in small."""

from __future__ import annotations

import re
from typing import Any

import yaml

METADATA = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def metadata(text: str) -> dict[str, Any]:
    """The metadata, or nothing if it cannot be read."""
    found = METADATA.match(text)
    try:
        read = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return read if isinstance(read, dict) else {}


def check(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings."""
    found = METADATA.match(text)
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        read = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML parse error: {error}"], []
    if not isinstance(read, dict):
        return ["metadata must be a mapping"], []
    errors = _check_license(read) + _check_base_model(read)
    for number, model in enumerate(read.get("model-index") or []):
        errors += _check_model(f"model-index[{number}]", model)
    return errors, []


def _check_license(card: dict[str, Any]) -> list[str]:
    return [] if isinstance(card.get("license", ""), str | list) else ['"license" must be a string']


def _check_base_model(card: dict[str, Any]) -> list[str]:
    models = card.get("base_model", [])
    return [
        f'"base_model" with value {model!r} is not valid. Use a model id from https://hf.co/models.'
        for model in (models if isinstance(models, list) else [models])
        if not isinstance(model, str) or not MODEL_ID.fullmatch(model)
    ]


def _check_model(place: str, model: Any) -> list[str]:
    if not isinstance(model, dict) or not model.get("name"):
        return [f'"{place}.name" is required']
    errors = []
    for number, result in enumerate(model.get("results") or []):
        inside = f"{place}.results[{number}]"
        needed = [key for key in ("task", "dataset", "metrics") if not result.get(key)]
        errors += [f'"{inside}.{key}" is required' for key in needed]
        dataset = result.get("dataset")
        if dataset and not (dataset.get("type") and dataset.get("name")):
            errors.append(f'"{inside}.dataset" needs type and name')
        for metric in result.get("metrics") or []:
            if "type" not in metric or "value" not in metric:
                errors.append(f'"{inside}.metrics" needs type and value')
    return errors

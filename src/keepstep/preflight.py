"""Validate a recipe before anything is loaded; every problem in one report."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from .checkpoint.retention import parse_bytes
from .checkpoint.selection import WORDS
from .config import Problem, Recipe

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{12,}")


def validate(recipe: Recipe) -> list[Problem]:
    """Every problem that can be seen without loading data or model. Ranks: any."""
    checks = (_run_folder, _sources, _retention, _saving, _times, _batch, _secrets, _hub)
    return [problem for check in checks for problem in check(recipe)]


def looks_local(name: str) -> bool:
    """Whether a model or dataset name means a path here rather than `owner/name` on the Hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _run_folder(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    if not training.output_dir:
        return [Problem("output_dir is not set", "name the run folder: output_dir: runs/my-run")]
    folder = Path(training.output_dir)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        found.append(Problem(f"output_dir: {existing} is a file, not a folder"))
    elif not os.access(existing, os.W_OK):
        found.append(Problem(f"output_dir: {existing} is not writable"))
    request = str(training.resume_from_checkpoint)
    # A path may be gone by the time a run carries on from its own checkpoints.
    if request not in WORDS and not request.isdecimal() and "/" not in request:
        found.append(
            Problem(
                f"resume_from_checkpoint: {request!r} is none of {', '.join(WORDS)}, no step, and "
                "no path"
            )
        )
    return found


def _sources(recipe: Recipe) -> list[Problem]:
    model, data, found = recipe.model.model_name_or_path, recipe.data, []
    if not model:
        found.append(Problem("model_name_or_path is not set", "a folder or a Hub model name"))
    elif looks_local(model) and not (Path(model).expanduser() / "config.json").is_file():
        found.append(Problem(f"model_name_or_path: {model} is no folder with a config.json in it"))
    if not data.dataset_name and not data.datasets:
        found.append(
            Problem("neither dataset_name nor datasets is set", "dataset_name: data/train.jsonl")
        )
    for name, value in (
        ("dataset_name", data.dataset_name),
        ("eval_dataset_name", data.eval_dataset_name),
    ):
        if value and looks_local(value) and not Path(value).expanduser().exists():
            found.append(Problem(f"{name}: there is no {value}"))
    if not 0 < data.eval_split_fraction < 1:
        found.append(
            Problem(f"eval_split_fraction: {data.eval_split_fraction} is not between 0 and 1")
        )
    return found


def _retention(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    limit = training.save_total_limit
    if limit is not None and limit < 1:
        found.append(Problem(f"save_total_limit: {limit} would keep nothing", "at least 1"))
    try:
        parse_bytes(training.keep_total_bytes or 0)
    except ValueError as error:
        found.append(Problem(f"keep_total_bytes: {error}"))
    if limit is None or training.keep_ranking == "recency":
        return found
    if training.eval_strategy == "no":
        found.append(
            Problem(
                f"save_total_limit: {limit} keeps the best checkpoints, and eval_strategy: no "
                "leaves nothing to rank them by",
                "set eval_strategy: steps, or ask for age: keep_ranking: recency",
            )
        )
    elif training.metric_for_best_model is None:
        found.append(
            Problem(
                f"save_total_limit: {limit} keeps the best checkpoints, and "
                "metric_for_best_model is not set",
                "metric_for_best_model: eval_loss, or keep_ranking: recency",
            )
        )
    elif limit == 1:
        found.append(
            Problem(
                "save_total_limit: 1 keeps the newest checkpoint only, so the best one is lost",
                "at least 2, or keep_ranking: recency",
            )
        )
    elif training.save_strategy in ("steps", "epoch") and (
        training.save_strategy != training.eval_strategy
    ):
        found.append(
            Problem(
                f"save_strategy: {_word(training.save_strategy)} and eval_strategy: "
                f"{_word(training.eval_strategy)} do not meet, so some checkpoints would have no "
                "metric to rank by",
                "give both the same value",
            )
        )
    elif training.save_strategy == "steps" and not _is_multiple(
        training.save_steps, training.eval_steps or training.save_steps
    ):
        found.append(
            Problem(
                f"save_steps: {training.save_steps:g} is no multiple of eval_steps: "
                f"{training.eval_steps:g}, so some checkpoints would have no metric to rank by",
                "let the two meet: every save at a step that is evaluated",
            )
        )
    return found


def _times(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    try:
        end = training.schedule().deadline
    except ValueError as error:
        return [Problem(f"time_limit or deadline: {error}")]
    if end is not None and end <= time.time() + training.stop_margin_seconds:
        found.append(
            Problem(
                "the deadline is over before a step can be made and saved (stop_margin_seconds: "
                f"{training.stop_margin_seconds:g})",
                "set a later deadline, or a longer time_limit",
            )
        )
    interval = training.save_interval_seconds
    if interval is not None and interval <= 0:
        found.append(Problem(f"save_interval_seconds: {interval:g} is not above 0"))
    return found


def _saving(recipe: Recipe) -> list[Problem]:
    training = recipe.training
    if 0 < training.save_timeout_seconds < training.ddp_timeout:
        return []
    return [
        Problem(
            f"save_timeout_seconds: {training.save_timeout_seconds:g} is not between 0 and "
            f"ddp_timeout: {training.ddp_timeout}: ranks that wait for a slow save would be ended",
            "raise ddp_timeout with it",
        )
    ]


def _batch(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    if training.auto_find_batch_size:
        found.append(
            Problem(
                "auto_find_batch_size would change the rows of a step in mid-run",
                "set per_device_train_batch_size, and gradient_accumulation_steps",
            )
        )
    if training.n_gpu > 1:
        found.append(
            Problem(
                f"one process sees {training.n_gpu} GPUs: Trainer would use all, by DataParallel",
                "launch a process for each: --num_processes, or set CUDA_VISIBLE_DEVICES",
            )
        )
    return found


def _word(strategy: str) -> str:
    """transformers turns the field into a member of its enumeration."""
    return str(getattr(strategy, "value", strategy))


def _is_multiple(steps: float, of: float) -> bool:
    """Steps, or shares of the run below 1, whose division is exact but for rounding."""
    return abs(steps / of - round(steps / of)) < 1e-9


def _secrets(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    if training.hub_token:
        found.append(
            Problem(
                "hub_token is set in the recipe or as a flag: it would stand in files and in the "
                "process list",
                "export HF_TOKEN=… (or `hf auth login`) instead",
            )
        )
    for where, value in _strings(vars(training) | vars(recipe.model) | vars(recipe.data)):
        if TOKEN.search(value):
            found.append(
                Problem(f"{where} holds what looks like a token", "export HF_TOKEN=… instead")
            )
    return found


def _strings(values: dict[Any, Any]) -> Iterator[tuple[str, str]]:
    """Every text in a recipe, with the field that it stands in."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        elif is_dataclass(value) and not isinstance(value, type):
            value = vars(value)
        if isinstance(value, dict):
            yield from ((name, text) for _, text in _strings(value))
        elif isinstance(value, str) and name != "hub_token":
            yield name, value


def _hub(recipe: Recipe) -> list[Problem]:
    training, found = recipe.training, []
    if not training.push_to_hub:
        return []
    if not training.hub_model_id or training.hub_model_id.count("/") != 1:
        found.append(
            Problem(
                f"push_to_hub: hub_model_id is {training.hub_model_id!r}",
                "name the repository: hub_model_id: owner/name",
            )
        )
    if training.hub_revision:
        found.append(Problem(f"hub_revision: {training.hub_revision}: the best goes to main"))
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        found.append(Problem("push_to_hub: HF_HUB_OFFLINE is set", "unset it, or push_to_hub"))
    if not get_token():
        found.append(Problem("push_to_hub: there is no token", "export HF_TOKEN=…"))
    if training.policy().metric is None or training.eval_strategy == "no":
        found.append(
            Problem(
                "push_to_hub publishes the best checkpoint, and there is nothing to rank them by",
                "eval_strategy: steps, metric_for_best_model: eval_loss",
            )
        )
    named = training.card_data.get("base_model")
    if recipe.model.use_peft and looks_local(str(recipe.model.model_name_or_path)) and not named:
        found.append(
            Problem(
                "push_to_hub: an adapter is of no use without its base model's name on the Hub",
                "card: {base_model: owner/name}",
            )
        )
    return found

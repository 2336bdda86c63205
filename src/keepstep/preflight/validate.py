"""Validate a recipe before anything is loaded; every problem in one report. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import get_token
from packaging.requirements import Requirement

from keepstep.data.columns import wrong_names
from keepstep.data.mixture import STRATEGIES
from keepstep.hub.client import name_fault, offline
from keepstep.output.environment import TOKEN
from keepstep.policy.selection import WORDS, SelectionError
from keepstep.preflight.health import check_health
from keepstep.preflight.launch import check_launch, launch_of
from keepstep.preflight.libraries import check_libraries
from keepstep.preflight.metric import (
    check_metric,
    check_own_metrics,
    check_samples,
    check_sets,
)
from keepstep.preflight.model_files import unreadable
from keepstep.preflight.numbers import check_numbers
from keepstep.preflight.saving import check_saving
from keepstep.publish.card import fault_of
from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.data_files import is_data_file, looks_local
from keepstep.recipe.trajectory import word
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import is_file


def validate(recipe: Recipe) -> list[Problem]:
    """Every problem that can be seen without loading data or model. Ranks: any."""
    return [problem for check in (*NAMED, *CHECKS) for problem in check(recipe)]


def validate_given(recipe: Recipe, metrics_of_its_own: bool) -> list[Problem]:
    """The same of a run whose rows are there already, as objects, and whose model may be.

    Ranks: any.

    Args:
        recipe: what is known of the run.
        metrics_of_its_own: an evaluation may give other metrics than SFTTrainer's.
    """
    found = [problem for check in CHECKS for problem in check(recipe)]
    if metrics_of_its_own:
        found = [problem for problem in found if problem.code != "unknown-metric"]
    return found


def severity_of_hub(recipe: Recipe) -> Literal["error", "warning"]:
    """Of what keeps a run from publishing: a job that comes back has days of training to lose, and
    `keepstep push` makes good what it could not publish."""
    begun = is_file(RunFolder(str(recipe.training.output_dir)).identity)
    return "warning" if begun else "error"


def nearest(folder: Path) -> Path:
    """The folder itself, or the first of those above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _run_folder(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if not training.output_dir:
        yield Problem(
            "output_dir is not set", "name the run folder: output_dir: runs/my-run", "run"
        )
        return
    existing = nearest(Path(training.output_dir))
    if not existing.is_dir():
        yield Problem(f"output_dir: {existing} is a file, not a folder", code="run")
    elif not os.access(existing, os.W_OK):
        yield Problem(f"output_dir: {existing} is not writable", code="run")
    try:
        RunFolder(training.output_dir).run_id()
    except SelectionError as error:
        what, _, hint = str(error).partition("\n    Hint: ")
        yield Problem(f"output_dir: {training.output_dir}: {what}", hint, "run")
    request = str(training.resume_from_checkpoint)
    # A path may be gone by the time a run carries on from its own checkpoints.
    if request not in WORDS and not request.isdecimal() and "/" not in request:
        yield Problem(
            f"resume_from_checkpoint: {request!r} is none of {', '.join(WORDS)}, no step, and "
            "no path",
            code="resume",
        )
    if training.ignore_data_skip:
        yield Problem(
            "ignore_data_skip: a resumed run would be given the same rows again",
            "leave it out: keepstep skips rows without reading them",
            "resume",
        )


def _model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model.model_name_or_path
    if not model:
        yield Problem("model_name_or_path is not set", "a folder or a Hub model name", "model")
    elif looks_local(model) and not (Path(model).expanduser() / "config.json").is_file():
        yield Problem(
            f"model_name_or_path: {model} is no folder with a config.json in it", code="model"
        )
    elif looks_local(model):
        yield from unreadable(model)


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if not data.dataset_name and not data.datasets:
        yield Problem(
            "neither dataset_name nor datasets is set", "dataset_name: data/train.jsonl", "data"
        )
    yield from _beside_each_other(recipe)
    named = [("dataset_name", data.dataset_name), ("eval_dataset_name", data.eval_dataset_name)]
    named += [(f"eval_datasets: {name}", path) for name, path in (data.eval_datasets or {}).items()]
    for part in data.datasets:
        named.append(("datasets: path", part.path))
        files = part.data_files if isinstance(part.data_files, (str, list)) else []
        for file in [files] if isinstance(files, str) else files:
            if part.data_dir is None and is_data_file(file) and not set(file) & set("*?[:"):
                beside = Path(part.path).expanduser() / file
                named.append(("datasets: data_files", str(beside) if beside.exists() else file))
    for name, value in named:
        if value and looks_local(value) and not Path(value).expanduser().exists():
            yield Problem(f"{name}: there is no {value}", code="data")
    if data.column_names is not None:
        wrong = wrong_names(data.column_names, recipe.training.dataset_text_field)
        if wrong:
            hint = "column_names: {prompt: question, completion: answer}"
            yield Problem(f"column_names: {wrong}", hint, "data")
    if data.mixture_stopping_strategy not in STRATEGIES:
        told = f"mixture_stopping_strategy: {data.mixture_stopping_strategy!r} is none of"
        yield Problem(f"{told}: {', '.join(STRATEGIES)}", code="data")
    if not 0 < data.eval_split_fraction < 1:
        yield Problem(
            f"eval_split_fraction: {data.eval_split_fraction} is not between 0 and 1", code="data"
        )
    if data.test_split_size is not None and data.test_split_size <= 0:
        yield Problem(
            f"test_split_size: {data.test_split_size} is neither a share nor a number of rows",
            "test_split_size: 0.05",
            "data",
        )


def _beside_each_other(recipe: Recipe) -> Iterator[Problem]:
    """Of two fields, one would be passed over without a word."""
    data = recipe.data
    if data.dataset_name and data.datasets:
        yield Problem(
            "dataset_name and datasets are both set: which is it?",
            f"all in one: datasets: [{{path: {data.dataset_name}}}, …]",
            "data",
        )
    elif data.datasets and (data.dataset_config or data.dataset_train_split != "train"):
        name = "dataset_config" if data.dataset_config else "dataset_train_split"
        yield Problem(
            f"{name} is for dataset_name; of datasets, each part has its own",
            "datasets: [{path: …, name: CONFIG, split: SPLIT}]",
            "data",
        )
    fractions = [part.fraction for part in data.datasets]
    weighted = any(fraction is not None for fraction in fractions)
    if weighted and not all(fraction is not None and fraction > 0 for fraction in fractions):
        told = ", ".join("none" if fraction is None else f"{fraction}" for fraction in fractions)
        what = f"datasets: fraction is a number above 0 for each part, or for none: {told}"
        yield Problem(what, "leave a part out that is to have no rows", "data")
    if data.mixture_stopping_strategy == "all_exhausted" and not weighted:
        told = "mixture_stopping_strategy is for datasets whose parts have a fraction"
        yield Problem(told, "datasets: [{path: …, fraction: 0.7}, …]", "data")
    if data.test_split_size is not None and not data.datasets:
        yield Problem(
            "test_split_size is for datasets", "with dataset_name: eval_split_fraction", "data"
        )
    elif data.test_split_size is not None and data.eval_dataset_name:
        yield Problem(
            "test_split_size and eval_dataset_name are both set: which is it?",
            "leave one of them out",
            "data",
        )


def _stream(recipe: Recipe) -> Iterator[Problem]:
    """What cannot be had of rows whose number is not known."""
    data, training = recipe.data, recipe.training
    if not (data.dataset_streaming or data.streaming):
        return
    if training.max_steps <= 0:
        yield Problem("a stream has no length that is known", "set max_steps", "data")
    for name in ("save_strategy", "eval_strategy"):
        if word(getattr(training, name)) == "epoch":
            yield Problem(
                f"{name}: epoch: where a pass over a stream ends is not known, so that a run could "
                "not be resumed there",
                f"{name}: steps",
                "data",
            )


def _saving(recipe: Recipe) -> Iterator[Problem]:
    return check_saving(recipe.training)


def _batch(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if training.auto_find_batch_size:
        yield Problem(
            "auto_find_batch_size would change the rows of a step in mid-run",
            "set per_device_train_batch_size, and gradient_accumulation_steps",
            "batch",
        )
    if training.n_gpu > 1:
        yield Problem(
            f"one process sees {training.n_gpu} GPUs: Trainer would use all, by DataParallel",
            "launch a process for each: --num_processes, or set CUDA_VISIBLE_DEVICES",
            "batch",
        )


def _launch(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if training.world_size % training.sequence_size:
        yield Problem(
            f"sequence parallelism (sp_size: {training.sequence_size}) does not divide "
            f"{training.world_size} processes",
            f"--num_processes {training.sequence_size}, or a multiple of it",
            "launch",
        )
    yield from check_launch(launch_of(recipe), recipe)


def _secrets(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if training.hub_token:
        yield Problem(
            "hub_token is set in the recipe or as a flag: it would stand in files and in the "
            "process list",
            "export HF_TOKEN=… (or `hf auth login`) instead",
            "token",
        )
    for where, value in _strings(vars(training) | vars(recipe.model) | vars(recipe.data)):
        if TOKEN.search(value):
            yield Problem(
                f"{where} holds what looks like a token", "export HF_TOKEN=… instead", "token"
            )


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


def _hub(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training
    if training.card is not None and not isinstance(training.card, dict):
        yield Problem(f"card: {training.card!r} is no mapping", "card: {license: mit}", "card")
        return
    if fault := fault_of(training.card_data):
        yield Problem(fault, "card: {license: mit}", "card")
    if not training.push_to_hub:
        return
    if name_fault(training.hub_model_id or ""):
        yield Problem(
            f"push_to_hub: hub_model_id is {training.hub_model_id!r}",
            "name the repository: hub_model_id: owner/name",
            "hub",
        )
    if training.hub_revision:
        yield Problem(f"hub_revision: {training.hub_revision}: the best goes to main", code="hub")
    severity = severity_of_hub(recipe)
    if variable := offline():
        text = f"push_to_hub: {variable} is set"
        yield Problem(text, "unset it, or push_to_hub", "hub", severity)
    if not get_token():
        yield Problem("push_to_hub: there is no token", "export HF_TOKEN=…", "hub", severity)
    if training.ranking_metric is None:
        yield Problem(
            "push_to_hub publishes the best checkpoint, and there is nothing to rank them by",
            "eval_strategy: steps, metric_for_best_model: eval_loss",
            "hub",
        )
    named = training.card_data.get("base_model")
    if recipe.model.use_peft and looks_local(str(recipe.model.model_name_or_path)) and not named:
        yield Problem(
            "push_to_hub: an adapter is of no use without its base model's name on the Hub",
            "card: {base_model: owner/name}",
            "hub",
        )


def _versions(recipe: Recipe) -> Iterator[Problem]:
    """Libraries outside of the ranges that keepstep was tested with."""
    for text in requires("keepstep") or []:
        wanted = Requirement(text)
        if wanted.marker is not None:
            continue  # of an extra
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            continue  # its import has failed already, or it is not needed here
        if not wanted.specifier.contains(found, prereleases=True):
            yield Problem(
                f"{wanted.name} {found} is installed; tested with {wanted.specifier}",
                f"pip install '{wanted}'",
                "version",
                "warning",
            )


# What a recipe names; and the rest.
NAMED = (_model, _data, check_sets)
CHECKS = (
    *(_run_folder, _stream, check_numbers, check_health, _saving, check_metric),
    *(
        check_own_metrics,
        check_samples,
        _batch,
        _launch,
        check_libraries,
        _secrets,
        _hub,
        _versions,
    ),
)

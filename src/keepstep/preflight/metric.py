"""Whether evaluations will give what ranks checkpoints, and which of two values is better. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keepstep.data.prompts import read_prompts
from keepstep.policy.metric import (
    HIGHER,
    LOWER,
    OTHERS,
    PREFIX,
    SAMPLED,
    SET_NAME,
    names_of,
    terms_of,
)
from keepstep.policy.metric import greater_is_better as better
from keepstep.policy.own_metric import FORM, asked_for
from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.functions import named
from keepstep.recipe.trajectory import word

TAKEN = ("train", "eval")  # TRL's own names for the two kinds of rows


def check_sets(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the names of the evaluation sets. Ranks: any."""
    data = recipe.data
    if data.eval_datasets is None:
        return
    if not data.eval_datasets:
        yield Problem("eval_datasets is empty", "eval_datasets: {math: data/math.jsonl}", "data")
    for name, where in data.eval_datasets.items():
        if not SET_NAME.fullmatch(name) or name in TAKEN:
            yield Problem(
                f"eval_datasets: {name!r} cannot be a part of a metric's name",
                "a word of letters, digits, _, - and ., and neither train nor eval",
                "data",
            )
        if not where:
            yield Problem(
                f"eval_datasets: {name} names no dataset", f"{name}: data/{name}.jsonl", "data"
            )
    if data.eval_dataset_name:
        yield Problem(
            "eval_dataset_name and eval_datasets are both set: which is it?",
            f"all in one: eval_datasets: {{main: {data.eval_dataset_name}, …}}",
            "data",
        )
    if data.test_split_size is not None:
        yield Problem(
            "test_split_size and eval_datasets are both set: which is it?",
            "leave one of them out",
            "data",
        )


def check_own_metrics(recipe: Recipe) -> Iterator[Problem]:
    """Whether `metrics` names a function that can be called so. It is imported. Ranks: any."""
    name = getattr(recipe.training, "metrics", None)
    if name is None:
        return
    try:
        asked_for(named(name))
    except ValueError as error:
        hint = "metrics: my_metrics.py:top5, where def top5(labels, logits): ... returns "
        yield Problem(f"metrics: {name}: {error}", hint + FORM, "metrics")
    if word(recipe.training.eval_strategy) == "no":
        what = "metrics are what evaluations give, and eval_strategy: no makes none"
        yield Problem(what, "eval_strategy: steps", "metrics")


def check_samples(recipe: Recipe) -> Iterator[Problem]:
    """Whether `sample_prompts` names prompts, and what ranks can be had of them. Ranks: any."""
    training = recipe.training
    name = getattr(training, "sample_prompts", None)
    if name is None:
        return
    if word(training.eval_strategy) == "no":
        what = "sample_prompts are answered at evaluations, and eval_strategy: no makes none"
        yield Problem(what, "eval_strategy: steps", "samples")
    try:
        prompts = read_prompts(Path(name), training.dataset_text_field)
    except ValueError as error:
        hint = 'a .txt with a prompt a line, or a .jsonl with {"prompt": …} or {"messages": […]}'
        yield Problem(f"sample_prompts: {error}", hint, "samples")
        return
    ranks = PREFIX + SAMPLED in (training.ranking_metric or "")
    if ranks and all(prompt.reference is None for prompt in prompts):
        what = f"metric_for_best_model: {PREFIX}{SAMPLED}: no prompt of {name} has a reference"
        yield Problem(what, '{"prompt": …, "reference": …}', "samples")


def check_metric(recipe: Recipe) -> Iterator[Problem]:
    """Whether the evaluation gives the metric, and which of two values is better. Ranks: any."""
    training = recipe.training
    metric, said = training.ranking_metric, training.metric_for_best_model
    if metric is None:
        return
    try:
        terms = terms_of(metric)
    except ValueError as error:
        hint = "eval_loss, or 0.7*eval_math_loss + 0.3*eval_code_loss"
        yield Problem(f"metric_for_best_model: {error}", hint, "metric")
        return
    sets = recipe.data.eval_datasets or ()
    known = names_of(sets)
    if getattr(training, "sample_prompts", None):
        known[PREFIX + SAMPLED] = SAMPLED
    own = tuple(names_of(sets, [""])) if getattr(training, "metrics", None) else ()
    unknown = [term.name for term in terms if term.name not in known]
    if unknown and all(name.startswith(own) for name in unknown):
        if not training.direction_is_given and better(metric) is None:
            yield Problem(
                f"metric_for_best_model: {said} is a metric of yours: is more of it better?",
                "greater_is_better: true or false",
                "direction",
            )
        return
    if unknown:
        told = said if len(terms) == 1 else f"{said}: {', '.join(unknown)}"
        yield Problem(
            f"metric_for_best_model: {told} is nothing that the evaluation gives",
            f"one of {', '.join(known)}",
            "unknown-metric",
        )
        return
    yield from _direction(recipe, metric, {known[term.name] for term in terms})


def _direction(recipe: Recipe, metric: str, names: set[str]) -> Iterator[Problem]:
    training = recipe.training
    said = training.metric_for_best_model
    if names & set(LOWER) and names & {*HIGHER, SAMPLED}:
        yield Problem(
            f"metric_for_best_model: {said}: of one more is better, of another less",
            "a sum of losses, or of accuracies",
            "direction",
        )
    elif names & set(OTHERS) and not training.direction_is_given:
        yield Problem(
            f"metric_for_best_model: {said}: is more of it better?",
            "greater_is_better: true or false",
            "direction",
        )
    elif better(metric) not in (None, bool(training.greater_is_better)):
        yield Problem(
            f"greater_is_better: {str(bool(training.greater_is_better)).lower()} keeps the worst "
            f"checkpoints by {metric}",
            "leave greater_is_better out",
            "direction",
            "warning",
        )

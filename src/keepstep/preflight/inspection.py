"""What can be said of rows, tokenizer and model together before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from keepstep.data import images
from keepstep.data.dataset import Data
from keepstep.data.tokenize import (
    Positions,
    beyond_vocabulary,
    packs,
    takes_images,
    too_few,
    try_few,
)
from keepstep.preflight.shapes import configuration_of
from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.model import ProcessingClass, tokenizer_in, with_chat_template


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        problems: errors and warnings.
        tokenised: of each part of the data, the rows that were made into tokens, to try it.
    """

    problems: Sequence[Problem]
    tokenised: Mapping[str, int] = field(default_factory=dict)


def inspect(
    data: Data,
    tokenizer: ProcessingClass,
    recipe: Recipe,
    processes: int | None = None,
) -> Inspection:
    """Make a few rows into tokens, as they will be. Ranks: any, each for itself.

    Args:
        data: the rows.
        tokenizer: the model's, or its processor.
        recipe: all of it.
        processes: of the launch, where it is not this one.

    Raises:
        ConfigError: there is no chat template at `chat_template_path`.
    """
    training = recipe.training
    rendering = with_chat_template(tokenizer, training)
    positions = positions_of(recipe)
    problems, tokenised = [*data.warnings, *_unknown_tokens(tokenizer, recipe)], {}
    for what, part in data.parts.items():
        found = _images(what, data, recipe, processes) if takes_images(tokenizer) else []
        tokenised[what] = 0
        if not found:
            tokenised[what], found = try_few(what, part, rendering, training, positions)
        problems += found
        if training.chat_template_path is None:  # else TRL may give the model more tokens
            problems += beyond_vocabulary(what, part, positions)
        if what != "training" and not packs(what, training):
            problems += too_few(part.rows, training, processes)
    same = any(part.source == data.training.source for part in data.evaluation.values())
    if same and training.eval_strategy != "no":
        told = f"the evaluation rows are the training rows: {data.training.source}"
        problems.append(Problem(told, "the best by them has learned them best", "data", "warning"))
    return Inspection(problems, tokenised)


def _images(what: str, data: Data, recipe: Recipe, processes: int | None) -> list[Problem]:
    """What is wrong with the images of rows, and the fields that go with them."""
    part, training = data.parts[what], recipe.training
    column = images.image_column(next(iter(part.rows)))
    if (column is None) != (images.image_column(next(iter(data.training.rows))) is None):
        told = "either the training or the evaluation rows have images, not both"
        return [Problem(told, "both take one collator (trl 1.16)", "data")]
    if column is None:
        return []
    processes = processes or int(training.world_size)
    return images.check(what, part.rows, part.layout, training, processes)


def _unknown_tokens(processing: ProcessingClass, recipe: Recipe) -> Iterator[Problem]:
    """Special tokens of the recipe that the tokenizer has not."""
    tokenizer = tokenizer_in(processing)
    vocabulary = tokenizer.get_vocab()
    for name in ("eos_token", "pad_token"):
        token = getattr(recipe.training, name)
        later = name == "pad_token" and recipe.training.chat_template_path is not None
        if token is not None and token not in vocabulary and not later:
            told = f"{name}: {token!r} is no token of {recipe.model.model_name_or_path}"
            yield Problem(told, f"it has {getattr(tokenizer, name)!r}", "field")


def positions_of(recipe: Recipe) -> Positions:
    """How long a row the recipe's model takes; not known where its configuration is not to be had:
    loading it will say why."""
    try:
        config = configuration_of(recipe, trust_remote_code=recipe.training.trust_remote_code)
    except (OSError, ValueError):
        return Positions()
    return Positions.of(config)

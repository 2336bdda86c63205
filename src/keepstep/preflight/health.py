"""What is to follow a step that spoils the run: whether that can be done. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from keepstep.recipe.config import Problem, Recipe

WINDOWS = 5, 10_000  # steps: a deviation of fewer says nothing; a manifest holds them all
FIELDS = ("on_nonfinite", "on_spike")


def check_health(recipe: Recipe) -> Iterator[Problem]:
    """Spikes, and going back from one, or from what is not finite. Ranks: any."""
    training, data = recipe.training, recipe.data
    sigma, window = training.spike_sigma, training.spike_window
    if sigma is not None and not 0 < sigma < math.inf:
        told = f"spike_sigma: {sigma:g} is no number of standard deviations above 0"
        yield Problem(told, "spike_sigma: 6", "number")
    if not WINDOWS[0] <= window <= WINDOWS[1]:
        told = f"spike_window: {window} is not between {WINDOWS[0]} and {WINDOWS[1]} steps"
        yield Problem(told, "spike_window: 100", "number")
    if training.max_rewinds < 0:
        yield Problem(f"max_rewinds: {training.max_rewinds} is below 0", code="number")
    if sigma is None and training.on_spike != "ignore":
        told = f"on_spike: {training.on_spike}: without spike_sigma no spike is looked for"
        yield Problem(told, "spike_sigma: 6, or leave on_spike out", "rewind")
    asked = [f"{name}: rewind" for name in FIELDS if getattr(training, name) == "rewind"]
    if not asked:
        return
    if data.dataset_streaming or data.streaming:
        told = f"{asked[0]}: rows of a stream have no number by which they could be left out"
        yield Problem(told, _hint(asked[0]), "rewind")
    if not training.rows_are_dealt:
        told = f"{asked[0]}: train_sampling_strategy: batch_rebalance deals the rows itself"
        yield Problem(told, _hint(asked[0]), "rewind")


def check_dealer(dealer: str | None, recipe: Recipe) -> Iterator[Problem]:
    """The same of a Trainer that is given as a class. Ranks: any.

    Args:
        dealer: the class that deals the rows of a step itself; None: keepstep does.
    """
    for name in FIELDS:
        if dealer is not None and getattr(recipe.training, name) == "rewind":
            told = f"{name}: rewind: {dealer} deals the rows of a step itself"
            yield Problem(told, _hint(f"{name}: rewind"), "rewind")
            return


def _hint(asked: str) -> str:
    return f"{asked.split(':')[0]}: stop names the step and the rank"

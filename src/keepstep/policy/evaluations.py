"""What a run's evaluations say: which was the best. Pure: no disk, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from keepstep.policy.metric import value_of


def best_of(
    history: Iterable[Mapping[str, Any]], metric: str, greater_is_better: bool
) -> tuple[float, int] | None:
    """The best value of `metric` and the step that it came from; None: there is none.

    As the Trainer counts while it trains: the first of equal ones, and none of step 0 (see
    `eval_on_start`).

    Args:
        history: the Trainer's log, in its order.
        metric: by its full name, as in `eval_loss`, or a sum of several.
    """
    best: tuple[float, int] | None = None
    for step, numbers in _by_step(history).items():
        value = value_of(numbers, metric)
        if value is None or not math.isfinite(value):
            continue
        if best is None or (value > best[0] if greater_is_better else value < best[0]):
            best = float(value), step
    return best


def _by_step(history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The numbers of each step: of several evaluation sets, each has an entry of its own."""
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        step = entry.get("step")
        if step:
            numbers = {n: v for n, v in entry.items() if isinstance(v, (int, float))}
            found.setdefault(int(step), {}).update(numbers)
    return found

"""What a run's evaluations say: which was the best. Pure: no disk, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def best_of(
    history: Iterable[Mapping[str, Any]], metric: str, greater_is_better: bool
) -> tuple[float, int] | None:
    """The best value of `metric` and the step that it came from; None: there is none.

    As the Trainer counts while it trains: the first of equal ones, and none of step 0 (see
    `eval_on_start`).

    Args:
        history: the Trainer's log, in its order.
        metric: by its full name, as in `eval_loss`.
    """
    best: tuple[float, int] | None = None
    for entry in history:
        value, step = entry.get(metric), entry.get("step")
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not step:
            continue
        if best is None or (value > best[0] if greater_is_better else value < best[0]):
            best = float(value), int(step)
    return best

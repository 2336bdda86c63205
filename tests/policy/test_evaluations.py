"""The best of a run's evaluations, as its log tells it."""

from __future__ import annotations

import math

from keepstep.policy.evaluations import best_of

LOG = [
    {"step": 0, "eval_loss": 0.1, "eval_accuracy": 0.9},  # eval_on_start ranks nothing
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval_loss": 3.0, "eval_accuracy": 0.2},
    {"step": 4, "eval_loss": 2.0, "eval_accuracy": 0.4},
    {"step": 6, "eval_loss": 2.0, "eval_accuracy": 0.3},
    {"step": 8, "eval_loss": math.nan},
    {"step": 9, "eval_loss": -math.inf},
]


def test_the_first_of_the_best_in_either_direction() -> None:
    assert best_of(LOG, "eval_loss", greater_is_better=False) == (2.0, 4)
    assert best_of(LOG, "eval_loss", greater_is_better=True) == (3.0, 2)
    assert best_of(LOG, "eval_accuracy", greater_is_better=True) == (0.4, 4)
    assert best_of(LOG, "eval_rouge", greater_is_better=True) is None
    assert best_of([], "eval_loss", greater_is_better=False) is None

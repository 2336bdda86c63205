"""What a plateau's schedule is begun anew for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.trainer.restore import ranked_otherwise

SUM = "eval_a_loss*0.7 + eval_b_loss*0.3"


@pytest.mark.parametrize(
    ("stored", "now", "expected"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "loss"}, "eval_loss", False),
        ({"metric_for_best_model": "0.7*eval_a_loss + 0.3*b_loss"}, SUM, False),
        ({"metric_for_best_model": "0.6*eval_a_loss + 0.4*b_loss"}, SUM, True),
        ({"metric_for_best_model": None}, "eval_loss", True),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, "eval_loss", True),
    ],
)
def test_whether_another_metric_ranks(stored: dict[str, Any], now: str, expected: bool) -> None:
    args = SimpleNamespace(metric_for_best_model=now, greater_is_better=False)
    assert ranked_otherwise(stored, args) is expected

"""What is told of a run while it trains, and around that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.trainer.reporter import RunReporter


@pytest.mark.parametrize(
    ("training", "max_steps", "told"),
    [
        (False, 0, "eval_loss 1.5000\n"),  # before there is a run
        (True, 12, "step  8/12  eval_loss 1.5000  (best so far)\n"),
        (False, 12, "step  8/12  eval_loss 1.5000\n"),  # after it: no evaluation of the run's own
    ],
)
def test_an_evaluation(
    training: bool, max_steps: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(
        is_in_train=training,
        manager=SimpleNamespace(policy=SimpleNamespace(metric=None)),
        state=SimpleNamespace(best_metric=None),
        args=SimpleNamespace(greater_is_better=False),
    )
    state = SimpleNamespace(global_step=8 if max_steps else 0, max_steps=max_steps)
    RunReporter(trainer).on_evaluate(None, state, None, metrics={"eval_loss": 1.5})
    assert capsys.readouterr().out == told

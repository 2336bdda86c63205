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


def test_a_value_that_is_not_finite_is_no_best_and_no_loss_of_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The Trainer says 0 of steps that it has left out of its mean."""
    bad = iter([0, 1, 3])
    trainer: Any = SimpleNamespace(
        is_in_train=True,
        resharded=None,
        last_saved=None,
        manager=SimpleNamespace(policy=SimpleNamespace(metric="eval_loss"), figures={}),
        every_step=SimpleNamespace(health=SimpleNamespace(bad_losses=lambda: next(bad))),
    )
    reporter, state = RunReporter(trainer), SimpleNamespace(global_step=0, max_steps=6)
    reporter.on_train_begin(None, state, None)
    for state.global_step, loss in [(2, 5.0), (4, 4.0), (6, 0.0)]:
        reporter.on_log(None, state, None, logs={"loss": loss, "learning_rate": 0.1})
    reporter.on_evaluate(None, state, None, metrics={"eval_loss": float("nan")})
    assert capsys.readouterr().out.splitlines() == [
        "step 2/6  loss 5.0000  lr 1.00e-01",
        "step 4/6  loss 4.0000 (not finite in 1 of 2 steps)  lr 1.00e-01",
        "step 6/6  loss nan  lr 1.00e-01",
        "step 6/6  eval_loss nan  (not finite: it ranks nothing)",
    ]

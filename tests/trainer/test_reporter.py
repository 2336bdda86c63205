"""What is told of a run while it trains, and around that."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from keepstep.output.terminal import Terminal
from keepstep.trainer import reporter as reporter_module
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
    reporter.on_train_end(None, SimpleNamespace(**vars(state), log_history=[]), None)
    assert capsys.readouterr().out.splitlines() == [
        "step 2/6  loss 5.0000  lr 1.00e-01",
        "step 4/6  loss 4.0000 (not finite in 1 of 2 steps)  lr 1.00e-01",
        "step 6/6  loss nan  lr 1.00e-01",
        "step 6/6  eval_loss nan  (not finite: it ranks nothing)",
        "step 6/6  last training loss nan (mean of steps 5 to 6)",
    ]


def reporter_of() -> RunReporter:
    trainer: Any = SimpleNamespace(
        is_in_train=True,
        resharded=None,
        last_saved=None,
        manager=SimpleNamespace(policy=SimpleNamespace(metric="eval_loss"), figures={}),
        every_step=SimpleNamespace(health=SimpleNamespace(bad_losses=lambda: 0)),
    )
    return RunReporter(trainer)


def test_on_a_terminal_the_last_loss_stays_and_the_bar_goes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(
        reporter_module, "console", Terminal(width=80, force_terminal=True, color_system=None)
    )
    monkeypatch.setenv("TERM", "xterm")
    reporter, state = reporter_of(), SimpleNamespace(global_step=0, max_steps=25, log_history=[])
    reporter.on_train_begin(None, state, None)
    request.addfinalizer(reporter.close)
    state.global_step = 20
    reporter.on_log(None, state, None, logs={"loss": 1.5, "learning_rate": 0.1})
    for _ in range(3):
        reporter.on_prediction_step(None, state, None, eval_dataloader=range(7))
    assert reporter.progress is not None
    (task,) = reporter.progress.tasks
    assert re.fullmatch(r"evaluating: batch 3 of 7  \d+ s left", task.description)
    reporter.on_evaluate(None, state, None, metrics={})
    assert task.description.startswith("loss 1.5000")
    state.global_step = 25
    reporter.on_train_end(None, state, None)
    assert reporter.progress is None
    *_, shown = capsys.readouterr().out.split("\x1b[2K")  # the bar is wiped out
    assert shown == "step 25/25  last training loss 1.5000 (mean of steps 1 to 20)\n"


def test_what_an_earlier_attempt_logged_last(capsys: pytest.CaptureFixture[str]) -> None:
    history = [
        {"loss": 2.0, "step": 10},
        {"loss": 1.25, "step": 20},
        {"eval_loss": 1.0, "step": 20},
    ]
    state = SimpleNamespace(global_step=22, max_steps=22, log_history=history)
    reporter_of().on_train_end(None, state, None)
    assert capsys.readouterr().out == "step 22/22  last training loss 1.2500 (logged at step 20)\n"
    for none in ([], [{"loss": 0.0, "step": 20}], [{"loss": float("nan"), "step": 20}]):
        state.log_history = none
        reporter_of().on_train_end(None, state, None)
    assert capsys.readouterr().out == ""

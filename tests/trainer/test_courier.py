"""What goes out beside training: in order, nothing lost, and its end bounded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import pytest

from keepstep.trainer import courier
from keepstep.trainer.courier import Courier

HANG = 300.0  # seconds


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "PAUSE", 0.01)


def test_a_server_that_is_away_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """What it has not got follows, once and in order; a person hears of it twice, however many
    parcels there were."""
    got: list[int] = []
    refused = threading.Event()
    back = threading.Event()

    def send(oldest: Sequence[int]) -> int:
        if 3 in oldest and not back.is_set():
            refused.set()
            raise ConnectionError("refused\nwith details")
        got.extend(oldest[:2])
        return len(oldest[:2])

    with caplog.at_level(logging.WARNING):
        carrier = Courier("mlflow", send)
        for number in range(1, 4):
            carrier.put(number)
        assert refused.wait(HANG)
        for number in range(4, 40):
            carrier.put(number)
        back.set()
        assert carrier.finish(HANG) == 0
    assert got == list(range(1, 40))
    assert [record.message.splitlines()[0] for record in caplog.records] == [
        "report_to: mlflow: refused",
        "report_to: mlflow: it answers again",
    ]


def test_one_that_does_not_answer_holds_up_no_end() -> None:
    asked, over = threading.Event(), threading.Event()

    def send(oldest: Sequence[int]) -> int:
        asked.set()
        over.wait(HANG)
        return len(oldest)

    carrier = Courier("mlflow", send)
    carrier.put(1)
    assert asked.wait(HANG)
    carrier.put(2)
    assert carrier.finish(0.05) == 2
    over.set()
    assert carrier.finish(HANG) == 0


def test_one_that_refuses_to_the_end(caplog: pytest.LogCaptureFixture) -> None:
    def send(oldest: Sequence[int]) -> int:
        raise ConnectionError("refused")

    carrier = Courier("mlflow", send)
    carrier.put(1)
    assert carrier.finish(0.1) == 1
    assert str(carrier.failure) == "refused"


def test_nothing_was_put() -> None:
    assert Courier("mlflow", len).finish(HANG) == 0

"""Which events a person hears of, and that once."""

from __future__ import annotations

from typing import Any

import pytest

from keepstep.policy.notices import Notice, Notices, failing_since


def event(kind: str, at: str = "05:00", **facts: Any) -> dict[str, Any]:
    return {"time": f"2026-11-27T{at}:00.000+00:00", "attempt": 1, "event": kind, **facts}


def kinds(*events: dict[str, Any]) -> list[str]:
    notices, log = Notices(), []
    told: list[str] = []
    for one in events:
        notice = notices.hear(one, lambda: log)
        told += [] if notice is None else [notice.kind]
        log.append(one)
    return told


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("finished", "finished"),
        ("failed", "failed"),
        ("preempted", "preempted"),
        ("no_progress", "no_progress"),
        ("rewound", None),
        ("of a later version", None),
    ],
)
def test_ends(outcome: str, expected: str | None) -> None:
    assert kinds(event("end", outcome=outcome, exit=1)) == ([] if expected is None else [expected])


def test_an_end_in_words() -> None:
    told = Notices().hear(
        event("end", outcome="failed", exit=70, global_step=7, reason="a\n  b"), lambda: []
    )
    assert told == Notice("failed", "failed at step 7: a b", 7, 70)
    notices = Notices()
    notices.rank_lost = True
    told = notices.hear(event("end", outcome="failed", exit=70, reason="rank 1 died"), lambda: [])
    assert told is not None
    assert (told.kind, told.told) == ("rank_died", "failed: rank 1 died")


def test_saves_that_fail_are_told_once_until_one_succeeds() -> None:
    failed = event("save_failed", step=5, reason="full")
    assert kinds(failed, failed, event("commit", step=9), failed) == ["save_failed"] * 2


def test_the_first_loss_that_is_not_finite() -> None:
    bad = event("nonfinite", step=5, what="loss", action="ignore")
    assert kinds(bad, event("spike", step=6), bad) == ["nonfinite"]


def test_a_mirror_that_has_failed_for_an_hour() -> None:
    def failed(at: str) -> dict[str, Any]:
        return event("mirror", at, error="no route", step=5)

    good = event("mirror", "05:10", step=4)
    assert kinds(failed("05:00"), failed("05:59")) == []
    assert kinds(failed("05:00"), failed("06:00"), failed("07:00")) == ["mirror_failing"]
    assert kinds(failed("05:00"), good, failed("05:20"), failed("06:19")) == []
    assert kinds(failed("05:00"), failed("06:00"), good, failed("05:20"), failed("06:20")) == [
        *["mirror_failing"] * 2
    ]
    assert failing_since([]) is None


def test_all_else_is_silence() -> None:
    others = ("attempt", "resume", "training", "commit", "prune", "rewind", "hang", "publish")
    assert kinds(*(event(kind, step=1) for kind in others)) == []

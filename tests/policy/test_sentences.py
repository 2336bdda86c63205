"""Lines of the log as sentences: each kind that docs/format.md has, with all its facts and none."""

from __future__ import annotations

import re

import pytest

from keepstep.policy.sentences import SENTENCES, sentence
from keepstep.ranks.outcome import EXIT_STATUS
from tests.project.documents import text_of

EVENTS = re.findall(
    r"^\| `(\w+)` \| .* \|$",
    text_of("docs/format.md").split("## events.jsonl")[1].split("## ")[0],
    re.M,
)


def test_every_event_has_a_sentence() -> None:
    assert set(EVENTS) == set(SENTENCES)
    assert len(EVENTS) >= 22  # they are found


@pytest.mark.parametrize("kind", [*SENTENCES, "of_a_later_version"])
def test_one_line_without_its_facts_too(kind: str) -> None:
    facts = {"of": 1, "at": "2026-11-27T05:00:00.000+00:00", "step": 3} if kind == "heard" else {}
    told = sentence({"time": "2026-11-27T05:00:00.000+00:00", "event": kind, "attempt": 2, **facts})
    assert told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"event": "attempt"}, "the attempt begins"),
        (
            {"event": "attempt", "job": "17", "nodes": "n[1-2]", "restarts": 1},
            "the attempt begins, in job 17 on n[1-2], restart 1",
        ),
        (
            {"event": "resume", "request": "auto", "step": 30, "passed_by": {"40": "damaged"}},
            "carries on from checkpoint-30 (resume_from_checkpoint: auto); passed by: checkpoint-4",
        ),
        ({"event": "resume", "request": "auto", "step": None}, "begins at step 0 (resume_from_"),
        (
            {"event": "first_step", "step": 1, "seconds": {"imports": 4.0, "model": 1.5}},
            "the first step, 1, is made after 5.5 s (imports 4.0 s, model 1.5 s)",
        ),
        (
            {
                **{
                    "event": "commit",
                    "step": 30,
                    "bytes": 13_900_000,
                    "write": 0.07,
                    "stall": 0.01,
                },
                **{"metrics": {"eval_loss": 1.7, "eval_runtime": 3.0}, "why": "interval"},
            },
            "saved checkpoint-30: 13.9 MB in 0.07 s; training stopped for 0.01 s; eval_loss 1.7000 "
            "(by save_interval_seconds)",
        ),
        (
            {"event": "nonfinite", "step": 4, "what": "loss", "ranks": [1], "rows": [7, 9]},
            "step 4: loss of rank 1 is not finite, rows 7, 9",
        ),
        (
            {
                "event": "nonfinite",
                "step": 4,
                "what": "gradient norm",
                "ranks": [],
                "action": "stop",
            },
            "step 4: gradient norm is not finite (stop)",
        ),
        (
            {"event": "end", "outcome": "failed", "exit": 70, "global_step": 4, "reason": "a\n  b"},
            "the attempt ends at step 4: failed, exit status 70: a b",
        ),
        ({"event": "new", "attempt": 1, "time": "", "x": 1}, "new: x 1"),
    ],
)
def test_what_it_says(event: dict[str, object], expected: str) -> None:
    assert sentence(event).startswith(expected)


@pytest.mark.parametrize("kind", SENTENCES)
@pytest.mark.parametrize("value", [5, "x", ["x"], {"x": []}, None])
def test_facts_of_another_kind_are_shown_as_they_are(kind: str, value: object) -> None:
    names = ("step", "seconds", "metrics", "passed_by", "rows", "ranks", "bytes", "of", "at")
    assert sentence({"event": kind, **dict.fromkeys(names, value), "stall": value})


@pytest.mark.parametrize("outcome", EXIT_STATUS)
def test_an_end_names_its_outcome(outcome: str) -> None:
    assert outcome in sentence({"event": "end", "outcome": outcome, "exit": EXIT_STATUS[outcome]})

"""Which of two weights is better, and what is nothing to compare with."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from keepstep.publish.best import UNREADABLE, Best

OURS = Best("ours", 100, "eval_loss", 1.0, False, "rows | base", {"model.safetensors": "a" * 64})
THEIRS = replace(OURS, run_id="theirs", weights={"model.safetensors": "b" * 64})
values = st.floats(-1e6, 1e6)


@given(values, values, st.booleans())
def test_the_better_one_stays(ours: float, theirs: float, greater: bool) -> None:
    mine = replace(OURS, value=ours, greater_is_better=greater)
    other = replace(THEIRS, value=theirs, greater_is_better=greater)
    verdict = mine.compare(other)
    assert verdict == ("ours" if (ours > theirs if greater else ours < theirs) else "theirs")
    assert {verdict, other.compare(mine)} != {"ours"}, "they would take turns for ever"


def test_the_same_weights_are_the_same_whatever_is_said_of_them() -> None:
    assert OURS.compare(replace(THEIRS, weights=OURS.weights, metric="other")) == "same"


def test_nothing_is_there() -> None:
    assert OURS.compare(None) == "ours"


def test_what_cannot_be_compared() -> None:
    for changed in ({"metric": "bleu"}, {"greater_is_better": True}, {"measured_on": "other"}):
        assert OURS.compare(replace(THEIRS, **changed)) == "unlike"
    assert OURS.compare(UNREADABLE) == "unlike"


def test_by_age() -> None:
    mine = replace(OURS, metric=None, value=None)
    there = replace(THEIRS, metric=None, value=None, run_id="ours", global_step=99)
    assert mine.compare(there) == "ours"
    assert mine.compare(replace(there, global_step=101)) == "theirs"
    assert mine.compare(replace(there, run_id="theirs")) == "unlike"


def test_as_a_file() -> None:
    assert Best.from_json(OURS.to_json()) == OURS
    later = json.loads(OURS.to_json()) | {"of_a_later_version": 1}
    assert Best.from_json(json.dumps(later)) == OURS
    torn = OURS.to_json()[:-20]
    for text in ("", "[]", "{}", torn, json.dumps(later | {"value": "high"})):
        assert Best.from_json(text) == UNREADABLE

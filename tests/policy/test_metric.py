"""What ranks: one metric, or a sum of several."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from keepstep.policy.evaluations import best_of
from keepstep.policy.metric import greater_is_better, in_full, names_of, terms_of, value_of

MEAN = "0.7*eval_math_loss + 0.3*eval_code_loss"


def test_names_in_full_and_weights_behind_them() -> None:
    assert in_full("loss") == "eval_loss"
    assert in_full(MEAN) == in_full("math_loss*.7+code_loss * 0.30")
    assert in_full(MEAN) == "eval_math_loss*0.7 + eval_code_loss*0.3"
    assert in_full("a + b") == "eval_a + eval_b"


@pytest.mark.parametrize(
    "metric", ["", "a +", "2", "a*b", "a*2*3", "0*a", "-1*a", "nan*a", "inf*a", "a + a", "a+eval_a"]
)
def test_what_is_no_metric(metric: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        terms_of(metric)
    assert in_full(metric) == metric
    assert greater_is_better(metric) is None


def test_the_value_of_an_evaluation() -> None:
    metrics = {"eval_math_loss": 2.0, "eval_code_loss": 1.0}
    assert value_of(metrics, in_full(MEAN)) == 0.7 * 2 + 0.3
    assert value_of(metrics, "eval_math_loss") == 2.0
    assert value_of(metrics, "eval_loss") is None
    assert value_of(metrics, None) is None
    assert value_of({"eval_math_loss": 2.0}, in_full(MEAN)) is None


def test_which_way_is_better() -> None:
    assert greater_is_better(MEAN) is False
    assert greater_is_better("perplexity") is False
    assert greater_is_better("0.5*a_mean_token_accuracy + b_mean_token_accuracy") is True
    assert greater_is_better("eval_loss + eval_mean_token_accuracy") is None
    assert greater_is_better("eval_rouge") is None


def test_the_best_of_a_sum_is_found_in_a_log_of_several_sets() -> None:
    log = [
        {"step": 2, "eval_math_loss": 2.0},
        {"step": 2, "eval_code_loss": 1.0},
        {"step": 4, "eval_math_loss": 1.0},
        {"step": 4, "eval_code_loss": 9.0},
        {"step": 6, "eval_math_loss": 0.0},  # broken off
    ]
    assert best_of(log, in_full(MEAN), greater_is_better=False) == (0.7 * 2 + 0.3, 2)
    assert best_of(log, "eval_math_loss", greater_is_better=False) == (0.0, 6)


def test_what_an_evaluation_gives() -> None:
    assert "eval_loss" in names_of(())
    assert names_of(["math"])["eval_math_perplexity"] == "perplexity"
    assert "eval_loss" not in names_of(["math"])


NAMES = some.text("abc_-.", min_size=1, max_size=6).map(lambda text: f"eval_{text}")


@given(some.dictionaries(NAMES, some.floats(1e-9, 1e9), min_size=1, max_size=5))
def test_what_is_written_down_is_read_as_it_was_meant(weights: dict[str, float]) -> None:
    written = in_full(" + ".join(f"{weight!r}*{name}" for name, weight in weights.items()))
    assert {term.name: term.weight for term in terms_of(written)} == weights
    assert in_full(written) == written
    assert written.startswith("eval_"), "transformers would put it in front"

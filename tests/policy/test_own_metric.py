"""A user's metrics: what a function may ask for and return, and how batches are added up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.own_metric import added, asked_for, checked, means

WHOLE = st.integers(-(2**40), 2**40)
COUNT = st.integers(0, 2**40)
PART = st.dictionaries(st.sampled_from("abc"), st.tuples(WHOLE, COUNT))


@given(st.lists(st.tuples(st.integers(0, 4), PART), max_size=12))
def test_ranks_and_batches_change_nothing(batches: list[tuple[int, dict]]) -> None:
    """Whoever has a batch, and however they are put together."""
    alone = means(added(part for _, part in batches))
    ranks = [added(part for rank, part in batches if rank == number) for number in range(5)]
    assert means(added(ranks)) == alone
    one_by_one: dict = {}
    for _, part in batches:
        one_by_one = added((one_by_one, part))
    assert means(one_by_one) == alone
    for name, value in alone.items():
        pairs = [part[name] for _, part in batches if name in part]
        assert value == sum(s for s, _ in pairs) / sum(c for _, c in pairs)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1))
def test_sums_are_exact_in_any_order(values: list[float]) -> None:
    parts = [{"a": (value, 1)} for value in values]
    assert added(parts) == added(reversed(parts)) == {"a": (math.fsum(values), len(values))}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """It ranks nothing then (test_metric); an infinite sum and its opposite are no number."""
    found = means(added([{"a": (1.0, 2)}, checked({"a": (value, 2)}), {"b": (1, 1)}]))
    assert str(found["a"]) == str(value)
    assert found["b"] == 1
    assert math.isnan(added([{"a": (math.inf, 1)}, {"a": (-math.inf, 1)}])["a"][0])


def test_what_is_never_counted_is_none() -> None:
    assert means(added([{"a": (0.0, 0)}, {"a": (0, 0)}])) == {}


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "it returned NoneType, not {'my_metric': (sum, count)}"),
        (0.5, "it returned float"),
        ({"a": 0.5}, "it returned float for 'a', not (sum, count)"),
        ({"a": (1, 2, 3)}, "it returned tuple for 'a'"),
        ({"a": ("1", 2)}, "it returned str in 'a'"),
        ({"a": (None, 2)}, "it returned NoneType in 'a'"),
        ({"a": ([1], 2)}, "it returned list in 'a'"),
        ({"a": (1, -1)}, "a count of -1"),
        ({"a": (1, math.nan)}, "a count of nan"),
        ({"a": (1, math.inf)}, "a count of inf"),
        ({"a b": (1, 1)}, "named 'a b', which is no word"),
        ({"": (1, 1)}, "which is no word"),
        ({3: (1, 1)}, "named 3"),
        ({"a/b": (1, 1)}, "which is no word"),
        *[({n: (1, 1)}, "every evaluation has already") for n in ("loss", "perplexity", "runtime")],
    ],
)
def test_what_is_returned_is_looked_at(returned: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        checked(returned)


def both(labels: Any, *, logits: Any, power: int = 2) -> None: ...
def others(logits: Any, *rest: Any, **more: Any) -> None: ...
def wrong(labels: Any, attention: Any) -> None: ...
def by_place(labels: Any, /) -> None: ...
def nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "wanted"), [(both, ("labels", "logits")), (others, ("logits",))]
)
def test_parameters_say_what_is_wanted(
    function: Callable[..., Any], wanted: tuple[str, ...]
) -> None:
    assert asked_for(function) == wanted


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (wrong, "it asks for 'attention', and is given what it names of labels, log_probs"),
        (by_place, "it asks for 'labels'"),
        (nothing, "it asks for nothing of labels"),
        (dict, "its parameters are not known"),
    ],
)
def test_what_there_is_not_is_refused(function: Callable[..., Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        asked_for(function)

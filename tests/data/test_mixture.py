"""How many rows of each part a mixture has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.data.mixture import STRATEGIES, rows_of_each, told

parts = st.lists(st.tuples(st.integers(1000, 100_000), st.floats(0.01, 10)), min_size=1, max_size=6)


@given(parts)
def test_first_exhausted_takes_no_row_twice_and_one_part_whole(
    parts: list[tuple[int, float]],
) -> None:
    rows, fractions = zip(*parts, strict=True)
    try:
        taken = rows_of_each(rows, fractions, "first_exhausted")
    except ValueError:
        assert min(fractions) / max(fractions) < 0.5 / 1000 * len(parts), "of a thousand rows none"
        return
    assert all(0 < some <= count for some, count in zip(taken, rows, strict=True))
    assert any(some == count for some, count in zip(taken, rows, strict=True))


@given(parts)
def test_all_exhausted_takes_every_row_and_one_part_once(parts: list[tuple[int, float]]) -> None:
    rows, fractions = zip(*parts, strict=True)
    taken = rows_of_each(rows, fractions, "all_exhausted")
    assert all(some >= count for some, count in zip(taken, rows, strict=True))
    assert any(some == count for some, count in zip(taken, rows, strict=True))


@given(parts, st.sampled_from(STRATEGIES))
def test_shares_are_those_asked_for(parts: list[tuple[int, float]], strategy: str) -> None:
    rows, fractions = zip(*((n, max(f, 0.1)) for n, f in parts), strict=True)
    taken = rows_of_each(rows, fractions, strategy)
    for some, fraction in zip(taken, fractions, strict=True):
        off = abs(some - sum(taken) * fraction / sum(fractions))
        assert off <= len(parts) + 1, "no more than what rounding has changed"


def test_a_fraction_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"fraction: 1e-05 of 20 rows in all leaves no row"):
        rows_of_each([20, 20], [1.0, 0.00001], "first_exhausted")


def test_what_is_told() -> None:
    assert told("a.jsonl", 5000, 3000) == "a.jsonl 3,000 of 5,000"
    assert told("b.jsonl", 4, 10) == "b.jsonl 10 (4, 2.5 times)"

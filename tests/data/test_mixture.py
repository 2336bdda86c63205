"""How many rows of each part a mixture has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.data.mixture import STRATEGIES, rows_of_each, told

parts = st.lists(
    st.tuples(st.integers(1, 100_000), st.floats(0.01, 100) | st.just(0.0)), min_size=1, max_size=6
).filter(lambda parts: any(fraction for _, fraction in parts))


@given(parts)
def test_first_exhausted_takes_no_row_twice_and_one_part_whole(
    parts: list[tuple[int, float]],
) -> None:
    rows, fractions = zip(*parts, strict=True)
    taken = rows_of_each(rows, fractions, "first_exhausted")
    assert all(some <= count for some, count in zip(taken, rows, strict=True))
    assert any(some == count for some, count in zip(taken, rows, strict=True))


@given(parts)
def test_all_exhausted_takes_every_row_and_one_part_once(parts: list[tuple[int, float]]) -> None:
    rows, fractions = zip(*parts, strict=True)
    taken = rows_of_each(rows, fractions, "all_exhausted")
    used = [(some, count) for some, count, f in zip(taken, rows, fractions, strict=True) if f]
    assert all(some >= count for some, count in used)
    assert any(some == count for some, count in used)


@given(parts, st.sampled_from(STRATEGIES))
def test_shares_are_those_asked_for(parts: list[tuple[int, float]], strategy: str) -> None:
    rows, fractions = zip(*parts, strict=True)
    taken = rows_of_each(rows, fractions, strategy)
    for some, fraction in zip(taken, fractions, strict=True):
        off = abs(some - sum(taken) * fraction / sum(fractions))
        assert off <= len(parts) + 1, "no more than what rounding has changed"
        assert fraction or not some


@pytest.mark.parametrize("fractions", [[0.0, 0.0], [-1.0, 2.0]])
def test_fractions_that_cannot_be_had(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="below 0"):
        rows_of_each([1, 1], fractions, "first_exhausted")


def test_what_is_told() -> None:
    assert told("a.jsonl", 5000, 3000) == "a.jsonl 3,000 of 5,000"
    assert told("b.jsonl", 4, 10) == "b.jsonl 10 (4, 2.5 times)"

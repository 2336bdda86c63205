"""How many rows of each part a mixture has. Pure."""

from __future__ import annotations

from collections.abc import Sequence

STRATEGIES = ("first_exhausted", "all_exhausted")  # as datasets' interleave_datasets calls them


def shares(fractions: Sequence[float]) -> list[float]:
    """The same, of 1."""
    return [fraction / sum(fractions) for fraction in fractions]


def rows_of_each(rows: Sequence[int], fractions: Sequence[float], strategy: str) -> list[int]:
    """The number of rows that a mixture takes of each part, so that their shares are `fractions`.

    Args:
        rows: that each part has.
        fractions: of the whole, in any unit.
        strategy: `first_exhausted`: no row twice, so the part with too few rows decides how many
            there are in all. `all_exhausted`: every row at least once, so the part with too many
            decides, and rows of others are repeated.

    Raises:
        ValueError: a fraction is so small that no row is left of its part.
    """
    parts = shares(fractions)
    wholes = [count / share for count, share in zip(rows, parts, strict=True)]
    if strategy == "first_exhausted":
        whole, bound = min(wholes), min
    else:
        whole, bound = max(wholes), max
    taken = [bound(count, round(share * whole)) for count, share in zip(rows, parts, strict=True)]
    if 0 in taken:
        fraction, whole = fractions[taken.index(0)], round(whole)
        raise ValueError(f"fraction: {fraction} of {whole:,} rows in all leaves no row of its part")
    return taken


def told(name: str, rows: int, taken: int) -> str:
    """A part of a mixture, in a few words."""
    if taken <= rows:
        return f"{name} {taken:,} of {rows:,}"
    return f"{name} {taken:,} ({rows:,}, {taken / rows:.3g} times)"

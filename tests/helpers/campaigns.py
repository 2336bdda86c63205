"""Which cases run on every change, and which in the long campaigns alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(every: Iterable[Any], long: Collection[Any]) -> list[Any]:
    """For pytest.mark.parametrize: those in `long` show again what the others show."""
    every = list(every)
    assert set(long) <= set(every), "a case that is not one"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.long])
        if case in long
        else case
        for case in every
    ]

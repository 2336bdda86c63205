"""Which settings have changed since a checkpoint was made. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


def drift(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    allowed: Collection[str] = (),
    planned_steps: int = 0,
) -> list[str]:
    """Settings that changed since a checkpoint was made: `field: before → now`, in their order.

    A setting that only one side knows is none: another version of keepstep may record more. Nothing
    given is nothing given (null, an empty mapping), and a warmup by ratio is one of as many steps.

    Args:
        planned_steps: of the checkpoint's run, 0 where that is not known.
    """

    def meant(name: str, value: Any) -> Any:
        if name == "warmup_steps" and isinstance(value, float) and 0 < value < 1:
            return math.ceil(planned_steps * value) if planned_steps else value
        return None if value in ({}, [], "") else value

    return [
        f"{name}: {before[name]} → {value}"
        for name, value in now.items()
        if name in before
        and meant(name, before[name]) != meant(name, value)
        and name not in allowed
    ]

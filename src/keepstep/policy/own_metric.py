"""Metrics of a user's function: sums and counts of each batch, added up. Pure: no disk, no torch.

The value of a metric is its sum over its count, over all batches of all ranks: how rows are put
into batches, and those onto ranks, changes nothing.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from keepstep.policy.metric import HIGHER, LOWER, OTHERS

Sums = Mapping[str, tuple[float, float]]  # name → sum, count

# What a function may ask for, by the names of its parameters.
CHEAP = ("labels", "log_probs", "entropy", "is_top1", "input_ids", "processing_class")
DEAR = ("logits", "predictions")  # each batch goes through the model once more
NAME = re.compile(r"[A-Za-z_][\w-]*")
TAKEN = (*LOWER, *HIGHER, *OTHERS, "model_preparation_time")
FORM = "{'my_metric': (sum, count)}"


def asked_for(function: Callable[..., Any]) -> tuple[str, ...]:
    """What a function wants to be given, as its parameters say.

    Raises:
        ValueError: one of them is nothing that there is; or they do not tell.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"its parameters are not known: {error}") from error
    known, found = (*CHEAP, *DEAR), []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in known and parameter.kind is not parameter.POSITIONAL_ONLY:
            found.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"it asks for {parameter.name!r}, and is given what it names of {', '.join(known)}"
            )
    if not found:
        raise ValueError(f"it asks for nothing of {', '.join(known)}")
    return tuple(found)


def checked(returned: Any) -> dict[str, tuple[float, float]]:
    """What the function has returned for a batch, as numbers.

    A sum may be NaN or infinite: the metric is, then, and ranks nothing.

    Raises:
        ValueError: it is no mapping of names to a sum and a count.
    """
    if not isinstance(returned, Mapping):
        raise ValueError(f"it returned {_kind(returned)}, not {FORM}")
    found = {}
    for name, pair in returned.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"it returned a metric named {name!r}, which is no word")
        if name in TAKEN:
            raise ValueError(f"it returned {name!r}, which every evaluation has already")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"it returned {_kind(pair)} for {name!r}, not (sum, count)")
        total, count = (_number(value, name) for value in pair)
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(f"it returned a count of {count:g} for {name!r}")
        found[name] = total, count
    return found


def _number(value: Any, name: str) -> float:
    """A number, or an array or a tensor of one."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"it returned {_kind(value)} in {name!r}, where a number is due"
        ) from error


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    of_shape = f" of shape {tuple(shape)}" if shape is not None else ""
    return f"{type(value).__name__}{of_shape}"


def added(parts: Iterable[Sums]) -> dict[str, tuple[float, float]]:
    """Sums and counts of several parts together, in the order in which names come first."""
    every: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        for name, pair in part.items():
            every.setdefault(name, []).append(pair)
    return {
        name: (_sum(s for s, _ in pairs), _sum(c for _, c in pairs))
        for name, pairs in every.items()
    }


def _sum(numbers: Iterable[float]) -> float:
    """In full precision, so that neither order nor grouping matters, but for the last digit."""
    values = list(numbers)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # inf - inf
        return sum(values)


def means(sums: Sums) -> dict[str, float]:
    """The metrics: of what was never counted, there is none."""
    return {name: total / count for name, (total, count) in sums.items() if count > 0}

"""What ranks checkpoints: one metric, or several with weights. Pure: no disk, no torch.

`metric_for_best_model` names one (`eval_loss`, `loss`), or is a sum of several:
`0.7*eval_math_loss + 0.3*eval_code_loss`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

PREFIX = "eval_"
NAME = re.compile(r"[A-Za-z_][\w./-]*")
SET_NAME = re.compile(r"[A-Za-z_][\w.-]*")

# What an evaluation of keepstep's SFT trainer gives of each set, and which way is better.
LOWER = ("loss", "perplexity", "aux_loss")
HIGHER = ("mean_token_accuracy",)
SAMPLED = "sample_exact_match"  # of a recipe's prompts: once, whatever sets there are
OTHERS = (
    *("entropy", "num_tokens"),
    *("runtime", "samples_per_second", "steps_per_second"),
)


@dataclass(frozen=True)
class Term:
    """One metric of a sum.

    Attributes:
        name: in full, as in `eval_math_loss`.
        weight: above 0.
    """

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1.0 else f"{self.name}*{self.weight!r}"


def terms_of(metric: str) -> tuple[Term, ...]:
    """What a `metric_for_best_model` is made of.

    Raises:
        ValueError: it is neither a name nor a sum of names with weights.
    """
    terms = tuple(_term(part.strip(), metric) for part in metric.split("+"))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{metric!r} has {twice} twice")
    return terms


def _term(text: str, metric: str) -> Term:
    factors = [factor.strip() for factor in text.split("*")]
    names = [factor for factor in factors if NAME.fullmatch(factor)]
    numbers = [factor for factor in factors if not NAME.fullmatch(factor)]
    if len(names) != 1 or len(numbers) > 1:
        raise ValueError(f"{metric!r}: {text!r} is neither a metric nor a weight * a metric")
    try:
        weight = float(numbers[0]) if numbers else 1.0
    except ValueError as error:
        raise ValueError(f"{metric!r}: {numbers[0]!r} is no number") from error
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"{metric!r}: the weight {numbers[0]} is not above 0")
    name = names[0]
    return Term(name if name.startswith(PREFIX) else PREFIX + name, weight)


def in_full(metric: str) -> str:
    """As it is written down: names in full, weights behind them (transformers takes for a metric
    what begins with `eval_`). What is no metric stays as it is: preflight tells of it."""
    try:
        return " + ".join(map(str, terms_of(metric)))
    except ValueError:
        return metric


def value_of(metrics: Mapping[str, float], metric: str | None) -> float | None:
    """The value of a metric, or of a sum of several, in an evaluation; None: it lacks some."""
    if metric is None or metric in metrics:
        return metrics.get(metric or "")
    try:
        terms = terms_of(metric)
    except ValueError:
        return None
    if not all(term.name in metrics for term in terms):
        return None
    return math.fsum(term.weight * metrics[term.name] for term in terms)


def names_of(
    sets: Collection[str], within: Collection[str] = (*LOWER, *HIGHER, *OTHERS)
) -> dict[str, str]:
    """What an evaluation gives: its full name → its name within a set.

    Args:
        sets: the names of the evaluation sets; empty: there is one, without a name.
        within: the names within a set.
    """
    prefixes = [f"{PREFIX}{name}_" for name in sets] or [PREFIX]
    return {p + name: name for p in prefixes for name in within}


def greater_is_better(metric: str) -> bool | None:
    """Which way is better, as far as the names of a metric, or of a sum, tell; None: they do not,
    or contradict each other."""
    try:
        names = [term.name for term in terms_of(metric)]
    except ValueError:
        return None
    found = {_direction(name) for name in names}
    return found.pop() if len(found) == 1 else None


def _direction(name: str) -> bool | None:
    if any(name.endswith(f"_{known}") for known in LOWER):
        return False
    return True if any(name.endswith(f"_{known}") for known in (*HIGHER, SAMPLED)) else None

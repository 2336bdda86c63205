"""Which committed checkpoints stay, and why. A pure function of (records, policy)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Ranking = Literal["metric", "recency"]


@dataclass(frozen=True)
class Policy:
    """What the user asked to keep.

    Attributes:
        limit: how many checkpoints, the newest included (`save_total_limit`); None: all.
        ranking: what fills the places beside the newest: the best by metric, or the most recent.
        metric: full name of the metric that ranks (`eval_loss`); None: nothing is ranked.
        greater_is_better: the metric's direction.
    """

    limit: int | None = None
    ranking: Ranking = "recency"
    metric: str | None = None
    greater_is_better: bool = False


@dataclass(frozen=True)
class Record:
    """What retention needs to know of one committed checkpoint; `value` is the ranking metric's."""

    step: int
    value: float | None = None


@dataclass(frozen=True)
class Decision:
    """Keep or prune one checkpoint, with the reason that `keepstep ls` shows."""

    step: int
    keep: bool
    reason: str


def rank_by_metric(records: Iterable[Record], greater_is_better: bool) -> list[Record]:
    """Best first. Records without a finite value are left out; of equals the earlier step wins."""
    ranked = [r for r in records if r.value is not None and math.isfinite(r.value)]
    sign = -1.0 if greater_is_better else 1.0
    return sorted(ranked, key=lambda r: (sign * (r.value or 0.0), r.step))


def best_step(records: Iterable[Record], policy: Policy) -> int | None:
    """The step with the best metric, None when no record has one."""
    ranked = rank_by_metric(records, policy.greater_is_better)
    return ranked[0].step if ranked else None


def plan_retention(records: Sequence[Record], policy: Policy) -> list[Decision]:
    """Decide for every record, oldest step first.

    The newest always stays. With a limit of N, N stay in all: the newest and the best by metric
    (or the most recent). When the newest is among the N best, exactly the N best stay. Places that
    no ranked checkpoint claims go to the most recent ones.
    """
    newest_first = sorted(records, key=lambda r: r.step, reverse=True)
    if not newest_first:
        return []
    reasons: dict[int, str] = {newest_first[0].step: "newest"}
    ranked = rank_by_metric(records, policy.greater_is_better) if policy.metric else []
    if policy.ranking == "metric":
        for place, record in enumerate(ranked[: policy.limit], start=1):
            reason = "best" if place == 1 else f"best {place} of {len(ranked)}"
            if record.step in reasons:
                reasons[record.step] += f", {reason}"
            elif policy.limit is None or len(reasons) < policy.limit:
                reasons[record.step] = reason
    for record in newest_first:
        if policy.limit is None or len(reasons) < policy.limit:
            reasons.setdefault(record.step, "recent" if policy.limit else "no limit is set")
    return [
        Decision(r.step, r.step in reasons, reasons.get(r.step, "beyond save_total_limit"))
        for r in reversed(newest_first)
    ]

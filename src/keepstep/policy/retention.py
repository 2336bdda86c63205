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
        metric: full name of what ranks (`eval_loss`), or a sum of several (see `metric.py`); None:
            nothing is ranked.
        greater_is_better: the metric's direction.
        every_n_steps: checkpoints at multiples of it stay as well; None: no such rule.
        total_bytes: what all checkpoints together may take; None: no bound.
    """

    limit: int | None = None
    ranking: Ranking = "recency"
    metric: str | None = None
    greater_is_better: bool = False
    every_n_steps: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True)
class Record:
    """What retention needs to know of one committed checkpoint.

    Attributes:
        step: its `global_step`.
        value: the ranking metric, None without an evaluation at this step.
        bytes: its size.
        pinned: somebody asked to keep it.
        abandoned: on a branch that a later attempt went back from; it is not ranked.
        grown_from: the newest attempt resumed it and has not committed yet: until then it is what
            that attempt's branch goes on from.
        is_finite: False of a state that is known not to be: it is not ranked, and never all that
            is kept.
    """

    step: int
    value: float | None = None
    bytes: int = 0
    pinned: bool = False
    abandoned: bool = False
    grown_from: bool = False
    is_finite: bool = True


@dataclass(frozen=True)
class Decision:
    """Keep or prune one checkpoint.

    Attributes:
        step: its `global_step`.
        keep: whether it stays.
        reason: why, in the words that `keepstep ls` shows.
    """

    step: int
    keep: bool
    reason: str


def rank_by_metric(records: Iterable[Record], greater_is_better: bool) -> list[Record]:
    """Best first. Records without a finite value, or whose state is not finite, are left out; of
    equals the earlier step wins."""
    sign = -1.0 if greater_is_better else 1.0
    known = [r for r in records if r.value is not None and math.isfinite(r.value)]
    ranked = [r for r in known if r.is_finite]
    return sorted(ranked, key=lambda r: (sign * (r.value or 0.0), r.step))


def best_step(records: Iterable[Record], policy: Policy) -> int | None:
    """The step with the best metric on the living branch, None when no record has one."""
    alive = [r for r in records if not r.abandoned]
    ranked = rank_by_metric(alive, policy.greater_is_better) if policy.metric else []
    return ranked[0].step if ranked else None


def plan_retention(
    records: Sequence[Record], policy: Policy, keep_abandoned: bool = True
) -> list[Decision]:
    """Decide for every record, oldest step first.

    The newest always stays, and if its state is not finite, also the newest one whose is. With a
    limit of N, N stay: the newest and the best by metric (or the
    most recent); when the newest is among the N best, exactly the N best. Places that no ranked
    checkpoint claims go to the most recent. Pins and multiples of `every_n_steps` stay beside
    them, and so does what an attempt resumed, until it has committed. Abandoned checkpoints stay,
    uncounted, unless `keep_abandoned` is False. What exceeds `total_bytes` then goes, the least
    wanted first; never the newest, a pin or what was resumed.

    Args:
        records: the committed checkpoints, in any order.
        policy: what to keep.
        keep_abandoned: whether abandoned branches stay.

    Returns:
        A decision for each record, the oldest step first.

    Ranks: any; the same answer on each.
    """
    reasons = _claims(records, policy, keep_abandoned)
    over_budget = _beyond_budget(records, reasons, policy.total_bytes)
    decisions = []
    for record in sorted(records, key=lambda r: r.step):
        keep = record.step in reasons and record.step not in over_budget
        if keep:
            reason = ", ".join(reasons[record.step])
        elif record.step in over_budget:
            reason = "beyond keep_total_bytes"
        else:
            reason = "abandoned branch" if record.abandoned else "beyond save_total_limit"
        decisions.append(Decision(record.step, keep, reason))
    return decisions


def room_for(step: int, records: Sequence[Record], policy: Policy) -> list[Decision]:
    """What may go before the checkpoint of `step` is there, because its commit would prune it.

    Abandoned branches as well; never the newest, which nothing has replaced yet, nor what this
    attempt resumed, which it goes back to as long as it has no checkpoint of its own. The coming
    metric is of no account: the newest has a place, and the best share the others, in any case.
    """
    alive = [record.step for record in records if not record.abandoned]
    newest = max(alive or [record.step for record in records], default=None)
    finite = max((r.step for r in records if r.is_finite and not r.abandoned), default=None)
    plan = plan_retention([*records, Record(step)], policy, keep_abandoned=False)
    return [d for d in plan if not d.keep and d.step not in (newest, finite, step)]


def _claims(
    records: Sequence[Record], policy: Policy, keep_abandoned: bool
) -> dict[int, list[str]]:
    """Why each checkpoint may stay, the most wanted checkpoint first."""
    alive = sorted((r for r in records if not r.abandoned), key=lambda r: r.step, reverse=True)
    ranked = rank_by_metric(alive, policy.greater_is_better) if policy.metric else []
    claims: dict[int, list[str]] = {r.step: ["newest"] for r in alive[:1]}
    for record in [r for r in alive if r.is_finite][:1]:
        if record.step not in claims:
            claims[record.step] = ["newest", "of those that are finite"]

    def places_left() -> bool:
        return policy.limit is None or len(claims) < policy.limit

    if policy.ranking == "metric":
        for place, record in enumerate(ranked[: policy.limit], start=1):
            reason = "best" if place == 1 else f"best {place} of {len(ranked)}"
            if record.step in claims or places_left():
                claims.setdefault(record.step, []).append(reason)
    for record in alive:
        if record.step not in claims and places_left():
            claims[record.step] = ["recent" if policy.limit else "no limit is set"]
    every = "every step" if policy.every_n_steps == 1 else f"every {policy.every_n_steps} steps"
    for record in alive:
        if policy.every_n_steps and record.step % policy.every_n_steps == 0:
            claims.setdefault(record.step, []).append(every)
    for record in sorted(records, key=lambda r: r.step, reverse=True):
        if record.pinned:
            claims.setdefault(record.step, []).append("pinned")
        elif record.grown_from and claims.get(record.step) != ["newest"]:
            claims.setdefault(record.step, []).append("resumed")
        elif record.abandoned and keep_abandoned:
            claims.setdefault(record.step, []).append("abandoned branch, not counted")
    return claims


def _beyond_budget(
    records: Sequence[Record], claims: dict[int, list[str]], budget: int | None
) -> set[int]:
    """Kept checkpoints that must go to fit the budget: the last claims first."""
    by_step = {record.step: record for record in records}
    total = sum(by_step[step].bytes for step in claims)
    gone: set[int] = set()
    for step in reversed(claims):
        if budget is None or total <= budget:
            break
        record = by_step[step]
        if "newest" not in claims[step] and not record.pinned and not record.grown_from:
            total -= by_step[step].bytes
            gone.add(step)
    return gone

"""What a person may not remove by accident, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from keepstep.policy.retention import Policy, Record, best_step, plan_retention


def needed(
    records: Sequence[Record],
    policy: Policy,
    published: Mapping[int, str] | None = None,
    grown: Mapping[int, str] | None = None,
) -> dict[int, list[str]]:
    """Why checkpoints are needed: step → reasons; one that is not in it may go.

    Args:
        records: the committed checkpoints, in any order.
        policy: what ranks them.
        published: step → the repository that its weights were published to, of those whose state is
            nowhere but here.
        grown: step → the other run that began there.

    Returns:
        The best by metric, the newest (and the newest whose state is finite) on the living branch,
        what the newest attempt resumed, pins, and what the arguments name.
    """
    alive = sorted((r for r in records if not r.abandoned), key=lambda r: r.step)
    alive = alive or sorted(records, key=lambda r: r.step)
    best = best_step(records, policy)
    finite = max((r.step for r in alive if r.is_finite), default=None)
    reasons: dict[int, list[str]] = {}
    for record in records:
        step, found = record.step, []
        if step == best:
            found.append(f"it is the best by {policy.metric}")
        if step == alive[-1].step:
            found.append("it is the newest, which a launch goes on from")
        elif step == finite:
            found.append("it is the newest whose state is finite")
        if record.grown_from:
            found.append("the newest attempt has resumed it, and saved nothing yet")
        if record.pinned:
            found.append("it is pinned")
        if published and step in published:
            found.append(f"it is what {published[step]} was published from, and its only copy")
        if grown and step in grown:
            found.append(f"the run {grown[step]} began there")
        if found:
            reasons[step] = found
    return reasons


def plan_by_hand(
    records: Sequence[Record], policy: Policy, limit: int, held: Mapping[int, Sequence[str]]
) -> tuple[dict[int, str], dict[int, str]]:
    """What goes under another `save_total_limit`, and what is beyond it and stays, since it is
    needed: step → why, each."""
    plan = plan_retention(records, replace(policy, limit=limit), keep_abandoned=False)
    beyond = {d.step: d.reason for d in plan if not d.keep}
    stays = {step: " and ".join(held[step]) for step in beyond if step in held}
    return {step: why for step, why in beyond.items() if step not in held}, stays

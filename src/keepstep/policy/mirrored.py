"""What a listing of a mirror tells of runs, and what of it is kept, as in a run folder. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict

from keepstep.policy.manifest import MANIFEST_NAME, Manifest
from keepstep.policy.mirror import FOLDER, HISTORY, Copied, Part, copied, what_is_missing
from keepstep.policy.retention import Policy, Record, best_step, plan_retention
from keepstep.policy.strict import TextError, build, checked, with_check

WHOLE = re.compile(rf"(?:(.+)/)?({FOLDER.pattern}/{re.escape(MANIFEST_NAME)})")
RETENTION = "retention.json"  # in the history: what stays on the mirror


def runs_in(names: Iterable[str]) -> dict[str, list[Copied]]:
    """The runs that have checkpoints below a prefix, by the names of all objects there: a run's
    folder (empty: the prefix itself) → its checkpoints."""
    by_run: dict[str, list[str]] = {}
    for name in names:
        match = WHOLE.fullmatch(name)
        if match is not None:
            by_run.setdefault(match[1] or "", []).append(match[2])
    return {run: copied(own) for run, own in sorted(by_run.items())}


def listed_sizes(
    manifest: Manifest, parts: Sequence[Part], folder: str, listed: Mapping[str, int]
) -> dict[str, int | None]:
    """The files of a checkpoint, as far as all their objects are there: name → bytes.

    Args:
        parts: its objects, as its receipts tell.
        folder: of the checkpoint.
        listed: what is there: name → bytes.
    """
    lacking = {part.file for part in parts if f"{folder}/{part.name}" not in listed}
    lacking |= set(what_is_missing(manifest, parts))
    sizes: dict[str, int | None] = {}
    for part in parts:
        if part.file not in lacking:
            sizes[part.file] = (sizes.get(part.file) or 0) + listed[f"{folder}/{part.name}"]
    return sizes


def history_in(names: Iterable[str]) -> dict[str, str]:
    """The files of the run's history: name → the object that holds the newest one of it."""
    found: dict[str, str] = {}
    for name in sorted(name for name in names if name.startswith(f"{HISTORY}/")):
        found[name.rpartition("/")[2]] = name
    return found


def retention_text(policy: Policy, pinned: Iterable[int]) -> bytes:
    """What stays on a mirror, as it is written down there."""
    told = {"policy": asdict(policy), "pinned": sorted(pinned)}
    return with_check(json.dumps(told)).encode() + b"\n"


def read_retention(text: str) -> tuple[Policy, set[int]]:
    """The policy, and the pinned steps.

    Raises:
        TextError: it is not what was written, or another version wrote it.
    """
    told = checked(text.strip())[0]
    policy: Policy = build(Policy, told.get("policy"), "policy")
    pinned: list[int] = [build(int, step, "pinned") for step in told.get("pinned", ())]
    if (policy.limit or 1) < 1 or (policy.every_n_steps or 1) < 1:
        raise TextError("it keeps nothing")
    return policy, set(pinned)


def what_to_send(
    records: Sequence[Record], policy: Policy, here: Collection[int], there: Collection[int]
) -> tuple[list[int], list[int]]:
    """Which checkpoints a mirror lacks of those that it would keep, and which it keeps no more.

    Args:
        records: of all that is on either.
        policy: what is kept there.
        here: steps of what could be sent.
        there: steps of what is there.

    Returns:
        Steps to be sent: the newest, the best, then the others from the newest on. And the steps
        that go there in the end.
    """
    kept = {d.step for d in plan_retention(records, policy, keep_abandoned=False) if d.keep}
    best = best_step(records, policy)
    newest = max((r.step for r in records if not r.abandoned), default=None)
    send = sorted((s for s in here if s in kept), key=lambda s: (s != newest, s != best, -s))
    gone = [d.step for d in plan_retention(records, policy) if not d.keep and d.step in there]
    return send, gone

"""What a host of containers asks of a run: is it to be ended by force, and how long does a stop
take. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from keepstep.policy.auto_interval import length_of
from keepstep.policy.schedule import high

ENDING_SECONDS = 30.0  # to leave: what `stop_margin_seconds` is, unless it is set
COPY_SECONDS = 60.0  # that a stop waits for a copy to the mirror, where no deadline is known
HANG_SECONDS, SAVE_SECONDS = 1800.0, 1200.0  # where nothing tells how it was launched


@dataclass(frozen=True)
class Health:
    """Whether an attempt is to go on, and why."""

    healthy: bool
    why: str


def health(alive: bool | None, silence: float | None, limits: Mapping[str, Any]) -> Health:
    """Whether the attempt at work here stands still for longer than anything may take.

    Only one that is known to be at work on this machine can be unhealthy: one that begins, has
    ended or was killed is for its launcher, and another machine's is for the probe there. A save,
    a batch of an evaluation, a step may each take as long as the run itself allows them.

    Args:
        alive: whether the owner's process is there; None: it is not one of this machine.
        silence: seconds since it has got on; None: it has given no sign of life yet.
        limits: `hang_timeout_seconds` and `save_timeout_seconds`, as far as they are known.
    """
    if not alive:
        return Health(True, "no attempt is at work here")
    if silence is None:
        return Health(True, "the attempt begins")
    bounds = {"hang_timeout_seconds": HANG_SECONDS, "save_timeout_seconds": SAVE_SECONDS, **limits}
    most = bounds["hang_timeout_seconds"] + bounds["save_timeout_seconds"]
    told = f"the last sign of life was {silence:.0f} s ago"
    if silence <= most:
        return Health(True, told)
    return Health(
        False, f"{told}: longer than hang_timeout_seconds + save_timeout_seconds, {most:g} s"
    )


def grace_seconds(saves: Iterable[Mapping[str, Any]], has_mirror: bool = False) -> int | None:
    """Seconds from a stop request to the end: the longest step, a save that is under way, the last
    save (each as long as 95 % of all saves were), a copy to the mirror if there is one, leaving.

    Args:
        saves: what the log tells of each; see `Saved.facts`.
        has_mirror: whether the run is copied to a mirror.

    Returns: None: no save has told both how long it took and how long steps are.
    """
    known = [save for save in saves if "longest_step" in save]
    if not known:
        return None
    step = max(float(save["longest_step"]) for save in known)
    save = high([length_of(save) for save in known])
    return math.ceil(step + 2 * save + has_mirror * COPY_SECONDS + ENDING_SECONDS)

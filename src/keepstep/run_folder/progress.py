"""How far an attempt has got, as its heartbeat tells; and what the run has cost."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from keepstep.policy.goodput import MOST, Goodput, goodput
from keepstep.policy.lineage import Spent
from keepstep.policy.manifest import BOUNDS
from keepstep.policy.strict import TextError, build, checked, with_check
from keepstep.run_folder.ownership import process_lives
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_text

SILENT_SECONDS = 300.0  # after which an attempt on another machine is not taken for alive


@dataclass(frozen=True)
class Reached:
    """How far an attempt had got at a moment.

    Attributes:
        time: of that moment (UTC, ISO 8601).
        attempt: its number.
        step: the optimizer steps completed.
        spent: seconds of each kind, as `Spent` has them.
        figures: what else it shows of itself: see `metrics.FIGURES`.
    """

    time: str
    attempt: int
    step: int
    spent: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)

    def as_line(self) -> str:
        return with_check(json.dumps(asdict(self)))


def reached_of(run: RunFolder) -> Reached | None:
    """What the newest heartbeat tells; None: nothing that can be believed."""
    try:
        lines = read_text(run.heartbeat).splitlines()
        if len(lines) < 2:  # an older version's
            return None
        values, _ = checked(lines[1])
        known = {f.name: values[f.name] for f in fields(Reached) if f.name in values}
        found: Reached = build(Reached, known)
        datetime.fromisoformat(found.time)
    except (*ABSENT, OSError, OddFileError, TextError, ValueError):
        return None
    bounded = all(0 <= seconds <= MOST for seconds in found.spent.values())
    counted = 0 < found.attempt <= BOUNDS["attempt"][1]
    return found if bounded and counted and 0 <= found.step <= BOUNDS["global_step"][1] else None


def unheard(run: RunFolder, attempt: int) -> dict[str, Any] | None:
    """The last sign of life of an attempt before this one which did not tell of its end, as a line
    of the log holds it; None: there is none, or it is there already."""
    last = reached_of(run)
    if last is None or last.attempt >= attempt:
        return None
    for before in run.attempts():
        if before.number == last.attempt and (before.outcome is not None or before.is_heard):
            return None
    return {"of": last.attempt, "at": last.time, "step": last.step, "spent": last.spent}


def goodput_of(run: RunFolder) -> Goodput:
    """What the run's wall time went into, up to its last word or sign of life."""
    attempts, last = run.attempts(), reached_of(run)
    newest = attempts[-1] if attempts else None
    heard = None
    if newest is not None and newest.outcome is None and last is not None:
        heard = Spent(last.step, last.spent) if last.attempt == newest.number else None
    latest = run.latest()
    return goodput(
        attempts,
        newest=latest.step if latest else None,
        alive=newest is not None and newest.outcome is None and _may_live(run),
        heard=heard,
        heard_at=last.time if last and heard else None,
    )


def _may_live(run: RunFolder) -> bool:
    """Whether the owner is at work, as far as can be seen: on another machine, it is as long as it
    gives signs of life."""
    try:
        lives = process_lives(run.owner_words())
    except OSError:
        lives = None
    if lives is not None:
        return lives
    last = reached_of(run)
    return last is not None and time.time() - _seconds(last.time) < SILENT_SECONDS


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()

"""When to save, and when to stop for lack of time. Pure: the clock is passed in.

Beside `save_steps`, which is the Trainer's: by seconds, on request, and early enough before a
deadline that the last save is committed when it comes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Literal

Reason = Literal["deadline", "stop", "save-now", "interval"]
STOPS: tuple[Reason, ...] = ("deadline", "stop")

FIRST_SAVE_SECONDS = 60.0  # what a save is taken to last before one has been measured
LOOK_BACK = 20  # saves and steps that an estimate is made of
ENOUGH_STEPS = 10
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


@dataclass(frozen=True)
class Schedule:
    """What was asked for.

    Attributes:
        interval: the most seconds between two saves; None: `save_steps` alone decides.
        deadline: the moment (seconds, on the caller's clock) at which the run must have ended.
        margin: seconds that are to be left then.
    """

    interval: float | None = None
    deadline: float | None = None
    margin: float = 30.0


@dataclass(frozen=True)
class Moment:
    """How things are when a step has ended.

    Attributes:
        now: on the deadline's clock.
        last_save: when the newest save began (or the attempt, before the first).
        save_seconds: of earlier saves, from their beginning to their commit.
        step_seconds: of the latest steps, with the evaluations between them.
        in_flight: whether an earlier save is still being written.
        requests: what somebody has asked for: `stop`, `save-now`.
    """

    now: float
    last_save: float
    save_seconds: Sequence[float] = ()
    step_seconds: Sequence[float] = ()
    in_flight: bool = False
    requests: Collection[str] = ()


def next_save(schedule: Schedule, moment: Moment) -> Reason | None:
    """Why to save now (and, for `STOPS`, to stop); None: there is no reason to."""
    if schedule.deadline is not None and moment.now + needed(schedule, moment) >= schedule.deadline:
        return "deadline"
    if "stop" in moment.requests:
        return "stop"
    if "save-now" in moment.requests:
        return "save-now"
    if schedule.interval is not None and moment.now - moment.last_save >= schedule.interval:
        return "interval"
    return None


def needed(schedule: Schedule, moment: Moment) -> float:
    """Seconds to be safe: one more step, what is in flight, the last save, the margin."""
    save = high(moment.save_seconds[-LOOK_BACK:]) or FIRST_SAVE_SECONDS
    saves = 2 if moment.in_flight else 1
    return high(moment.step_seconds[-LOOK_BACK:]) + saves * save + schedule.margin


def lost_minutes(
    save_steps: float, interval: float | None, step_seconds: Sequence[float]
) -> float | None:
    """What a failure loses at most at the pace of these steps; None: too few to tell.

    Args:
        save_steps: between two saves; infinite where steps do not decide.
        interval: seconds between two saves, None where the clock does not decide.
    """
    if len(step_seconds) < ENOUGH_STEPS:
        return None
    apart = save_steps * median(step_seconds[-LOOK_BACK:])
    return min(apart, float("inf") if interval is None else interval) / 60


def high(seconds: Sequence[float], share: float = 0.95) -> float:
    """The smallest of these that `share` of them do not exceed; 0 of none."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def best_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """The seconds between saves at which least time is lost: to saves, and to repeated steps.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22
    (2006), equation 37; for cheap saves it is Young's sqrt(2 * cost * mtbf).

    Args:
        save_seconds: that training stands still for a save.
        mtbf_seconds: mean time between failures of the whole job.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    young = math.sqrt(2 * save_seconds * mtbf_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def parse_duration(text: str) -> float:
    """Seconds of `90`, `45m`, `3h30m`, `1d`.

    Raises:
        ValueError: it is none of these.
    """
    parts = re.fullmatch(r"(?:\d+(?:\.\d+)?[dhms])+|(\d+(?:\.\d+)?)", text.strip())
    if parts is None:
        raise ValueError(f"{text!r} is no length of time, as 45m, 3h30m or 90 (seconds) are")
    if parts.group(1):
        return float(parts.group(1))
    found = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    return sum(float(number) * UNITS[unit] for number, unit in found)


def parse_moment(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 date and time (local, unless it names a zone).

    Raises:
        ValueError: it is none.
    """
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        raise ValueError(f"{text!r} is no moment, as 2026-11-25T08:00 is") from None

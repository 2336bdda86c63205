"""When to save, and when to stop for lack of time. Pure: the clocks are passed in.

Beside `save_steps`, which is the Trainer's: by seconds, on request, and early enough before a
deadline that the last save is committed when it comes.

There are two clocks. A steady one measures lengths of time: nobody sets it, and it goes on while a
machine sleeps. The wall clock is what a deadline is given by, and it may be wrong, and set right.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from keepstep.policy.auto_interval import AutoInterval, SaveCosts, next_moment, seconds_apart

Reason = Literal["deadline", "stop", "save-now", "interval"]
STOPS: tuple[Reason, ...] = ("deadline", "stop")

FIRST_SAVE_SECONDS = 60.0  # what a save is taken to last before one has been measured
LOOK_BACK = 20  # saves and steps that an estimate is made of
ENOUGH_STEPS = 10


@dataclass(frozen=True)
class Schedule:
    """What was asked for.

    Attributes:
        interval: the most seconds between two saves; or by what they cost; None: `save_steps` alone
            decides.
        deadline: when the run must have ended, in seconds on the steady clock.
        margin: seconds that are to be left then.
        moment: the deadline by the wall clock, in seconds since the epoch. What comes first counts:
            a clock that was set, whichever of its readings was wrong, makes no run miss its end.
    """

    interval: float | AutoInterval | None = None
    deadline: float | None = None
    margin: float = 30.0
    moment: float | None = None


@dataclass(frozen=True)
class Moment:
    """How things are when a step has ended, or a batch of an evaluation.

    Attributes:
        now: on the steady clock.
        last_save: when the newest save began (or the attempt, before the first).
        save_seconds: of earlier saves, from their beginning to their commit.
        step_seconds: of the latest steps, without the saves and evaluations between them.
        in_flight: whether an earlier save is still being written.
        requests: what somebody has asked for: `stop`, `save-now`.
        save_due: whether this step will be saved if the run goes on.
        evaluation_due: whether an evaluation comes before the next step.
        evaluation_seconds: of earlier evaluations.
        batch_seconds: of the latest batches of the evaluation that is under way.
        last_step: whether no step follows.
        wall: on the wall clock.
        costs: what saves have cost.
        evaluating: whether this is in the middle of an evaluation.
        due_in: steps until the next one that will be saved if the run goes on.
    """

    now: float
    last_save: float
    save_seconds: Sequence[float] = ()
    step_seconds: Sequence[float] = ()
    in_flight: bool = False
    requests: Collection[str] = ()
    save_due: bool = False
    evaluation_due: bool = False
    evaluation_seconds: Sequence[float] = ()
    batch_seconds: Sequence[float] = ()
    last_step: bool = False
    wall: float = -math.inf
    costs: SaveCosts = field(default_factory=SaveCosts)
    evaluating: bool = False
    due_in: float = math.inf


def next_save(schedule: Schedule, moment: Moment) -> Reason | None:
    """Why to save now (and, for `STOPS`, to stop); None: there is no reason to."""
    reason = asked_for(schedule, moment)
    # A save that begins now is in the way of the last one.
    then = replace(moment, save_due=moment.save_due or reason is not None)
    seconds = left(schedule, moment.now, moment.wall)
    if seconds > needed(schedule, then):
        return reason
    # Nobody has asked for this save: that the run would end for it now, it is not worth.
    voluntary = reason == "interval" and isinstance(schedule.interval, AutoInterval)
    return None if voluntary and seconds > needed(schedule, moment) else "deadline"


def asked_for(schedule: Schedule, moment: Moment) -> Reason | None:
    """Why to save now, whatever the deadline says; None: there is no reason to."""
    if "stop" in moment.requests:
        return "stop"
    if "save-now" in moment.requests:
        return "save-now"
    if isinstance(schedule.interval, AutoInterval):
        return "interval" if _is_worth_it(schedule.interval, moment) else None
    if schedule.interval is not None and moment.now - moment.last_save >= schedule.interval:
        return "interval"
    return None


def _is_worth_it(auto: AutoInterval, moment: Moment) -> bool:
    """Whether to save now, though nobody asks for it: one save at a time, of a step that is not
    about to be saved anyway, with its metric if it is evaluated, and not before `next_moment`."""
    if moment.in_flight or moment.evaluating or moment.save_due:
        return False
    if moment.due_in < math.inf:  # that one will do; it might even have to wait for this one
        until_due = moment.due_in * median(moment.step_seconds[-LOOK_BACK:] or [0.0])
        if until_due <= seconds_apart(auto, moment.costs) / 2:
            return False
    return moment.now >= next_moment(auto, moment.costs, moment.last_save)


def is_close(schedule: Schedule, moment: Moment) -> bool:
    """Whether the deadline may have to be thought of before this is asked again, a step (or a batch
    of an evaluation) later: then it is asked at that one's end, with all that is known by then."""
    worst = replace(moment, in_flight=True, save_due=True, evaluation_due=True, last_step=False)
    until = high([*moment.step_seconds[-LOOK_BACK:], *moment.batch_seconds[-LOOK_BACK:]])
    return left(schedule, moment.now, moment.wall) <= until + needed(schedule, worst)


def left(schedule: Schedule, now: float, wall: float) -> float:
    """Seconds until the run must have ended; infinite without a deadline."""
    ends = (schedule.deadline, now), (schedule.moment, wall)
    return min((end - time for end, time in ends if end is not None), default=math.inf)


def needed(schedule: Schedule, moment: Moment) -> float:
    """Seconds to be safe: until it is asked again, the saves before the last one, that, the margin.

    It is asked at the end of each step and of each batch of an evaluation. What is on its way, or
    begins at this step, has to arrive before the last save begins. An evaluation that would have to
    be broken off is not begun. Of the first one nothing is known: a batch is taken for a step, and
    it is broken off in time.
    """
    save, step = high(moment.save_seconds[-LOOK_BACK:]), high(moment.step_seconds[-LOOK_BACK:])
    saves, ahead = 1 + moment.in_flight, high(moment.batch_seconds[-LOOK_BACK:])
    if moment.evaluation_due:
        ahead += high(moment.evaluation_seconds[-LOOK_BACK:]) or step
    if not moment.last_step:
        ahead, saves = ahead + step, saves + moment.save_due
    return ahead + saves * (save or FIRST_SAVE_SECONDS) + schedule.margin


def saves_at(step: int, planned: int, strategy: str, save_steps: float) -> bool:
    """Whether the Trainer saves this step, of a run that it ends (transformers 5.23).

    Args:
        planned: the run's steps.
        strategy: `save_strategy`; `best` promises no step.
        save_steps: a share of the planned ones where it is below 1.
    """
    if strategy == "steps":
        apart = math.ceil(planned * save_steps) if save_steps < 1 else save_steps
        return step >= planned or (apart > 0 and step % apart == 0)
    return strategy == "epoch" and step >= planned


def due_in(step: int, planned: int, epoch: float, strategy: str, save_steps: float) -> float:
    """Steps until the next one that the Trainer saves; 0: this one; infinite: that is not known.

    Args:
        epoch: how many are made, a fraction in the middle of one.
        strategy, save_steps: as of `saves_at`.
    """
    left = max(0, planned - step)
    if strategy == "steps":
        apart = math.ceil(planned * save_steps) if save_steps < 1 else save_steps
        return min(left, -step % apart) if apart > 0 else left
    if strategy != "epoch" or epoch <= 0:
        return math.inf
    return min(left, round(-epoch % 1 * step / epoch))


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

"""When attempts were at work, and what happened meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keepstep.report.facts import RunFacts, began_at, moment


@dataclass(frozen=True)
class Lifeline:
    """When attempts were at work.

    Attributes:
        bars: attempt, begin and end in seconds from the run's beginning, how it ended.
        marks: what happened → when.
    """

    bars: Sequence[tuple[int, float, float, str]]
    marks: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


HAPPENED = {"publish": "push", "reshard": "reshard", "rewind": "rewind", "quarantine": "set aside"}
MOST_BARS = 24


def lifeline(run: RunFacts) -> Lifeline | None:
    """None: nothing is known of when. The newest attempts, where there are many."""
    zero, bars = began_at(run), []
    for attempt in run.attempts[-MOST_BARS:]:
        begin, end = moment(attempt.began), moment(attempt.last)
        if zero is not None and begin is not None and end is not None:
            bars.append((attempt.number, begin - zero, max(begin, end) - zero, attempt.end))
    if not bars:
        return None
    marks: dict[str, list[tuple[int, float]]] = {}
    shown = {number for number, *_ in bars}
    for event in run.events:
        what, at = HAPPENED.get(event["event"]), moment(event["time"])
        if what is not None and at is not None and zero is not None and event["attempt"] in shown:
            marks.setdefault(what, []).append((event["attempt"], at - zero))
    return Lifeline(bars, marks)

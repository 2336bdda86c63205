"""What a person who is not looking should hear of a run, once: of what its events tell. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Kind = Literal[
    "finished",
    "failed",
    "preempted",
    "no_progress",
    "rank_died",
    "save_failed",
    "nonfinite",
    "mirror_failing",
]
Log = Callable[[], Iterable[Mapping[str, Any]]]
MIRROR_SECONDS = 3600.0  # that it has to have failed for
ENDS: Mapping[str, Kind] = {
    "finished": "finished",
    "failed": "failed",
    "preempted": "preempted",
    "no_progress": "no_progress",
}  # `rewound` is none: the run goes on by itself


@dataclass(frozen=True)
class Notice:
    """One message.

    Attributes:
        kind: what has happened.
        told: the same as a sentence goes on behind the run's name.
        step: where; None: not known.
        exit: of an end, the exit status.
    """

    kind: Kind
    told: str
    step: int | None = None
    exit: int | None = None


class Notices:
    """What has been told already, of one attempt.

    Attributes:
        rank_lost: the end that comes is another rank's.
    """

    def __init__(self) -> None:
        self.rank_lost = False
        self._failing_saves = self._nonfinite = self._mirror = False

    def hear(self, event: Mapping[str, Any], log: Log) -> Notice | None:
        """What to tell of an event that has been written down; None: nothing, or not again.

        Args:
            log: returns all events of the run so far; it is asked where that matters alone.
        """
        kind, step = event["event"], event.get("step")
        if kind == "end":
            return self._end(event)
        if kind == "commit":
            self._failing_saves = False
        elif kind == "save_failed" and not self._failing_saves:
            self._failing_saves = True
            return Notice(
                "save_failed", f"checkpoint-{step} was not saved: {event['reason']}", step
            )
        elif kind == "nonfinite" and not self._nonfinite:
            self._nonfinite = True
            what, then = event.get("what", "loss"), event.get("action", "")
            return Notice("nonfinite", f"the {what} of step {step} is not finite ({then})", step)
        elif kind == "mirror":
            return self._mirrored(event, log)
        return None

    def _end(self, event: Mapping[str, Any]) -> Notice | None:
        outcome, step = event.get("outcome"), event.get("global_step")
        kind: Kind | None = "rank_died" if self.rank_lost else ENDS.get(str(outcome))
        if kind is None:
            return None
        reason = " ".join(str(event.get("reason") or "").split())
        at = "" if step is None else f" at step {step}"
        told = f"{str(outcome).replace('_', ' ')}{at}" + (f": {reason}" if reason else "")
        return Notice(kind, told, step, event.get("exit"))

    def _mirrored(self, event: Mapping[str, Any], log: Log) -> Notice | None:
        if "error" not in event:
            self._mirror = False
            return None
        since = failing_since([*log(), event])
        seconds = 0.0 if since is None else _moment(event["time"]) - _moment(since)
        if self._mirror or seconds < MIRROR_SECONDS:
            return None
        self._mirror = True
        told = f"nothing has been copied to the mirror for {seconds / 60:.0f} minutes"
        return Notice("mirror_failing", f"{told}: {event['error']}", event.get("step"))


def failing_since(log: Iterable[Mapping[str, Any]]) -> str | None:
    """The time of the first copy to the mirror that failed after the last one that did not; None:
    the last one did not."""
    since = None
    for event in log:
        if event["event"] == "mirror":
            since = (since or str(event["time"])) if "error" in event else None
    return since


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()

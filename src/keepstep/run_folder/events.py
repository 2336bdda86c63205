"""What events.jsonl tells: one line for each thing that happened. Pure: no disk.

A line may be lost, torn or damaged: what it said is not known then, and is not made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from keepstep.policy.goodput import MOST
from keepstep.policy.lineage import Attempt, Finish, Node, Spent
from keepstep.policy.manifest import BOUNDS
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.rewind import Rewind
from keepstep.policy.strict import TextError, build, checked

JOB = ("job", "nodes", "restarts")  # what an attempt says of its batch job
WITHOUT_ATTEMPT = ("launch",)  # lines of slurm/files.py, for people
# Lines that an attempt itself writes; others may be written by hand, long after it.
OF_ATTEMPTS = (
    *("attempt", "resume", "training", "first_step", "reshard", "commit", "save_failed", "hang"),
    *("nonfinite", "spike", "rewind", "stop_asked", "finished", "end"),
)
COUNTS = {
    "attempt": "attempt",
    "step": "global_step",
    "parent": "parent",
    "to": "parent",
}  # as manifests bound them
# The kind of each fact that somebody reckons with; of any other any kind.
FACTS: dict[str, Any] = {
    **dict.fromkeys(("step", "global_step", "parent", "best_step"), int | None),
    **dict.fromkeys(("bytes", "from_processes", "from_stage", "restarts"), int),
    **dict.fromkeys(("time", "event", "outcome", "run_id"), str),
    **dict.fromkeys(("request", "path", "nodes"), str | None),
    **dict.fromkeys(("recipe", "signal"), str | None),
    **dict.fromkeys(("exit", "newest"), int | None),
    **dict.fromkeys(("to", "of"), int),
    "what": str,
    "rows": tuple[int, ...],
    "dataset": str | None,
    "attempt": int,
    "spent": dict[str, float],
    "at": str,
    "passed_by": dict[str, str],
    "plan": dict[str, Any],
}
FACTS_OF_COMMITS: dict[str, Any] = {
    **dict.fromkeys(("stall", "wait", "hold", "copy", "write", "digest"), float),
    **dict.fromkeys(("read_back", "commit", "gb_per_s", "interval", "overhead"), float),
    "longest_step": float,
    "why": str,
    "slowest_rank": int,
    "metrics": dict[str, float],
}


def read_lines(text: str, of_jobs: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The events on whole lines, and how many lines are not what was written.

    Args:
        of_jobs: with lines that jobs write, which are of no attempt.
    """
    events, damaged = [], 0
    for line in text.split("\n"):
        try:
            if line.strip():
                events.append(_event(line))
        except (TextError, ValueError):
            damaged += 1
    if not of_jobs:
        events = [event for event in events if event["event"] not in WITHOUT_ATTEMPT]
    return events, damaged


def believed(
    events: Sequence[dict[str, Any]], damaged: int, in_manifests: Iterable[int]
) -> tuple[list[dict[str, Any]], int]:
    """The same without the lines of attempts that there cannot have been: each writes a line, and
    is counted on from the greatest that is known. Such a line would have the next ones count on
    from it.

    Args:
        damaged: lines beside these events.
        in_manifests: the attempts that manifests name.

    Returns: the events, and how many lines are not to be believed.
    """
    most = len(events) + damaged + max(in_manifests, default=0)
    kept = [event for event in events if event["attempt"] <= most]
    return kept, damaged + len(events) - len(kept)


def attempts_of(
    events: Iterable[Mapping[str, Any]], committed: Iterable[Node] = ()
) -> list[Attempt]:
    """Every launch of the run, oldest first.

    Args:
        committed: the checkpoints that are there; the line about a commit may be lost, and
            manifests are believed rather than lines.
    """
    attempts: dict[int, Attempt] = {}
    # Beside them: an attempt may have saved a hundred thousand times.
    spent: dict[int, list[Spent]] = {}
    last: dict[int, str] = {}
    for event in events:
        number = event["of"] if event["event"] == "heard" else event["attempt"]
        attempt = attempts.get(number) or Attempt(number, begun_at_known=False)
        attempts[number] = _with(attempt, event)
        if "spent" in event:
            spent.setdefault(number, []).append(_spent(event))
        if event["event"] in OF_ATTEMPTS or event["event"] == "heard":
            last[number] = max(last.get(number, ""), event.get("at", event["time"]))
    for number, attempt in attempts.items():
        told = tuple(spent.get(number, ()))
        attempts[number] = replace(attempt, spent=told, last=last.get(number))
    for node in committed:
        attempt = attempts.get(node.attempt) or Attempt(node.attempt)
        attempts[node.attempt] = replace(
            attempt,
            resumed_from=node.parent,
            begun_at_known=True,
            commits=max(1, attempt.commits),
        )
    return [attempts[number] for number in sorted(attempts)]


def as_asked_now(attempts: Sequence[Attempt], names: Sequence[str]) -> list[Attempt]:
    """The same, with the first of `names` for the request of each attempt that asked for the same.

    Args:
        names: of one request: what it means (a run and its step), and how it is written.
    """

    def asked_for_it(attempt: Attempt) -> bool:
        if attempt.request is not None:
            return attempt.request in names or attempt.path in names
        # Its line is lost; but it began where the request leads to.
        known = attempt.commits and attempt.begun_at_known and attempt.resumed_from
        return bool(known) and str(attempt.resumed_from) in names

    return [replace(a, request=names[0]) if asked_for_it(a) else a for a in attempts]


def _event(line: str) -> dict[str, Any]:
    event, has_check = checked(line)
    kinds = FACTS | FACTS_OF_COMMITS if event.get("event") == "commit" else FACTS
    for name in kinds.keys() & event.keys():
        build(kinds[name], event[name], name)
    if "attempt" not in event and event.get("event") not in WITHOUT_ATTEMPT:
        raise TextError("it names no attempt")
    if "event" not in event or "time" not in event:
        raise TextError("it names no event, or no time")
    for moment in (event["time"], event.get("at", event["time"])):
        datetime.fromisoformat(moment)
    if not all(0 <= seconds <= MOST for seconds in event.get("spent", {}).values()):
        raise TextError("no attempt has spent that")
    if event["event"] == "heard":
        if not {"of", "at", "step", "spent"} <= event.keys():
            raise TextError("it does not tell what was heard")
        if not 0 < event["of"] < event["attempt"]:
            raise TextError("it is of no earlier attempt")
    for name, of in COUNTS.items():
        low, high = BOUNDS[of]
        if not low <= (event.get(name) or low) <= high:
            raise TextError("beyond all counts")
    if event["event"] == "finished" and not has_check:  # it was never written without
        raise TextError("it has no check")
    return event


def _spent(event: Mapping[str, Any]) -> Spent:
    step = event.get("global_step" if event["event"] == "end" else "step")
    return Spent(step or 0, event["spent"], event.get("at", event["time"]))


def _with(attempt: Attempt, event: Mapping[str, Any]) -> Attempt:
    """What is known of an attempt after one more event."""
    kind = event["event"]
    if kind == "heard":
        return replace(attempt, is_heard=True)
    if kind == "attempt":
        job = {name: event[name] for name in JOB if name in event}
        up = sum(event.get("spent", {}).values())
        return replace(attempt, began=event["time"], job=job, up=up)
    if kind == "resume":
        return replace(
            attempt,
            request=event.get("request"),
            path=event.get("path"),
            resumed_from=event.get("step") or 0,
            begun_at_known=True,
            recipe=event.get("recipe"),
        )
    if kind == "training":
        return replace(attempt, began_training=True)
    if kind == "stop_asked":
        return replace(attempt, stop_asked=True)
    if kind == "machine_lost":
        return replace(attempt, machine_lost=True)
    if kind == "save_failed":
        return replace(attempt, save_failed=True)
    if kind == "hang":
        return replace(attempt, hang_at=event.get("step"))
    if kind == "rewind" and {"step", "to", "what", "rows", "of"} <= event.keys():
        facts = {name: event.get(name) for name in ("step", "to", "what", "rows", "of", "dataset")}
        return replace(
            attempt, rewind=Rewind(event["attempt"], **facts | {"rows": tuple(event["rows"])})
        )
    if kind == "finished" and {"step", "newest", "plan"} <= event.keys():
        return replace(attempt, finish=Finish(event["step"], event["newest"], event["plan"]))
    if kind == "reshard":
        before = ParallelLayout(event.get("from_processes", 0), event.get("from_stage", 0))
        return replace(attempt, resharded=before)
    if kind == "commit":
        attempt = replace(attempt, commits=attempt.commits + 1)
        if attempt.begun_at_known or "parent" not in event:
            return attempt
        # The line about its resume is lost.
        return replace(
            attempt,
            request=event.get("request"),
            resumed_from=event["parent"] or 0,
            begun_at_known=True,
        )
    if kind == "end":
        outcome, reached = event.get("outcome"), event.get("global_step")
        reason = event.get("reason")
        return replace(
            attempt,
            outcome=outcome,
            reached=reached,
            exit=event.get("exit"),
            reason=reason if isinstance(reason, str) else None,
        )
    return attempt

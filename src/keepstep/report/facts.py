"""What is known of a run, as its report needs it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from keepstep.output.units import counted, human_duration
from keepstep.policy.goodput import Goodput
from keepstep.policy.lineage import Spent
from keepstep.policy.samples import Sample

Event = Mapping[str, Any]
Fate = Literal["kept", "best", "pruned", "quarantined", "abandoned"]
# What a run would not have spent without saves and ends. (And starts, but for the first.)
LOST = ("repeated", "save", "restore", "reshard", "waiting")


@dataclass(frozen=True)
class AttemptFacts:
    """One attempt.

    Attributes:
        number: counted from 1.
        began, last: when, and its last word or sign of life (UTC, ISO 8601); None: not known.
        resumed_from: the step that it began at; None: it had not come so far, or not known.
        reached: where it ended, or was heard of last.
        commits: checkpoints that it committed.
        end: how it ended: an outcome, `killed`, `at work`, or `unknown`.
        exit: its exit status; None: it has told none.
        reason: what asked for its end, or the error.
        hosts: host → processes; empty: not known.
        spent: what it had spent, at its saves and at its end.
        changed: fields of the recipe that the attempt before had otherwise: name → before, now.
    """

    number: int
    began: str | None = None
    last: str | None = None
    resumed_from: int | None = None
    reached: int | None = None
    commits: int = 0
    end: str = "unknown"
    exit: int | None = None
    reason: str | None = None
    hosts: Mapping[str, int] = field(default_factory=dict)
    spent: Sequence[Spent] = ()
    changed: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Attributes:
        name: as it was named.
        stands: how it stands, in words: `finished`, `at work`, `killed`, …
        reason: why it ended; None: there is nothing to say.
        faults: files of the run that cannot be believed, and why.
        reached, planned: steps made, and to be made; None: not known.
        metric: what ranks its checkpoints; None: nothing does.
        best: the step of the best checkpoint, and its metric; None: there is none.
        goodput: what its time went into.
        attempts: the oldest first.
        events: its log, in its order.
        history: what the Trainer logged, up to the newest checkpoint of the living branch.
        branches: the same of checkpoints on abandoned branches, from where each began.
        fates: (attempt, step) of what is committed now → what it is.
        measured: (attempt, step) of the same → its metrics, with those measured afterwards.
        samples: completions of `sample_prompts`.
        about: title → text: model, data, hardware, code.
        versions: of libraries, as the newest attempt had them.
        total_limit: bytes that the checkpoints may take together; None: no bound.
        disk_free: bytes left on its disk after the newest save; None: not known.
    """

    name: str
    stands: str = "new"
    reason: str | None = None
    faults: Mapping[str, str] = field(default_factory=dict)
    reached: int | None = None
    planned: int | None = None
    metric: str | None = None
    best: tuple[int, float | None] | None = None
    goodput: Goodput = field(default_factory=Goodput)
    attempts: Sequence[AttemptFacts] = ()
    events: Sequence[Event] = ()
    history: Sequence[Mapping[str, Any]] = ()
    branches: Sequence[Sequence[Mapping[str, Any]]] = ()
    fates: Mapping[tuple[int, int], Fate] = field(default_factory=dict)
    measured: Mapping[tuple[int, int], Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    total_limit: int | None = None
    disk_free: float | None = None

    def of_kind(self, kind: str) -> list[Event]:
        """The events of that kind, with a step."""
        return [e for e in self.events if e["event"] == kind and isinstance(e.get("step"), int)]

    @property
    def kills(self) -> int:
        return sum(attempt.end == "killed" for attempt in self.attempts)

    def published(self) -> set[tuple[int, int]]:
        """Attempt and step of each save that was pushed."""
        newest: dict[int, int] = {}  # step → the attempt that has saved it last
        found: set[tuple[int, int]] = set()
        for event in self.events:
            attempt: int = event["attempt"]
            step: int = event.get("step") or 0
            if event["event"] == "commit":
                newest[step] = attempt
            elif event["event"] == "publish" and event.get("outcome") == "published":
                found.add((newest.get(step, attempt), step))
        return found

    def lost(self) -> float | None:
        """The share of the time that kills, ends and saves have cost, in percent; None: not known.

        A start that is not the first counts.
        """
        spent = self.goodput
        if not spent.is_known:
            return None
        lost: int = sum(spent.parts[name] for name in LOST)
        for attempt in self.attempts[1:]:
            starts = [of.seconds.get("startup", 0.0) for of in attempt.spent]
            lost += round(1000 * max(starts, default=0.0))
        return min(100.0, 100 * lost / spent.wall)

    def fate(self, commit: Event) -> Fate:
        """What has become of a save that was committed."""
        at = commit["attempt"], commit["step"]
        if at in self.fates:
            return self.fates[at]
        return "quarantined" if self._aside.get(at[1], "") >= commit["time"] else "pruned"

    @cached_property
    def _aside(self) -> dict[int, str]:
        """Step → when it was last set aside."""
        return {event["step"]: event["time"] for event in self.of_kind("quarantine")}


def headline(run: RunFacts) -> str:
    """A sentence: how it stands, its best checkpoint, what it went through, what that cost."""
    where = "" if run.reached is None else f" at step {run.reached:,}"
    if where and run.planned and run.planned != run.reached:
        where += f" of {run.planned:,}"
    parts = [f"{run.stands}{where}" if run.stands != "new" else "no attempt has begun"]
    if run.best is not None:
        step, value = run.best
        named = "" if value is None else f" ({run.metric} {value:.4g})"
        parts.append(f"best at step {step:,}{named}")
    if run.attempts:
        kills = f", {counted(run.kills, 'kill')}" if run.kills else ""
        parts.append(counted(len(run.attempts), "attempt") + kills)
    lost = run.lost()
    if lost is not None:
        parts.append(f"{lost:.1f} % of the time lost")
    return "; ".join(parts)


def moment(text: str | None) -> float | None:
    """Seconds since the epoch; None: not known."""
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def wall(run: RunFacts) -> str:
    """How long it took, in words."""
    return human_duration(run.goodput.wall / 1000) if run.goodput.wall else ""


def began_at(run: RunFacts) -> float | None:
    """When its first attempt, or its first word, was."""
    known = [moment(a.began) for a in run.attempts] + [moment(e["time"]) for e in run.events[:1]]
    return min((at for at in known if at is not None), default=None)

"""What trackers (`report_to`) are given: each value of a step once, by all attempts together; and
which tracker run an attempt belongs to. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from keepstep.policy.lineage import Attempt
from keepstep.policy.manifest import BOUNDS
from keepstep.policy.strict import TextError, build, checked, with_check

BEGINNING = -1  # the step "before" step 0: nothing has been given yet
OWN = "keepstep/"  # names of keepstep's own figures begin so
SUMMARY = "train_runtime"  # in the line that the Trainer logs at its end


@dataclass(frozen=True)
class Tracked:
    """What trackers have of a run, as the run folder holds it.

    Attributes:
        branch: the number of the tracker run; 0: the first one.
        origin: the step at which that one begins.
        reached: tracker → the step up to which it has been given everything.
        copy: what tells this copy of a run folder from others; empty: it is the folder itself.
        ended: tracker → the step up to which it has all that was to be told it when it was closed.
    """

    branch: int = 0
    origin: int = BEGINNING
    reached: dict[str, int] = field(default_factory=dict)
    copy: str = ""
    ended: dict[str, int] = field(default_factory=dict)

    def begun_at(self, step: int, went_back: bool) -> Self:
        """As an attempt that goes on from this step has it: a tracker run never goes back. Where
        the attempt does, the one that has more is left as it is, and another one begins here.

        Args:
            went_back: on purpose. Else (a damaged checkpoint, a machine that was lost with its
                newest ones) the steps that are made again are those that were told.
        """
        if not went_back or all(reached <= step for reached in self.reached.values()):
            return self
        return replace(self, branch=self.branch + 1, origin=step, reached={}, ended={})

    def copied_to(self, place: str, step: int) -> Self:
        """As a copy of the run folder has it, which goes on from this step at this place: what the
        folder itself tells is not mixed with it."""
        return replace(self, copy=_mark(place), branch=0, origin=step, reached={}, ended={})

    def with_reached(self, names: Collection[str], step: int) -> Self:
        known = {name: max(step, self.reached.get(name, BEGINNING)) for name in names}
        return replace(self, reached={**self.reached, **known})

    def with_ended(self, name: str) -> Self:
        reached = self.reached.get(name)
        return self if reached is None else replace(self, ended={**self.ended, name: reached})

    def as_text(self) -> str:
        return with_check(json.dumps(asdict(self))) + "\n"


def read_tracked(text: str) -> Tracked:
    """
    Raises:
        TextError: it is not what was written.
    """
    tracked: Tracked = build(Tracked, checked(text.strip())[0])
    steps = [tracked.origin, *tracked.reached.values(), *tracked.ended.values()]
    if tracked.branch < 0 or not all(BEGINNING <= s <= BOUNDS["global_step"][1] for s in steps):
        raise TextError("beyond all counts")
    if tracked.copy and not _MARK.fullmatch(tracked.copy):
        raise TextError("no mark of a copy")
    return tracked


_MARK = re.compile("[0-9a-f]{6}")


def _mark(place: str) -> str:
    """The same at each attempt there: nothing need be stored before the first commit."""
    return hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:6]


def went_back(attempts: Sequence[Attempt]) -> bool:
    """Whether the newest attempt was sent back: by a person, who asks for a step, or by the run,
    because of a step that had spoilt it (`rewind`)."""
    if attempts and attempts[-1].request not in (None, "auto", "latest"):
        return True
    for attempt in reversed(attempts[:-1]):
        if attempt.rewind is not None or attempt.commits:
            return attempt.rewind is not None
    return False


@dataclass(frozen=True)
class TrackerRun:
    """One tracker run, as it is named everywhere.

    Attributes:
        run_id: of the run: made once, in the run folder, before anything else.
        name: for people.
        branch: 0: the first one.
        origin: the step at which it begins.
        copy: the mark of the copy of the run folder that it is of.
    """

    run_id: str
    name: str
    branch: int = 0
    origin: int = BEGINNING
    copy: str = ""

    @property
    def is_first(self) -> bool:
        return not self._suffix

    @property
    def id(self) -> str:
        return f"{self.run_id}{self._suffix}"

    @property
    def title(self) -> str:
        return f"{self.name}{self._suffix}"

    @property
    def group(self) -> str:
        """What a run's tracker runs have in common."""
        return f"{self.name}-{self.run_id}"

    @property
    def first_id(self) -> str:
        """Of what it is a branch of, in the end."""
        return self.run_id

    @property
    def _suffix(self) -> str:
        copy = f"-copy-{self.copy}" if self.copy else ""
        return copy + (f"-branch-{self.branch}" if self.branch else "")


class HeldBack:
    """Values by steps, until a tracker may have them; each name of a step goes out once, and no
    step after a later one."""

    def __init__(self) -> None:
        self._held: dict[int, dict[str, Any]] = {}
        self._reached = BEGINNING
        self._given: set[str] | None = set()

    def begin(self, reached: int, given: Collection[str] | None = ()) -> None:
        """The tracker has everything up to `reached`, and of that step these names; None: all."""
        self._reached, self._given = reached, None if given is None else set(given)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Of several values of one name the first counts."""
        self._held[step] = {**values, **self._held.get(step, {})}

    def take(self, up_to: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """What goes out now: what is held of steps up to this one, in order."""
        for step in sorted(step for step in self._held if step <= up_to):
            values = self._held.pop(step)
            if step > self._reached:
                self._reached, self._given = step, set()
            if step < self._reached or self._given is None:
                continue
            fresh = {name: value for name, value in values.items() if name not in self._given}
            self._given |= fresh.keys()
            if fresh:
                yield step, fresh

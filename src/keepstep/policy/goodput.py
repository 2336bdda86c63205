"""What a run's wall time went into, of what its attempts have told. Pure.

Everything is counted in whole milliseconds, so that the parts are the whole, exactly. What nothing
tells of is `unknown`: it is not made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from math import inf

from keepstep.output.units import human_duration
from keepstep.policy.lineage import Attempt, Spent

MOST = 10**10  # seconds: three centuries; more is no time that an attempt took
SLACK = 1000  # milliseconds that moments and sums may differ by
TITLES = {
    "productive": "productive steps",
    "repeated": "repeated steps",
    "save": "save stall",
    "evaluation": "evaluation",
    "startup": "start-up",
    "restore": "restore",
    "reshard": "reshard",
    "waiting": "waiting to be launched",
    "ending": "ending",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Goodput:
    """What a run's wall time went into, in milliseconds.

    Attributes:
        wall: from the first attempt's process on.
        productive: steps that are a part of the run as it is now.
        repeated: steps that a later attempt has made again, or will have to.
        save: training stood still for a save.
        evaluation: evaluations, and the completions of `sample_prompts`.
        startup: from a process's beginning to its first step, without what follows here.
        restore: choosing the checkpoint, comparing its bytes, bringing it from the mirror, loading.
        reshard: giving it to another number of processes, or another ZeRO stage.
        waiting: no process of the run was there.
        ending: after the last step: copies that are waited for, and leaving.
        unknown: nothing tells.
    """

    wall: int = 0
    productive: int = 0
    repeated: int = 0
    save: int = 0
    evaluation: int = 0
    startup: int = 0
    restore: int = 0
    reshard: int = 0
    waiting: int = 0
    ending: int = 0
    unknown: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What the wall time consists of, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "wall"}

    @property
    def is_known(self) -> bool:
        """Whether anything tells of any of it. (Of runs of older versions nothing does.)"""
        return self.wall > self.unknown

    def shares(self) -> dict[str, float]:
        """The same in percent, to a tenth: 100.0 together; all 0 where there is no time."""
        if not self.wall:
            return dict.fromkeys(self.parts, 0.0)
        tenths = {name: divmod(1000 * part, self.wall) for name, part in self.parts.items()}
        left = 1000 - sum(whole for whole, _ in tenths.values())
        most = sorted(tenths, key=lambda name: -tenths[name][1])[:left]  # that were rounded down
        return {name: (whole + (name in most)) / 10 for name, (whole, _) in tenths.items()}

    def told(self) -> str:
        """In a sentence: what was productive, and what else there was, the largest part first."""
        shares = self.shares()
        lost = {name: share for name, share in shares.items() if name != "productive" and share}
        parts = [f"{TITLES[n]} {lost[n]:.1f} %" for n in sorted(lost, key=lambda n: -lost[n])]
        of = human_duration(self.wall / 1000)
        told = f"{shares['productive']:.1f} % of {of} were productive steps"
        return f"{told} ({', '.join(parts)})" if parts else told


@dataclass
class _Sums:
    """Of the attempts looked at so far."""

    parts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, milliseconds: int) -> None:
        self.parts[name] = self.parts.get(name, 0) + milliseconds


def goodput(
    attempts: Sequence[Attempt],
    newest: int | None = None,
    alive: bool = False,
    heard: Spent | None = None,
    heard_at: str | None = None,
) -> Goodput:
    """
    Args:
        attempts: every launch, oldest first.
        newest: the newest checkpoint that a resume could take; None: there is none.
        alive: the newest attempt is at work: its steps since its last save are not lost.
        heard, heard_at: the newest sign of life of the newest attempt, and when that was (ISO
            8601).
    """
    sums, begins, cursor, set_back = _Sums(), None, None, 0
    if attempts and heard is not None:
        sign = replace(heard, at=heard_at)
        attempts = [*attempts[:-1], attempts[-1].heard_of(sign, heard_at)]
    is_over = True  # whether it is known when the attempt before ended
    for index, attempt in enumerate(attempts):
        of_it = max(attempt.spent, key=lambda spent: _total(spent.seconds), default=Spent(0, {}))
        known = {kind: _whole(seconds) for kind, seconds in of_it.seconds.items()}
        began, told = _moment(attempt.began), _moment(of_it.at)
        back = 0
        if began is not None:
            began += set_back - _whole(attempt.up)
            if told is not None:
                back = began + sum(known.values()) - (told + set_back)
            cursor = began if cursor is None else cursor
            sums.add("waiting" if is_over else "unknown", max(0, began - cursor))
            cursor = max(cursor, began)
        last = _moment(attempt.last)
        last = None if last is None else last + set_back
        # Seconds are of a steady clock: the clock of the times was set back since it began.
        set_back += back if back > SLACK else 0
        if cursor is None:
            if last is None:
                continue
            cursor = last - sum(known.values())
        begins = cursor if begins is None else begins
        end = max(cursor + sum(known.values()), cursor if last is None else last)
        sums.add("unknown", end - cursor - sum(known.values()))
        _add_known(sums, known, attempt, _kept(attempts, index, newest, alive))
        cursor, is_over = end, attempt.outcome is not None or attempt.is_heard
    wall = 0 if begins is None or cursor is None else cursor - begins
    return Goodput(wall=wall, **sums.parts)


def _add_known(sums: _Sums, known: dict[str, int], attempt: Attempt, kept: float) -> None:
    """What an attempt has measured; its steps up to `kept` are a part of the run."""
    for kind, milliseconds in known.items():
        if kind != "step":
            sums.add(kind if kind in TITLES else "unknown", milliseconds)
    all_steps = known.get("step", 0)
    if kept == inf:
        sums.add("productive", all_steps)
        return
    # Measured at each save, and at the end: between two of these it is not known which step took
    # how long.
    points = sorted((s.step, _whole(s.seconds.get("step", 0.0))) for s in attempt.spent)
    if attempt.begun_at_known:
        points.insert(0, (attempt.resumed_from, 0))
    before = max((min(p[1], all_steps) for p in points if p[0] <= kept), default=0)
    exact = [p[1] for p in points if p[0] == kept]
    if exact or (attempt.begun_at_known and kept <= attempt.resumed_from):
        productive = min([all_steps, *exact]) if exact else 0
        sums.add("productive", productive)
        sums.add("repeated", all_steps - productive)
        return
    if all(p[0] <= kept for p in points):
        sums.add("productive", all_steps)
        return
    after = max(before, min(min(p[1] for p in points if p[0] > kept), all_steps))
    sums.add("productive", before)
    sums.add("unknown", after - before)
    sums.add("repeated", all_steps - after)


def _kept(attempts: Sequence[Attempt], index: int, newest: int | None, alive: bool) -> float:
    """The step up to which an attempt's steps are a part of the run; infinite: all of them."""
    attempt, last = attempts[index], len(attempts) - 1
    goes_on = alive or attempts[last].finish is not None
    if attempt.commits == 0 and attempt.finish is None and not (index == last and goes_on):
        return attempt.resumed_from  # nothing of it was saved
    later = [
        a.resumed_from
        for number, a in enumerate(attempts[index + 1 :], start=index + 1)
        if a.begun_at_known and (a.commits or a.finish or (number == last and alive))
    ]
    found = min(later, default=inf)
    return found if goes_on else min(found, newest or 0)


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _whole(seconds: float) -> int:
    """In milliseconds."""
    return round(1000 * min(max(seconds, 0.0), MOST))


def _moment(text: str | None) -> int | None:
    """Milliseconds since the epoch; None: not known."""
    if text is None:
        return None
    try:
        return round(1000 * datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return None

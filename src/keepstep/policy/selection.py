"""Which checkpoint a resume takes, and why not the others. Pure; verifying is passed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from keepstep.errors import KeepstepError
from keepstep.output.printable import first_few, printable
from keepstep.output.units import counted
from keepstep.policy.batch import Batch
from keepstep.policy.rewind import Rewind

WORDS = ("auto", "latest", "best", "never")
PATIENCE = 3  # resumes of one checkpoint without progress, unless the recipe says otherwise
Verify = Callable[[int], Sequence[str]]


class SelectionError(KeepstepError, LookupError):
    """What was asked for cannot be had; the message lists what exists.

    Attributes:
        step: of the checkpoint that was asked for; None: of none, or there is no such checkpoint.
    """


class NewerError(SelectionError):
    """A newer keepstep wrote what would have been taken: an older one is not gone on from."""


class UnreadableError(KeepstepError, OSError):
    """A checkpoint that cannot be read now. It is no damage: it may be read another time."""


class NoProgressError(SelectionError):
    """Everything there is to resume from has been tried, again and again, without a commit."""


@dataclass(frozen=True)
class Candidate:
    """One committed checkpoint as a resume sees it; `value` is the ranking metric's.

    `is_finite`: False of a state that is known not to be; whoever names it gets it all the same.
    """

    step: int
    value: float | None = None
    abandoned: bool = False
    is_finite: bool = True


@dataclass(frozen=True)
class Situation:
    """What a choice depends on.

    Attributes:
        candidates: the run's committed checkpoints, in any order.
        best: the step of the best one on the living branch, None without a metric.
        verify: a step → what is wrong with its files; empty: valid. Called newest first, and no
            more often than needed: it may read every byte. Raises UnreadableError, NewerError.
        fruitless: a step (0: the beginning) → how often this request resumed it since the last
            progress.
        patience: how often the same step may be resumed without progress.
        under_way: the newest attempts asked for the same (and not simply for `auto`), and have
            committed since.
    """

    candidates: Sequence[Candidate]
    best: int | None
    verify: Verify
    fruitless: Mapping[int, int] = field(default_factory=dict)
    patience: int = PATIENCE
    under_way: bool = False


@dataclass(frozen=True)
class Choice:
    """The step to resume from (None: the beginning), and why others were passed by.

    `invalid` are those whose files are not what was written: they belong in quarantine.
    `under_way`: the request was carried out by an earlier attempt; this one carries on from there.
    `batch`: how the rows of a step are shared out from there on; None: as the recipe says.
    `rewinds`: that were decided on since that step was saved.
    """

    step: int | None
    passed_by: Mapping[int, str] = field(default_factory=dict)
    invalid: Mapping[int, str] = field(default_factory=dict)
    under_way: bool = False
    weights_only: bool = False
    batch: Batch | None = None
    rewinds: tuple[Rewind, ...] = ()


def choose(request: str, situation: Situation) -> Choice:
    """What `resume_from_checkpoint` asks for: auto, latest, best, never, or a step.

    Raises:
        NoProgressError: with `auto`, everything was resumed `patience` times without progress.
        SelectionError: what was asked for does not exist or is damaged; or, with `auto`,
            checkpoints exist and none is valid: starting from zero would hide that.
        NewerError: a newer keepstep wrote it.
        UnreadableError: it cannot be read; or, with `auto`, none of them can.
    """
    if situation.under_way:
        return replace(_newest_valid(situation), under_way=True)
    if request == "never":
        _check_progress(situation, None)
        return Choice(None)
    if request == "auto":
        return _newest_valid(situation)
    alive = [c.step for c in situation.candidates if not c.abandoned]
    wanted = {"latest": max(alive, default=None), "best": situation.best}.get(
        request, int(request) if request.isdecimal() else None
    )
    if wanted not in {c.step for c in situation.candidates}:
        raise SelectionError(
            f"resume_from_checkpoint: {request} cannot be had; {_listing(situation)}"
        )
    assert wanted is not None
    _check_progress(situation, wanted)
    faults = situation.verify(wanted)
    if faults:
        raise SelectionError(
            f"resume_from_checkpoint: {request} means checkpoint-{wanted}, which is damaged: "
            f"{_some(faults, '; ')}; {_listing(situation)}",
            step=wanted,
        )
    return Choice(wanted)


def _newest_valid(situation: Situation) -> Choice:
    passed_by: dict[int, str] = {}
    invalid: dict[int, str] = {}
    unreadable = tried = False
    for candidate in sorted(situation.candidates, key=lambda c: c.step, reverse=True):
        step = candidate.step
        if candidate.abandoned:
            passed_by[step] = "on an abandoned branch"
            continue
        if not candidate.is_finite:
            passed_by[step] = "its state is not finite"
            continue
        tries = situation.fruitless.get(step, 0)
        try:
            faults = () if tries >= situation.patience else situation.verify(step)
        except UnreadableError as error:
            passed_by[step], unreadable = str(error), True
            continue
        if tries >= situation.patience:
            passed_by[step], tried = f"resumed {counted(tries, 'time')} without progress", True
        elif faults:
            passed_by[step] = invalid[step] = _some(faults, "; ")
        else:
            return Choice(step, passed_by, invalid)
    reasons = [f"checkpoint-{step}: {why}" for step, why in passed_by.items()]
    listing = "    " + _some(reasons, "\n    ")
    if unreadable:
        raise UnreadableError(
            f"no checkpoint can be read and resumed now:\n{listing}\n"
            "    Hint: look at the disk; nothing has been set aside, launch it again then."
        )
    if tried:
        raise NoProgressError(f"nothing is left to resume from:\n{listing}")
    if passed_by:
        raise SelectionError(
            f"{counted(len(passed_by), 'checkpoint')} exist{'s' if len(passed_by) == 1 else ''} "
            f"and none is valid:\n{listing}\n"
            "    Hint: restore one of them, name the step of one on an abandoned branch, or set "
            "resume_from_checkpoint: never to start again; what another trainer wrote is taken in "
            "by keepstep adopt."
        )
    _check_progress(situation, None)
    return Choice(None)


def _check_progress(situation: Situation, step: int | None) -> None:
    tries = situation.fruitless.get(step or 0, 0)
    if tries >= situation.patience:
        where = "from the beginning" if step is None else f"from checkpoint-{step}"
        raise NoProgressError(
            f"the run went on {where} {counted(tries, 'time')} and committed nothing since",
            step=step,
        )


def _some(texts: Sequence[str], separator: str) -> str:
    """The first few of many; each may quote names of files."""
    return first_few([printable(text) for text in texts], separator)


def _listing(situation: Situation) -> str:
    steps = sorted(c.step for c in situation.candidates)
    shown = _some([str(step) for step in reversed(steps)], ", ")
    return f"there are checkpoints at: {shown}" if steps else "there are none"

"""What a save goes through, as a table: state and event → next state. Pure: no clock, no disk.

The main process's record of a save follows it (save/in_flight.py); the other ranks are told where
it stands (`Saver.settle`). docs/saving.md shows the table as a picture that is made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import MappingProxyType

from keepstep.errors import KeepstepError


class SaveState(Enum):
    """Where a save stands; the value says what is going on."""

    SNAPSHOT = "the state is being copied to host memory"
    WRITING = "this rank's files are being written"
    REPORTED = "they are written and synced; the other ranks' reports are waited for"
    COMMITTING = "every rank has reported; the main process commits"
    OVERDUE = "the commit has begun, and takes longer than save_timeout_seconds: it may still come"
    COMMITTED = "the checkpoint is there"
    FAILING = "there will be no checkpoint; the ranks have not been told yet"
    TIMED_OUT = "all ranks know that there will be none; a writer that is stuck is still at work"
    FAILED = "all ranks know that there will be none, and nobody writes any more"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen to it any more: another save may begin."""
        return self in (SaveState.COMMITTED, SaveState.FAILED)

    @property
    def is_given_up(self) -> bool:
        """Whether there will be no checkpoint, whatever a writer still does."""
        return self in (SaveState.FAILING, SaveState.TIMED_OUT, SaveState.FAILED)


class SaveEvent(Enum):
    """What happens to a save; the value says it in words."""

    COPIED = "the snapshot is complete"
    WRITTEN = "this rank has reported"
    ALL_WRITTEN = "every rank has reported"
    RENAMED = "the folder has its name"
    ERROR = "a rank met an error, or is too late"
    SLOW = "the time-out passes"
    STUCK = "told, and a writer is stuck"
    STOPPED = "told, and no writer is at work"


class TransitionError(KeepstepError, RuntimeError):
    """An event that cannot happen in this state: a mistake in keepstep."""


S, E = SaveState, SaveEvent
TRANSITIONS: Mapping[tuple[SaveState, SaveEvent], SaveState] = MappingProxyType(
    {
        (S.SNAPSHOT, E.COPIED): S.WRITING,
        (S.WRITING, E.WRITTEN): S.REPORTED,
        (S.REPORTED, E.ALL_WRITTEN): S.COMMITTING,
        (S.COMMITTING, E.RENAMED): S.COMMITTED,
        (S.COMMITTING, E.SLOW): S.OVERDUE,
        (S.OVERDUE, E.RENAMED): S.COMMITTED,
        **{
            (state, E.ERROR): S.FAILING
            for state in (S.SNAPSHOT, S.WRITING, S.REPORTED, S.COMMITTING, S.OVERDUE)
        },
        (S.FAILING, E.STUCK): S.TIMED_OUT,
        (S.FAILING, E.STOPPED): S.FAILED,
        (S.TIMED_OUT, E.STOPPED): S.FAILED,
    }
)
FIRST = SaveState.SNAPSHOT


def transition(state: SaveState, event: SaveEvent) -> SaveState:
    """The state after an event.

    Raises:
        TransitionError: the event cannot happen in that state.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise TransitionError(f"{event.name} cannot happen to a save in {state.name}") from None


def picture() -> Iterator[str]:
    """The table as a Mermaid diagram, line by line."""
    yield "stateDiagram-v2"
    yield f"    [*] --> {FIRST.name}"
    for (state, event), then in TRANSITIONS.items():
        yield f"    {state.name} --> {then.name}: {event.value}"
    yield from (f"    {state.name} --> [*]" for state in SaveState if state.is_terminal)

"""How an attempt ends: one word for status.json, one exit status for shells."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Word = Literal["finished", "preempted", "rewound", "failed", "no_progress"]
EXIT_STATUS: dict[str, int] = {
    "finished": 0,
    "preempted": 75,
    "rewound": 75,
    "failed": 70,
    "no_progress": 76,
}
CONFIG_EXIT_STATUS = 2
# launch/train.sh names a file here: launchers hide the exit status of their workers.
STATUS_FILE = "KEEPSTEP_STATUS_FILE"


@dataclass(frozen=True)
class Outcome:
    """How this attempt ended.

    Attributes:
        outcome: finished, preempted (stopped on request, state saved), rewound (the next attempt
            goes on from before a step that had spoilt the run), failed, or no_progress
            (everything there is to resume from was tried: do not launch it again as it is).
        reason: what asked for the stop, or the error; None for finished.
        global_step: optimizer steps completed, None when training did not begin.
        best_step: the best committed checkpoint, None without one.
        exit: the exit status of every rank.
    """

    outcome: Word
    reason: str | None = None
    global_step: int | None = None
    best_step: int | None = None
    exit: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def tell_shell(self) -> None:
        """Write a copy where launch/train.sh looks for it. Ranks: any."""
        _tell_shell(json.dumps(self.as_json()))


def tell_shell_of_beginning() -> None:
    """From here on an attempt is under way, which a stop has to save. Ranks: any."""
    _tell_shell('{"outcome": null}')


def is_persons(signal: str) -> bool:
    """Whether this signal to a rank is somebody's wish. Ranks: any.

    TERM is also what launchers send to the ranks that are left when one has died.
    """
    path = os.environ.get(STATUS_FILE)
    return signal != "SIGTERM" or bool(path and Path(path).with_name("asked").exists())


def _tell_shell(text: str) -> None:
    """The first rank of each machine writes, for the script that launched it."""
    path = os.environ.get(STATUS_FILE)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            Path(path).write_text(text + "\n")
        except OSError as error:  # it has the exit status of the launcher, too
            logger.warning("launch/train.sh cannot be told how this attempt ends: %s", error)


def ended(outcome: Word, **facts: Any) -> Outcome:
    """The outcome with the exit status that belongs to it."""
    return Outcome(outcome, exit=EXIT_STATUS[outcome], **facts)

"""`keepstep status RUN --healthy`: what a liveness probe asks. It answers at once, and where it
cannot know, it ends nothing."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from pathlib import Path

from keepstep.cli.common import run_folder
from keepstep.policy.probes import Health, health
from keepstep.run_folder.kinds import why_no_run
from keepstep.run_folder.launched import path_of
from keepstep.run_folder.ownership import process_lives
from keepstep.run_folder.progress import Reached, reached_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object, read_text

ANSWER_SECONDS = 3.0  # a disk that takes longer is no fault of the run


def health_at(path: Path) -> Health:
    """Whether the attempt at work in this folder, on this machine, is to go on."""
    if not path.exists() and "://" not in str(path):
        return Health(True, f"there is no folder {path} yet")
    folder, found = run_folder(path), [Health(True, f"{path} does not answer")]

    def look() -> None:
        try:
            why = why_no_run(folder)
            told = "" if why is None else f"no attempt is at work here: {path} {why.what}"
            found.append(Health(True, told) if told else health_of(folder))
        except (*ABSENT, OSError, OddFileError) as error:
            found.append(Health(True, f"what tells of it cannot be read: {error}"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found[-1]


def health_of(run: RunFolder) -> Health:
    """
    Raises:
        OSError, OddFileError: what tells of it cannot be read.
    """
    words = run.owner_words()
    alive, reached = process_lives(words), reached_of(run)
    if not alive or reached is None or read_text(run.heartbeat).split()[:1] != words[:1]:
        return health(alive, None, {})
    silence = time.time() - datetime.fromisoformat(reached.time).timestamp()
    return health(alive, max(0.0, silence), _limits(run, reached))


def _limits(run: RunFolder, reached: Reached) -> dict[str, float]:
    """As the attempt was launched with; empty: nothing tells."""
    try:
        recipe = read_object(path_of(run, reached.attempt)).get("recipe")
    except (*ABSENT, OddFileError):
        return {}
    values = recipe.items() if isinstance(recipe, dict) else ()
    names = ("hang_timeout_seconds", "save_timeout_seconds")
    return {k: float(v) for k, v in values if k in names and type(v) in (int, float) and v > 0}

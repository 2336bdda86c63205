"""What each attempt was launched as: kept in the run folder, so that a person can tell afterwards.

It names paths of the machine, and no secret: see `output/environment.py`. It stays in the run
folder: no mirror, no push and no checkpoint takes it along.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from keepstep.policy.strict import TextError, build, with_check
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object

# Fields of a recipe that are another on each machine or at each launch, and change nothing.
OF_A_LAUNCH = ("local_rank", "deepspeed_plugin", "distributed_state")


@dataclass(frozen=True)
class Launched:
    """An attempt, as it was launched.

    Attributes:
        attempt: its number.
        time: when it began (UTC, ISO 8601).
        command: the command line, as a shell takes it.
        directory: the folder that it was given in.
        model: the model that was to be trained, as it was named; null: an object of a script.
        data: `training` and `evaluation` (or the names of several sets): where the rows come from.
        recipe: every field, as it was resolved; of what is no plain value its type.
        hosts: each host, and how many processes it had.
        hardware: what they computed on.
        versions: of the main libraries, and of Python.
        code: of the script's folder, or the one that the command was given in: its git `commit`,
            and `changed`, how many tracked files differ from it; empty: that is not known.
    """

    attempt: int
    time: str
    command: str
    directory: str
    model: str | None
    data: dict[str, str]
    recipe: dict[str, Any]
    hosts: dict[str, int]
    hardware: str
    versions: dict[str, str]
    code: dict[str, str]

    def as_text(self) -> str:
        return with_check(json.dumps(asdict(self)))


def path_of(run: RunPaths, attempt: int) -> Path:
    return run.launched / f"{attempt}.json"


def launched_of(run: RunPaths) -> dict[int, Launched]:
    """What there is of it, by attempt. What cannot be believed is not there."""
    found = {}
    try:
        names = os.listdir(run.launched) if not run.launched.is_symlink() else []
    except ABSENT:
        return {}
    for name in names:
        number = name.removesuffix(".json")
        if not number.isdecimal() or len(number) > 10:
            continue
        try:
            values = read_object(path_of(run, int(number)))
            known = {f.name: values[f.name] for f in fields(Launched) if f.name in values}
            launched: Launched = build(Launched, known)
        except (OSError, OddFileError, TextError):
            continue
        if launched.attempt == int(number):
            found[int(number)] = launched
    return dict(sorted(found.items()))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields of the recipe that one attempt had otherwise than the one before: name → before, now.
    A field that only one of them knows is of another version."""
    return {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value and name not in OF_A_LAUNCH
    }

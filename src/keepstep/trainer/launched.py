"""What an attempt is launched as, for the run folder: its recipe, command line, code and hosts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from platform import python_version
from typing import Any

import keepstep
from keepstep.output.environment import hidden, is_secret
from keepstep.recipe.config import Recipe
from keepstep.run_folder.keeping import now
from keepstep.run_folder.launched import Launched
from keepstep.trainer import about
from keepstep.trainer.description_mixin import VERSIONS

COMMAND = "KEEPSTEP_COMMAND"  # by launch/train.sh, and a Slurm job
GIT_SECONDS = 5.0  # for each question: the folder may be on a network filesystem
LONGEST = 2000  # characters of a value
LAUNCHED_BY = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "OMPI_COMM_WORLD_SIZE")


def launched(recipe: Recipe, attempt: int, hosts: Sequence[str]) -> Launched:
    """What to keep of this attempt. Ranks: the main process.

    Args:
        hosts: of each rank.
    """
    name = recipe.model.model_name_or_path
    return Launched(
        attempt=attempt,
        time=now(),
        command=hidden(_command(), os.environ),
        directory=os.getcwd(),
        model=None if name is None else hidden(name, os.environ),
        data={what: hidden(source, os.environ) for what, source in _sources(recipe)},
        recipe=_fields(recipe),
        hosts=dict(Counter(hosts)),
        hardware=about.hardware(recipe),
        versions=VERSIONS | {"python": python_version()},
        code=_code(),
    )


def _command() -> str:
    """The command line that a person has given, as far as that can be seen from here."""
    told = os.environ.get(COMMAND)
    if told:
        return told
    if any(name in os.environ for name in LAUNCHED_BY):
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
        except (OSError, UnicodeDecodeError):
            words = []
        if any("accelerate" in word or "torchrun" in word or "torch" in word for word in words):
            return shlex.join(words)
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data = recipe.data
    parts = [str(part.path) for part in data.datasets or []]
    named = data.dataset_name or ", ".join(parts)
    if named:
        yield "training", named
    if data.eval_dataset_name:
        yield "evaluation", data.eval_dataset_name
    for name, source in (data.eval_datasets or {}).items():
        yield f"evaluation {name}", source


def _fields(recipe: Recipe) -> dict[str, Any]:
    found = {}
    for part in (recipe.model, recipe.data, recipe.training):
        for field in fields(part):
            value = getattr(part, field.name, None)
            found[field.name] = _plain("***" if is_secret(field.name) and value else value)
    return found


def _plain(value: Any) -> Any:
    """As JSON holds it, without secrets."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, (str, Path)):
        return hidden(str(value), os.environ)[:LONGEST]
    if isinstance(value, Mapping):
        return {
            str(name): "***" if is_secret(str(name)) and entry else _plain(entry)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value[:100]]
    return type(value).__name__


def _code() -> dict[str, str]:
    """The git commit of the code that was run, and whether it is what was committed."""
    script = Path(sys.argv[0]).resolve()
    own = Path(keepstep.__file__).resolve().parent
    folder = Path.cwd() if own in script.parents or not script.is_file() else script.parent
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    told = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, **({} if told is None else {"changed": str(len(told.splitlines()))})}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers; None: nothing, or not soon enough."""
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

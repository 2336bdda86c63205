"""What a shell offers behind `keepstep`, when somebody presses Tab."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from keepstep.policy.manifest import step_of
from keepstep.policy.selection import WORDS
from keepstep.run_folder.paths import PRIVATE
from keepstep.run_folder.reader import RunFolder

LINKS = ("best", "latest")


def runs(incomplete: str) -> list[str]:
    """Run folders, and folders on the way to some; where there are none, every folder."""
    above = incomplete.rpartition("/")[0] + "/" * ("/" in incomplete)
    found = [name for name in _folders(above) if f"{above}{name}".startswith(incomplete)]
    own = [name for name in found if _is_run(above + name) or any(_below(above + name))]
    return [f"{above}{name}" for name in own or found]


def checkpoints(incomplete: str) -> list[str]:
    """Those of the run that is named ahead of the last slash; ahead of that, runs."""
    above, slash, _ = incomplete.rpartition("/")
    if not slash or not _is_run(above):
        return [f"{name}/" if _is_run(name) else name for name in runs(incomplete)]
    names = [name for name in _folders(f"{above}/") if step_of(name) is not None]
    names = sorted(names, key=lambda name: step_of(name) or 0)
    names += [name for name in LINKS if os.path.lexists(os.path.join(above, name))]
    return [told for name in names if (told := f"{above}/{name}").startswith(incomplete)]


def runs_or_checkpoints(incomplete: str) -> list[str]:
    """For what takes either."""
    above = incomplete.rpartition("/")[0]
    return checkpoints(incomplete) if above and _is_run(above) else runs(incomplete)


def steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of the committed checkpoints of the run that is named already."""
    run = ctx.params.get("run")
    if run is None or not Path(run).is_dir():
        return []
    found = [str(checkpoint.step) for checkpoint in RunFolder(Path(run)).checkpoints()]
    return [step for step in found if step.startswith(incomplete)]


def requests(ctx: typer.Context, incomplete: str) -> list[str]:
    """What `resume_from_checkpoint` takes."""
    return [word for word in WORDS if word.startswith(incomplete)] + steps(ctx, incomplete)


def _folders(above: str) -> list[str]:
    try:
        with os.scandir(os.path.expanduser(above) or ".") as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:  # there is nothing to offer
        return []


def _is_run(path: str) -> bool:
    return os.path.isdir(os.path.join(os.path.expanduser(path), PRIVATE))


def _below(path: str) -> list[str]:
    return [name for name in _folders(path) if _is_run(os.path.join(path, name))]

"""One rank's problem is everybody's: told once, and the launch ends on all of them alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keepstep
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.recipe.problems import ConfigError, Problem

PACKAGE = Path(keepstep.__file__).parent
OWN_CODE = "the code of keepstep"


def agree(problems: Sequence[Problem]) -> None:
    """Fail on every rank when one of them sees an error; tell warnings.

    Ranks: all (collective).

    Raises:
        ConfigError: on every rank, with the problems of all.
    """
    of_ranks = collectives.gather_some(list(problems) or None)
    seen = [problem for of_rank in of_ranks.values() for problem in of_rank]
    told = list(dict.fromkeys(seen))  # once, however many ranks see it
    errors = [problem for problem in told if problem.severity == "error"]
    for warning in told:
        if warning not in errors:
            say(f"warning: {warning.told()}")
    if errors:
        raise ConfigError(errors)


def differing(settings: Mapping[str, Any], versions: Mapping[str, str] = {}) -> list[Problem]:
    """Settings that are not the same on every rank, as where each has made rows of its own.

    Two checkouts of keepstep may have one version, so its files are compared, too.

    Args:
        versions: of libraries, by name: keepstep's own is to be the same, of others it is told.

    Ranks: all (collective).
    """
    named = {f"the version of {library}": library for library in versions}
    own = {name: repr(value) for name, value in settings.items()}
    own |= {name: versions[library] for name, library in named.items()}
    own[OWN_CODE] = _digest(PACKAGE)
    of_main = collectives.on_main("comparing the settings", lambda: own)
    names = own.keys() | of_main.keys()
    apart = {name: own.get(name) for name in names if own.get(name) != of_main.get(name)}
    of_ranks = collectives.gather_some(apart or None)
    found = []
    for name in sorted({name for row in of_ranks.values() for name in row}):
        words = f"{name} differs between ranks: {_told(name, of_main, of_ranks)}"
        if name in named:
            is_own = named[name] == "keepstep"
            hint = "the same version on all machines"
            found.append(Problem(words, hint, "version", "error" if is_own else "warning"))
        elif name == OWN_CODE:
            hint = "the same wheel, or the same files of a checkout, on all machines"
            found.append(Problem(words, hint, "version"))
        else:
            found.append(Problem(words, code="data"))
    return found


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _told(name: str, of_main: Mapping[str, str], of_ranks: Mapping[int, Mapping[str, Any]]) -> str:
    """The main process's value, and the first that is another."""
    rank = next(rank for rank, row in of_ranks.items() if name in row)
    own, other = (value or "not set" for value in (of_main.get(name), of_ranks[rank][name]))
    return f"{own} on rank 0, {other} on rank {rank}"

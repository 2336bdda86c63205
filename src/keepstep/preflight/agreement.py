"""One rank's problem is everybody's: told once, and the launch ends on all of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.recipe.problems import ConfigError, Problem


def agree(problems: Sequence[Problem]) -> None:
    """Fail on every rank when one of them sees an error; tell warnings.

    Ranks: all (collective).

    Raises:
        ConfigError: on every rank, with the problems of all.
    """
    seen = [problem for of_rank in collectives.gather(list(problems)) for problem in of_rank]
    told = list(dict.fromkeys(seen))  # once, however many ranks see it
    errors = [problem for problem in told if problem.severity == "error"]
    for warning in told:
        if warning not in errors:
            say(f"warning: {warning.told()}")
    if errors:
        raise ConfigError(errors)


def differing(settings: Mapping[str, Any]) -> list[Problem]:
    """Settings that are not the same on every rank, as where each has made rows of its own.

    Ranks: all (collective).
    """
    rows = collectives.gather(dict(settings))
    values = {name: [row.get(name) for row in rows] for row in rows for name in row}
    return [
        Problem(f"{name} differs between ranks: {found}", code="data")
        for name, found in values.items()
        if len(set(map(repr, found))) > 1
    ]

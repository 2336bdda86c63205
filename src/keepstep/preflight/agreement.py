"""One rank's problem is everybody's: told once, and the launch ends on all of them alike."""

from __future__ import annotations

from collections.abc import Sequence

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

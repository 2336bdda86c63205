"""What is wrong with a recipe: problems, told all at once."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from keepstep.errors import KeepstepError


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: what was set and seen, and what to do about it.

    Attributes:
        what: the field, what was set, and what is wrong with it.
        hint: what to do about it; empty: nothing is known.
        code: the same word for the same mistake, whatever the text says.
        severity: an error ends the launch, a warning is told.
    """

    what: str
    hint: str = ""
    code: str = "field"
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.what}\n    Hint: {self.hint}" if self.hint else self.what

    def told(self) -> str:
        """With its code, as reports show it."""
        return str(replace(self, what=f"{self.what} [{self.code}]"))


class ConfigError(KeepstepError, ValueError):
    """The recipe cannot be run. Carries every problem found, to be reported at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def report(self) -> str:
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "a problem"
        lines = [f"  - {problem.told()}" for problem in self.problems]
        return "\n".join([f"keepstep: the recipe has {count}:", *lines])


@contextmanager
def refused_by_libraries() -> Iterator[None]:
    """What the libraries refuse before training begins, they refuse of the recipe.

    (An option of theirs that goes not with another one, a module name that the model lacks.) An
    error that keepstep's own code has raised is none of these, nor one of the disk or the network.

    Raises:
        ConfigError: in the place of their error, with its text and where it comes from.
    """
    try:
        yield
    except (ValueError, TypeError, AssertionError, ImportError, NotImplementedError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        file, ours = Path(where.filename), Path(__file__).parents[1]
        if ours in file.parents or type(error).__module__.split(".")[0] == ours.name:
            raise
        place = f"{'/'.join(file.parts[-3:])}:{where.lineno}"
        text = f"{type(error).__name__}: {str(error).strip()}"
        raise ConfigError([Problem(text, f"refused by {place}", code="refused")]) from error

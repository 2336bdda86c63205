"""Steps whose loss or gradient is not finite: what is said of them, and what follows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from keepstep.output.printable import first_few

Action = Literal["stop", "rewind", "ignore"]
What = Literal["loss", "gradient norm", "weights"]


@dataclass(frozen=True)
class Offence:
    """A step that spoils what is trained.

    Attributes:
        step: the optimizer step, counted from 1.
        what: is not finite. Loss before gradient norm: of a loss it is known whose it is.
        ranks: whose loss it was; empty: it is nobody's in particular.
        rows: positions in the training set of what those ranks (or all, where it is nobody's)
            computed then, in order; empty where the Trainer deals the rows, or of a stream.
        values: rank → what it saw, as text (`nan`, `inf`).
    """

    step: int
    what: What
    ranks: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    values: Mapping[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        seen = f" ({', '.join(sorted(set(self.values.values())))})" if self.values else ""
        whose = f" of {_count('rank', self.ranks)}" if self.ranks else ""
        are = "are" if self.what == "weights" else "is"
        of_step = "after" if self.what == "weights" else "in"
        told = f"the {self.what}{whose} {are} not finite{seen} {of_step} step {self.step}"
        if not self.rows:
            return told
        rows = first_few([str(row) for row in self.rows], ", ")
        return f"{told}; it had these rows of the training set, counted from 0: {rows}"


def stopped(offence: Offence, newest: int | None) -> str:
    """What a run that ends for it says.

    Args:
        newest: the newest checkpoint; None: there is none.
    """
    look = "look at these rows, lower" if offence.rows else "lower"
    saved = "nothing was saved before" if newest is None else f"checkpoint-{newest} is from before"
    return (
        f"{offence}\n"
        f"    Nothing of it is saved: {saved}.\n"
        f"    Hint: {look} learning_rate, or lower max_grad_norm; "
        "on_nonfinite: ignore goes on all the same"
    )


def _count(word: str, numbers: Sequence[int]) -> str:
    shown = first_few([str(number) for number in numbers], ", ")
    return f"{word} {shown}" if len(numbers) == 1 else f"{word}s {shown}"

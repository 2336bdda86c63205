"""Steps that spoil what is trained: what is said of them, and what follows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from keepstep.output.printable import first_few
from keepstep.policy.spikes import Spike

Action = Literal["stop", "rewind", "ignore"]
What = Literal["loss", "gradient norm", "weights"]


@dataclass(frozen=True)
class Offence:
    """A step that spoils what is trained.

    Attributes:
        step: the optimizer step, counted from 1.
        what: is not finite, or far above what it was. Loss before gradient norm: of a loss it is
            known whose it is.
        ranks: whose loss it was; empty: it is nobody's in particular.
        rows: positions in the training set of what those ranks (or all, where it is nobody's)
            computed then, in order; empty where the Trainer deals the rows, or of a stream.
        values: rank → what it saw, as text (`nan`, `inf`).
        spike: its numbers are finite, and one is a spike; None: one is not finite.
    """

    step: int
    what: What
    ranks: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    values: Mapping[int, str] = field(default_factory=dict)
    spike: Spike | None = None

    @property
    def option(self) -> str:
        """The field of the recipe that says what follows."""
        return "on_nonfinite" if self.spike is None else "on_spike"

    @property
    def fault(self) -> str:
        """What has happened, without the rows."""
        if self.spike is not None:
            seen = f"{self.spike.value:.6g}, above {self.spike.limit:.6g}"
            told = f"the {self.what} is a spike ({seen}; the mean was {self.spike.mean:.6g})"
            return f"{told} in step {self.step}"
        seen = f" ({', '.join(sorted(set(self.values.values())))})" if self.values else ""
        whose = f" of {_count('rank', self.ranks)}" if self.ranks else ""
        are = "are" if self.what == "weights" else "is"
        of_step = "after" if self.what == "weights" else "in"
        return f"the {self.what}{whose} {are} not finite{seen} {of_step} step {self.step}"

    def __str__(self) -> str:
        if not self.rows:
            return self.fault
        rows = first_few([str(row) for row in self.rows], ", ")
        return f"{self.fault}; it had these rows of the training set, counted from 0: {rows}"


def stopped(offence: Offence, newest: int | None, why: str | None = None) -> str:
    """What a run that ends for it says.

    Args:
        newest: the newest checkpoint; None: there is none.
        why: it does not go back, though it was to.
    """
    look = "look at these rows, lower" if offence.rows else "lower"
    saved = "nothing was saved before" if newest is None else f"checkpoint-{newest} is from before"
    stays = "" if why is None else f"    It does not go back ({offence.option}: rewind): {why}\n"
    return (
        f"{offence}\n{stays}"
        f"    Nothing of it is saved: {saved}.\n"
        f"    Hint: {look} learning_rate, or lower max_grad_norm; "
        f"{offence.option}: ignore goes on all the same"
    )


def goes_back(offence: Offence, to: int, number: int, most: int) -> str:
    """What a run that goes back for it says.

    Args:
        to: the newest checkpoint; 0: there is none.
        number: of this time, counted from 1.
        most: times that it may.
    """
    where = f"from checkpoint-{to}" if to else "from the beginning"
    return (
        f"{offence}\n"
        f"    {offence.option}: rewind ({number} of {most}): the next attempt goes on {where}, and "
        "leaves these rows out"
    )


def _count(word: str, numbers: Sequence[int]) -> str:
    shown = first_few([str(number) for number in numbers], ", ")
    return f"{word} {shown}" if len(numbers) == 1 else f"{word}s {shown}"

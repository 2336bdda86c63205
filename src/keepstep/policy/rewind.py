"""Going back from a step that has spoilt the run, and the rows that are left out since. Pure.

What is decided is one line of the log (a `Rewind`); what was decided before a checkpoint was made
is in its manifest as well. From both follows which rows an attempt does not deal any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from keepstep.output.printable import first_few, printable
from keepstep.policy.batch import Dealt


@dataclass(frozen=True)
class Rewind:
    """The decision to go back.

    Attributes:
        attempt: that took it, and ended.
        step: that had spoilt the run.
        to: the checkpoint that was the newest then; 0: the beginning.
        what: had happened in that step, in words.
        rows: which are left out: positions in the training set.
        of: the rows of the training set.
        dataset: its fingerprint; None: not known.
    """

    attempt: int
    step: int
    to: int
    what: str
    rows: tuple[int, ...]
    of: int
    dataset: str | None = None

    def __str__(self) -> str:
        where = f"checkpoint-{self.to}" if self.to else "the beginning"
        rows, what = named(self.rows), printable(self.what)
        return f"from step {self.step} to {where}, without {rows} ({what})"


def named(rows: Sequence[int]) -> str:
    """Rows, by their positions."""
    listed = first_few([str(row) for row in rows], ", ")
    return f"row {listed}" if len(rows) == 1 else f"rows {listed}"


def decided_since(rewinds: Iterable[Rewind], attempt: int | None) -> tuple[Rewind, ...]:
    """Those that the state which an attempt starts with does not know of.

    Args:
        rewinds: of the run.
        attempt: that wrote the checkpoint; None: one of another run, or the beginning.
    """
    return tuple(r for r in rewinds if attempt is None or r.attempt >= attempt)


def left_out(
    before: Dealt | None, rewinds: Iterable[Rewind], rows: int, dataset: str | None, same_data: bool
) -> frozenset[int]:
    """The rows that an attempt does not deal. Of other data they mean nothing.

    Args:
        before: how the checkpoint that it starts with was dealt to; None: there is none.
        rewinds: what was decided since.
        rows: of the training set.
        dataset: its fingerprint.
        same_data: whether `before` tells of the same.
    """
    known = before.skipped if before and same_data and before.rows == rows else ()
    new = [r.rows for r in rewinds if r.of == rows and r.dataset == dataset]
    return frozenset(row for row in {*known, *chain(*new)} if 0 <= row < rows)


def why_not(rewinds: Sequence[Rewind], most: int, rows: Sequence[int], left: int) -> str | None:
    """Why the run cannot go back once more; None: it can.

    Args:
        rewinds: that it has made.
        most: that it may make (`max_rewinds`).
        rows: that would be left out; none: they are not known, or have been left out already.
        left: rows of the training set that are dealt now.
    """
    if len(rewinds) >= most:
        tried = "".join(f"\n        {rewind}" for rewind in rewinds)
        return f"max_rewinds: {most}" + (f" were tried:{tried}" if tried else "")
    if not rows:
        return "there is no row to leave out, and the same would happen again"
    if len(rows) >= left:
        return "no row would be left to train on"
    return None

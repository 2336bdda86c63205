"""Which rows an optimizer step has, and how processes share them out. Pure: no disk, no torch.

A run's trajectory is fixed by the rows of each step, not by who computes them. So the rows a step
stay the same on any number of processes, and the position in the data is counted in rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from keepstep.errors import KeepstepError
from keepstep.output.units import counted
from keepstep.policy.strict import TextError, build

MOST = 10**6  # of processes, of rows at once, of accumulated batches


class BatchError(KeepstepError, ValueError):
    """Rows cannot be shared out as they have to be.

    Attributes:
        rows: of a step, or of the data.
        processes: that cannot share them out evenly; None: it is not about that.
    """

    def __init__(self, text: str, rows: int, processes: int | None = None) -> None:
        super().__init__(text)
        self.rows = rows
        self.processes = processes


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step: `per_device` at once, `accumulation` times, on each of
    `world_size` processes."""

    per_device: int
    accumulation: int
    world_size: int

    @property
    def rows(self) -> int:
        return self.per_device * self.accumulation * self.world_size

    def __str__(self) -> str:
        parts = f"{self.world_size} x {self.per_device}"
        return f"{counted(self.rows, 'row')} a step ({parts}, {self.accumulation} accumulated)"


@dataclass(frozen=True)
class Dealt:
    """How a checkpoint's run had dealt out its rows, as the manifest says.

    Attributes:
        batch: of its steps.
        asked: what the recipe had asked for; another number of processes may have changed it.
        rows: of the training data (packed ones, if rows are packed); None for a stream.
        passes, done: of a stream: passes that are over, and steps of the next one that are done.
        drawn: of a stream that the run deals: rows of the pass that its steps had; None: the
            Trainer deals it.
        place: what the stream says of itself at that row, as JSON; empty: it cannot tell.
        shards: files (or parts of such) that it has.
        skipped: rows that are not dealt any more, as positions in the training data: see `Rewind`.
    """

    batch: Batch
    asked: Batch
    rows: int | None
    passes: int | None = None
    done: int | None = None
    drawn: int | None = None
    place: str = ""
    shards: int | None = None
    skipped: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Without `skipped`, where there are none: versions that do not know it read the rest."""
        values = asdict(self)
        return values if self.skipped else {n: v for n, v in values.items() if n != "skipped"}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Dealt | None:
        """What `as_json` gave; None of an empty one.

        Raises:
            TextError: it is not that.
        """
        if not values:
            return None
        dealt: Dealt = build(Dealt, values, "dealt")
        for batch in (dealt.batch, dealt.asked):
            counts = (batch.per_device, batch.accumulation, batch.world_size)
            if not all(1 <= count <= MOST for count in counts):
                raise TextError(f"dealt: {batch} cannot be")
        if dealt.rows is not None and dealt.rows < 1:
            raise TextError(f"dealt.rows is {dealt.rows}")
        counts = (dealt.passes or 0, dealt.done or 0, dealt.drawn or 0)
        if min(counts) < 0:
            told = "dealt has {} passes, {} steps, {} rows".format(*counts)
            raise TextError(told)
        if dealt.skipped and not 0 <= min(dealt.skipped) <= max(dealt.skipped) < (dealt.rows or 0):
            raise TextError(f"dealt.skipped has rows that are none of {dealt.rows}")
        return dealt


def process_counts(rows: int) -> list[int]:
    """The numbers of processes that can share out `rows` evenly."""
    return [count for count in range(1, rows + 1) if rows % count == 0]


def agree(before: Dealt | None, asked: Batch, allow_change: bool = False) -> Batch:
    """The batch of an attempt that goes on from a checkpoint; `asked`: what its recipe says.

    The rows a step stay what they were when the number of processes has changed (or had been
    changed before): accumulation makes up for it. `per_device` stays where it divides, else the
    largest divisor below it is taken: more rows at once may not fit in memory.

    Raises:
        BatchError: they cannot be shared out evenly, and `allow_change` does not accept others.
    """
    if before is None or asked.rows == before.batch.rows:
        return asked
    resized = asked.world_size != before.batch.world_size
    if not resized and replace(asked, world_size=before.asked.world_size) != before.asked:
        return asked  # the recipe itself has changed: that is drift, and seen as such
    rows = before.batch.rows
    share, rest = divmod(rows, asked.world_size)
    if not rest:
        return _shared(share, asked)
    nearest = _shared(max(1, round(rows / asked.world_size)), asked)
    if allow_change:
        return nearest
    fitting = process_counts(rows)
    raise BatchError(
        f"a step of {counted(rows, 'row')} cannot be shared out evenly among "
        f"{counted(asked.world_size, 'process')}\n"
        f"    Hint: launch {_or(fitting)} process{'' if fitting == [1] else 'es'}; or "
        f"accept {nearest}: allow_batch_change: true",
        rows=rows,
        processes=asked.world_size,
    )


def _shared(share: int, asked: Batch) -> Batch:
    per_device = max(n for n in range(1, asked.per_device + 1) if share % n == 0)
    return Batch(per_device, share // per_device, asked.world_size)


@dataclass(frozen=True)
class Course:
    """Which rows each step has: `per_step` after `per_step` of an epoch's order, then what is left.

    Attributes:
        rows: of the training data.
        per_step: rows of a full step.
        drop_last: leave out what does not fill an epoch's last step.

    Raises:
        BatchError: there are no rows.
    """

    rows: int
    per_step: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise BatchError("there are no rows to train on", rows=0)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self._steps(self.rows))

    def start(self, samples: int) -> tuple[int, int, int]:
        """Where a run that has drawn `samples` goes on: (epoch, steps of it that are done, shift).

        The epoch's step `s` begins with its row `s * per_step + shift`. Only after a change of
        `per_step` in mid-epoch is the shift not 0: steps done then stand for rows drawn.
        """
        epoch, offset = divmod(samples, self.rows)
        done = self.steps_per_epoch - max(1, self._steps(self.rows - offset))
        return epoch, done, offset - done * self.per_step

    def after(self, samples: int, steps: int) -> int:
        """Rows drawn when a run that had drawn `samples` has made `steps` more."""
        epoch, done, shift = self.start(samples)
        more, done = divmod(done + steps, self.steps_per_epoch)
        return (epoch + more) * self.rows + done * self.per_step + (0 if more else shift)

    def share(self, step: int, shift: int, batch: Batch, rank: int) -> list[range]:
        """A rank's rows in an epoch's step: one range of places in the order per micro-batch.

        Those of a full step lie as in a sampler that deals a micro-batch to each rank in turn; of
        a smaller one every cell gets as many as the next, give or take one, or none.
        """
        return share_of(self.places(step, shift), batch, rank)

    def places(self, step: int, shift: int) -> range:
        """An epoch's step's places in the order."""
        begin = max(0, step * self.per_step + shift)
        return range(begin, max(begin, min(self.rows, (step + 1) * self.per_step + shift)))

    def weights(self, step: int, shift: int, batch: Batch, rank: int) -> list[float]:
        """See `weights_of`."""
        return weights_of(self.places(step, shift), batch, rank)

    def _steps(self, rows: int) -> int:
        return rows // self.per_step if self.drop_last else math.ceil(rows / self.per_step)


def share_of(places: Any, batch: Batch, rank: int) -> list[Any]:
    """A rank's part of a step's places or rows, a slice of them per micro-batch: see
    `Course.share`."""
    count, cells = len(places), batch.accumulation * batch.world_size
    numbers = [turn * batch.world_size + rank for turn in range(batch.accumulation)]
    return [places[count * n // cells : count * (n + 1) // cells] for n in numbers]


def weights_of(places: Sequence[int], batch: Batch, rank: int) -> list[float]:
    """What the mean over each of a rank's micro-batches counts for in the mean over the step's
    rows: 1 where all have the same number of rows, 0 for one without any."""
    cells, rows = batch.accumulation * batch.world_size, max(1, len(places))
    return [len(share) * cells / rows for share in share_of(places, batch, rank)]


def _or(counts: Sequence[int]) -> str:
    shown = [str(count) for count in counts]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)

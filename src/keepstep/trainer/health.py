"""Whether every rank's losses and gradient norms are finite, and no spikes: looked at with nobody
waiting.

A step's numbers are copied to the host while training goes on. What they say goes around with the
next step's question (see `pacing`), so a step is judged one step later, on a GPU two; and before
a checkpoint is made, all that are still on their way. So nothing of a step that is not finite, or a
spike that is not ignored, is committed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import Any

import torch

from keepstep.errors import KeepstepError
from keepstep.policy.health import Offence, What, goes_back, stopped
from keepstep.policy.rewind import why_not
from keepstep.policy.spikes import Spike, SpikeWatch
from keepstep.ranks import collectives
from keepstep.run_folder.writer import RunWriter
from keepstep.trainer.protocol import CheckpointedTrainer
from keepstep.trainer.step_numbers import Ended, Numbers

logger = logging.getLogger(__name__)

NOTHING = -1.0  # in the place of a norm that is not known


class SpoiltError(KeepstepError, ArithmeticError):
    """A step has spoilt the run, which ends for it.

    Attributes:
        step: which.
        ranks: whose loss it was; empty: nobody's in particular.
    """


class NonFiniteError(SpoiltError):
    """A loss, a gradient norm or the weights are not finite, and the run is to stop for it."""


class SpikeError(SpoiltError):
    """A loss or a gradient norm is a spike, and the run is to stop for it."""


class RewindError(SpoiltError):
    """The run goes back: the next attempt goes on from before this step. The model in memory is
    spoilt.

    Attributes:
        asked: who has asked for a stop meanwhile; empty: nobody.
    """

    asked = ""


class Health:
    """Judges steps, the same on every rank.

    Attributes:
        is_finite: whether the state is, as far as it was looked at: before each save.
    """

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.is_finite = True
        self._trainer = trainer
        self._now: Numbers | None = None
        self._ended: deque[Ended] = deque()
        self._free: list[Numbers] = []
        self._asked: Ended | None = None
        self._spikes: SpikeWatch | None = None
        self._trusts_steps = True  # all of them were finite, their gradient norms, too
        self._doubtful: int | None = None  # the step judged last, if its gradient is not known
        self._ignored = False  # the step that was judged last had to be
        self._is_spike = False  # it was one
        self._bad_losses = 0  # of steps that were judged

    def begin(self) -> None:
        """Set memory aside, before the first step. Ranks: any."""
        self._trainer.saving.note_steps()
        self._free = [self._made() for _ in range(3)]
        start, args = self._trainer.start, self._trainer.args
        known = {} if start is None else start.manifest.health
        self._trusts_steps = bool(known.get("finite", True))
        if args.spike_sigma is not None:
            window = known.get("window") or ()
            self._spikes = SpikeWatch(args.spike_sigma, args.spike_window, window)

    def described(self) -> dict[str, Any]:
        """What a manifest holds of it. Ranks: any; the same everywhere."""
        window = {} if self._spikes is None else {"window": self._spikes.window}
        return {"finite": self.is_finite, **window}

    def add_loss(self, loss: torch.Tensor) -> None:
        """Of a micro-batch: it stays on the device. Ranks: any."""
        if self._now is None:
            self._now = self._free.pop() if self._free else self._made()
            self._now.clear()
        self._now.add_loss(loss)

    def set_grad_norm(self, norm: Any) -> None:
        """Of the step. Ranks: any."""
        if self._now is not None:
            self._now.set_grad_norm(norm)

    def step_ended(self, step: int) -> None:
        """Its numbers are to be judged. Ranks: any."""
        if self._now is not None:
            self._now.ended()
            self._ended.append(Ended(step, self._now, self._trainer.is_without_rows))
            self._now = None

    def bad_losses(self) -> int:
        """How many steps of this attempt had a loss that is not finite: of those that are still to
        be judged, on this rank. Waits for the device. Ranks: any."""
        for ended in self._ended:
            ended.numbers.wait()
        return self._bad_losses + sum(not math.isfinite(e.numbers.loss) for e in self._ended)

    def tell(self, all_of_it: bool = False) -> tuple[list[bool], list[float]]:
        """What this rank says in the next question: whether a loss is not finite, and whether the
        gradient norm; where spikes are looked for, its share of the step's loss and norm, too, to
        be added up. Nothing, if no step is over. Ranks: any; `hear` follows.

        Args:
            all_of_it: also of the newest step, whose numbers a GPU may still be computing.
        """
        behind = len(self._ended) > (1 if self._ended and self._ended[0].numbers.pinned else 0)
        self._asked = self._ended.popleft() if behind or (all_of_it and self._ended) else None
        if self._asked is None:
            return [False, False], [] if self._spikes is None else [0.0, 0.0]
        numbers = self._asked.numbers
        numbers.wait()  # for what came before the step under way: its end is over on the device
        loss, norm = numbers.loss, numbers.norm
        flags = [not math.isfinite(loss), not self._norm_is_finite(norm)]
        if self._spikes is None:
            return flags, []
        if norm is None or not math.isfinite(norm):
            norm = NOTHING
        mean = 0.0 if flags[0] else loss / collectives.world_size()
        return flags, [mean, norm if collectives.is_main() else 0.0]

    def hear(self, loss: bool, norm: bool, *told: float) -> None:
        """What came of it, on all ranks. Ranks: all (collective where a step spoils the run).

        Raises:
            SpoiltError: on every rank: what was asked about ends the run.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return
        numbers, ignored, self._ignored = asked.numbers, self._ignored, loss or norm
        self._bad_losses += loss
        was_spike, self._is_spike = self._is_spike, False
        known = numbers.norm is not None or self._is_scaled
        self._trusts_steps &= not (loss or norm) and known
        doubtful, self._doubtful = self._doubtful, None if known else asked.step
        if loss or norm:
            offence = self._offence(asked.step, "loss" if loss else "gradient norm", numbers)
            self._follow(self._of_step_before(offence, doubtful, numbers), tell=not ignored)
        elif (spike := self._spike_of(asked, told)) is not None:
            self._is_spike = True
            rows = self._trainer.rows_of(asked.step, None)
            offence = Offence(asked.step, spike.what, rows=tuple(rows), spike=spike)
            self._follow(offence, tell=not was_spike)
        self._free.append(numbers)

    def settle(self) -> None:
        """Judge every step up to this one, and the state if need be. Ranks: all (collective).

        Raises:
            SpoiltError: see `hear`; or the weights are not finite.
        """
        if self._asked is not None:  # its answer has not been fetched yet: it is asked again
            self._ended.appendleft(self._asked)
        while self._ended:
            flags, totals = self.tell(all_of_it=True)
            self.hear(*collectives.ask(*flags, totals=totals)())
        self.is_finite, self._doubtful = True, None
        if self._trusts_steps:
            return
        (bad,) = collectives.any_of(not weights_are_finite(self._trainer.model))
        self.is_finite = not bad
        if bad and not self._ignored:
            step = self._trainer.state.global_step
            self._follow(self._offence(step, "weights", None), tell=True)
            self._ignored = True

    @property
    def _is_scaled(self) -> bool:
        """Whether a gradient may be infinite: its step is skipped then (a loss scaler's way)."""
        return bool(self._trainer.args.fp16)

    def _norm_is_finite(self, norm: float | None) -> bool:
        return self._is_scaled or norm is None or math.isfinite(norm)

    def _made(self) -> Numbers:
        args = self._trainer.args
        return Numbers(args.gradient_accumulation_steps, args.device)

    def _spike_of(self, asked: Ended, told: tuple[float, ...]) -> Spike | None:
        """Ranks: any; the same everywhere: so is `told`."""
        if self._spikes is None or asked.is_without_rows:
            return None
        loss, norm = told
        return self._spikes.judge(loss, None if norm == NOTHING else norm)

    def _offence(self, step: int, what: What, numbers: Numbers | None) -> Offence:
        """Whose it was, and which rows. Ranks: all (collective)."""
        mine: dict[int, str] | None = None
        if what == "loss" and numbers is not None:
            losses = enumerate(numbers.losses)
            mine = {turn: str(loss) for turn, loss in losses if not math.isfinite(loss)} or None
        told = collectives.gather_some(mine)
        cells = {rank: [*turns] for rank, turns in told.items()}
        values = {rank: next(iter(turns.values())) for rank, turns in told.items()}
        if what == "gradient norm" and numbers is not None:
            values = {0: str(numbers.norm)}
        rows = self._trainer.rows_of(step, cells or None)
        return Offence(step, what, tuple(sorted(cells)), tuple(rows), values)

    def _of_step_before(self, offence: Offence, before: int | None, numbers: Numbers) -> Offence:
        """Where a gradient's norm is not known (DeepSpeed's stage 0), a bad one is seen by what
        comes of it: no loss of the next step is finite. Ranks: any; the same everywhere.

        Args:
            before: the step before, if that was not known of it.
        """
        if before is None or offence.what != "loss":
            return offence
        everybody = len(offence.ranks) == collectives.world_size()
        if not everybody or offence.rows != tuple(self._trainer.rows_of(offence.step, None)):
            return offence
        rows = self._trainer.rows_of(before, None)
        if collectives.world_size() == numbers.count == 1:  # it may as well be this step's own
            rows = sorted({*rows, *offence.rows})
        return Offence(before, "weights", rows=tuple(rows), values=offence.values)

    def _follow(self, offence: Offence, tell: bool) -> None:
        """Do what the recipe says. Ranks: all (collective).

        Raises:
            SpoiltError: the run ends for it.
        """
        args, on_main = self._trainer.args, self._trainer.manager.saver.on_main
        action = args.on_nonfinite if offence.spike is None else args.on_spike
        if action == "ignore":
            if tell:  # of a series of steps the first
                on_main("recording", lambda writer: _record(writer, offence, action))
                if collectives.is_main():
                    logger.warning("%s\n    %s: ignore: training goes on.", offence, offence.option)
            return
        self._trainer.hear()  # a save that is on its way arrives first
        kind = NonFiniteError if offence.spike is None else SpikeError
        why, text = on_main("going back", lambda writer: self._decide(writer, offence, action))
        if action == "rewind" and why is None:
            raise RewindError(text, step=offence.step, ranks=offence.ranks)
        raise kind(text, step=offence.step, ranks=offence.ranks)

    def _decide(self, writer: RunWriter, offence: Offence, action: str) -> tuple[str | None, str]:
        """Main process: write down what follows; why the run does not go back (None: it does, or
        was not to), and what is said."""
        step = self._newest_saved()
        if action == "stop":
            _record(writer, offence, action)
            return None, stopped(offence, step)
        trainer, tried = self._trainer, writer.run.rewinds()
        course, most = trainer.rows.course, trainer.args.max_rewinds
        left = 0 if course is None else course.rows - len(trainer.rows.skipped)
        why = why_not(tried, most, offence.rows, left)
        if why is None:
            assert course is not None
            writer.record(
                "rewind",
                step=offence.step,
                to=step or 0,
                what=offence.fault,
                rows=list(offence.rows),
                of=course.rows,
                dataset=trainer.settings.get("dataset"),
            )
            if len(writer.run.rewinds()) == len(tried):  # the next attempt would not know of it
                why = "that could not be written down"
        _record(writer, offence, "rewind" if why is None else "stop")
        if why is not None:
            return why, stopped(offence, step, why)
        return None, goes_back(offence, step or 0, len(tried) + 1, most)

    def _newest_saved(self) -> int | None:
        """The newest step of this branch that has a checkpoint. Ranks: any; the same everywhere."""
        saved, start = self._trainer.last_saved, self._trainer.start
        if saved is not None:
            return saved.checkpoint.step
        return None if start is None else start.step


def _record(writer: RunWriter, offence: Offence, action: str) -> None:
    facts = {"step": offence.step, "what": offence.what, "rows": list(offence.rows)}
    if offence.spike is None:
        writer.record("nonfinite", ranks=list(offence.ranks), action=action, **facts)
    else:
        writer.record("spike", value=offence.spike.value, action=action, **facts)


def weights_are_finite(model: Any) -> bool:
    """Whether what this rank holds of the trained weights is. It waits for the device. Ranks: any,
    each for itself."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [getattr(p, "ds_tensor", p).detach() for p in trained]  # under ZeRO-3 its share
    found = [part.isfinite().all() for part in parts if part.numel()]
    return all(bool(finite) for finite in found)

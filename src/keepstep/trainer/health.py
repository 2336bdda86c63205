"""Whether every rank's losses and gradient norms are finite: looked at with nobody waiting.

A step's numbers are copied to the host while training goes on. What they say goes around with the
next step's question (see `pacing`), so a step is judged one step later, on a GPU two; and before
a checkpoint is made, all that are still on their way. So nothing that is not finite is committed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepstep.errors import KeepstepError
from keepstep.policy.health import Action, Offence, What, stopped
from keepstep.ranks import collectives
from keepstep.run_folder.writer import RunWriter
from keepstep.trainer.protocol import CheckpointedTrainer

logger = logging.getLogger(__name__)


class NonFiniteError(KeepstepError, ArithmeticError):
    """A loss, a gradient norm or the weights are not finite, and `on_nonfinite` says to stop.

    Attributes:
        step: in which that was.
        ranks: whose loss it was; empty: nobody's in particular.
    """


class Numbers:
    """What a step is judged by, on its way to the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        """
        Args:
            size: losses that are expected; more are taken, too.
        """
        self.pinned = device.type != "cpu"
        self.count, self.grad_norm = 0, False
        self._event: Any = None
        self._device = device
        self._make(size + 1)

    def _make(self, size: int) -> None:
        if self.pinned:
            self._tensor = torch.empty(size, pin_memory=True)
            self._seen = self._tensor.numpy()
        else:
            self._seen = np.empty(size, dtype=np.float32)
            self._tensor = torch.from_numpy(self._seen)

    def clear(self) -> None:
        self.count, self.grad_norm = 0, False

    def add_loss(self, loss: torch.Tensor) -> None:
        """Of one micro-batch. Ranks: any."""
        if self.count + 1 >= len(self._tensor):
            self.wait()
            before = self._seen[1 : self.count + 1].copy()
            self._make(2 * len(self._tensor))
            self._seen[1 : self.count + 1] = before
        self.count += 1
        self._tensor[self.count].copy_(loss.detach(), non_blocking=True)

    def set_grad_norm(self, norm: Any) -> None:
        self.grad_norm = norm is not None
        if isinstance(norm, torch.Tensor):
            self._tensor[0].copy_(norm.detach(), non_blocking=True)
        elif norm is not None:
            self._seen[0] = norm

    def ended(self) -> None:
        """Nothing is added any more."""
        if self.pinned:
            self._event = torch.Event(self._device)
            self._event.record()

    def wait(self) -> None:
        """Until all of it is on the host."""
        if self.pinned:
            if self._event is None:
                self.ended()
            self._event.synchronize()
            self._event = None

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in self._seen[1 : self.count + 1]]

    @property
    def norm(self) -> float | None:
        return float(self._seen[0]) if self.grad_norm else None


@dataclass(frozen=True)
class Ended:
    """A step that is over, and to be judged."""

    step: int
    numbers: Numbers


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
        self._trusts_steps = True  # all of them were finite, their gradient norms, too
        self._ignored = False  # the step that was judged last had to be

    def begin(self) -> None:
        """Set memory aside, before the first step. Ranks: any."""
        self._trainer.saving.note_steps()
        self._free = [self._made() for _ in range(3)]
        start = self._trainer.start
        if start is not None:
            self._trusts_steps = bool(start.manifest.health.get("finite", True))

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
            self._ended.append(Ended(step, self._now))
            self._now = None

    def tell(self, all_of_it: bool = False) -> tuple[bool, bool]:
        """What this rank says in the next question: whether a loss is not finite, and whether the
        gradient norm. Nothing, if no step is over. Ranks: any; `hear` follows.

        Args:
            all_of_it: also of the newest step, whose numbers a GPU may still be computing.
        """
        behind = len(self._ended) > (1 if self._ended and self._ended[0].numbers.pinned else 0)
        self._asked = self._ended.popleft() if behind or (all_of_it and self._ended) else None
        if self._asked is None:
            return False, False
        numbers = self._asked.numbers
        numbers.wait()  # for what came before the step under way: its end is over on the device
        return not all(map(math.isfinite, numbers.losses)), not self._norm_is_finite(numbers)

    def hear(self, loss: bool, norm: bool) -> None:
        """What came of it, on all ranks. Ranks: all (collective where something is not finite).

        Raises:
            NonFiniteError: on every rank: it is not, and the run is to stop.
        """
        asked, self._asked = self._asked, None
        if asked is None:
            return
        numbers, ignored, self._ignored = asked.numbers, self._ignored, loss or norm
        self._trusts_steps &= not (loss or norm) and (numbers.norm is not None or self._is_scaled)
        if loss or norm:
            offence = self._offence(asked.step, "loss" if loss else "gradient norm", numbers)
            if self._stops(offence, tell=not ignored):
                raise self._error(offence)
        self._free.append(numbers)

    def settle(self) -> None:
        """Judge every step up to this one, and the state if need be. Ranks: all (collective).

        Raises:
            NonFiniteError: see `hear`; or the weights are not finite.
        """
        if self._asked is not None:  # its answer has not been fetched yet: it is asked again
            self._ended.appendleft(self._asked)
        while self._ended:
            self.hear(*collectives.any_of(*self.tell(all_of_it=True)))
        self.is_finite = True
        if self._trusts_steps:
            return
        (bad,) = collectives.any_of(not weights_are_finite(self._trainer.model))
        self.is_finite = not bad
        if bad and not self._ignored:
            offence = self._offence(self._trainer.state.global_step, "weights", None)
            if self._stops(offence, tell=True):
                raise self._error(offence)
            self._ignored = True

    @property
    def _is_scaled(self) -> bool:
        """Whether a gradient may be infinite: its step is skipped then (a loss scaler's way)."""
        return bool(self._trainer.args.fp16)

    def _norm_is_finite(self, numbers: Numbers) -> bool:
        return self._is_scaled or numbers.norm is None or math.isfinite(numbers.norm)

    def _made(self) -> Numbers:
        args = self._trainer.args
        return Numbers(args.gradient_accumulation_steps, args.device)

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

    def _stops(self, offence: Offence, tell: bool) -> bool:
        """Write it down; returns whether the run ends for it. Ranks: all (collective)."""
        action = self._trainer.args.on_nonfinite
        if action == "ignore" and not tell:
            return False  # a step of a series: its first was told
        self._trainer.manager.saver.on_main("recording", lambda w: _record(w, offence, action))
        if action == "ignore" and collectives.is_main():
            logger.warning("%s\n    on_nonfinite: ignore: training goes on.", offence)
        return bool(action == "stop")

    def _error(self, offence: Offence) -> NonFiniteError:
        """Ranks: all (collective): a save that is on its way arrives first."""
        self._trainer.hear()
        latest = collectives.on_main(
            "looking up the newest checkpoint", lambda: self._trainer.manager.run.latest()
        )
        text = stopped(offence, None if latest is None else latest.step)
        return NonFiniteError(text, step=offence.step, ranks=offence.ranks)


def _record(writer: RunWriter, offence: Offence, action: Action) -> None:
    writer.record(
        "nonfinite",
        step=offence.step,
        what=offence.what,
        ranks=list(offence.ranks),
        rows=list(offence.rows),
        action=action,
    )


def weights_are_finite(model: Any) -> bool:
    """Whether what this rank holds of the trained weights is. It waits for the device. Ranks: any,
    each for itself."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [getattr(p, "ds_tensor", p).detach() for p in trained]  # under ZeRO-3 its share
    found = [part.isfinite().all() for part in parts if part.numel()]
    return all(bool(finite) for finite in found)

"""What a step is judged by, copied to the host while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
    def loss(self) -> float:
        """This rank's of the step: not finite where one of a micro-batch is not."""
        return sum(self.losses)

    @property
    def norm(self) -> float | None:
        return float(self._seen[0]) if self.grad_norm else None


@dataclass(frozen=True)
class Ended:
    """A step that is over, and to be judged.

    Attributes:
        step: its number, counted from 1.
        numbers: its own.
        is_without_rows: it had none: they are left out. Its loss is 0.
    """

    step: int
    numbers: Numbers
    is_without_rows: bool = False

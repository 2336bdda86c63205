"""Spikes: a loss or a gradient norm far above those of the steps before. Pure.

A value is a spike when it lies more than `sigma` standard deviations above the mean of the window:
the newest steps that were none. Every rank judges the same numbers, so all judge alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# Of a window whose values are all the same: what is a deviation then, as a share of their mean.
LEAST_DEVIATION = 1e-3

Numbers = tuple[float, float | None]  # a step's loss; its gradient norm, None: not known
NAMES: tuple[Literal["loss", "gradient norm"], ...] = ("loss", "gradient norm")


@dataclass(frozen=True)
class Spike:
    """What was seen.

    Attributes:
        what: which number it is.
        value: of the step.
        limit: that it is above.
        mean: of the window.
    """

    what: Literal["loss", "gradient norm"]
    value: float
    limit: float
    mean: float


class SpikeWatch:
    """Judges one step after the other, from the moment on at which the window is full.

    Spikes do not enter the window: a second one would hide behind the first. But when as many in
    a row as the window has steps were let pass, it is a new level, and the window begins anew.
    """

    def __init__(self, sigma: float, steps: int, known: Iterable[Sequence[float | None]] = ()):
        """
        Args:
            sigma: how many standard deviations above the mean is a spike.
            steps: of the window.
            known: what `window` was when the run's state was saved.
        """
        self._sigma, self._steps = sigma, steps
        self._window: deque[Numbers] = deque(maxlen=steps)
        self._in_a_row = 0
        self._window.extend((float(loss or 0.0), norm) for loss, norm in known)

    @property
    def window(self) -> list[Numbers]:
        """Of the newest steps, as JSON holds it: a run that carries on goes on with it."""
        return list(self._window)

    def judge(self, loss: float, norm: float | None) -> Spike | None:
        """Whether a step is a spike; if not, it counts for those to come.

        Args:
            loss: finite: the mean over all ranks.
            norm: of its gradient; None: not known, or it was no number.
        """
        spike = self._seen(loss, norm) if len(self._window) == self._steps else None
        self._in_a_row = self._in_a_row + 1 if spike else 0
        if self._in_a_row >= self._steps:
            self._window.clear()
            self._in_a_row = 0
        if spike is None:
            self._window.append((loss, norm))
        return spike

    def _seen(self, loss: float, norm: float | None) -> Spike | None:
        for i, value in enumerate((loss, norm)):
            found = (numbers[i] for numbers in self._window)
            known = [number for number in found if number is not None]
            if value is None or len(known) < self._steps:
                continue
            mean = statistics.fmean(known)
            deviation = math.sqrt(statistics.fmean((v - mean) ** 2 for v in known))
            limit = mean + self._sigma * max(deviation, LEAST_DEVIATION * abs(mean))
            if value > limit:
                return Spike(NAMES[i], value, limit, mean)
        return None

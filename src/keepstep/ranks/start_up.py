"""Where the time goes between the start of a process and its first step."""

from __future__ import annotations

import os
import time

from keepstep.ranks.processes import stat_of


class StartUp:
    """Seconds of each part of a start. Ranks: any, each its own.

    In `keepstep.train` in this order: `imports`, `recipe` (with the process group and preflight),
    `inputs` (rows and tokenizer), `choice` (of the checkpoint, every byte compared), `model`,
    `engine` (optimizer and DeepSpeed), `restore`, `first_step` (with the rehearsal of a save).
    What lies between the ends of two parts is the time of the later one; of a part that comes
    twice, the sum.
    """

    def __init__(self, began: float) -> None:
        """
        Args:
            began: when the process began, as `now()` tells it.
        """
        self.seconds: dict[str, float] = {}
        self._since = began

    def ended(self, part: str) -> None:
        """That part of the start is over."""
        moment = now()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + moment - self._since, 3)
        self._since = moment


def now() -> float:
    """Seconds since the machine's boot, of which the kernel tells when a process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def began() -> float:
    """When this process began, to a hundredth of a second."""
    return int(stat_of(os.getpid())[1]) / os.sysconf("SC_CLK_TCK")


own_start = StartUp(began())

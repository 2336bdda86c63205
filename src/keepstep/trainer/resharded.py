"""What it took to give a checkpoint's state to other processes than wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepstep.policy.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class Resharded:
    """A checkpoint's state, given to other processes than wrote it.

    Attributes:
        step: of the checkpoint.
        before: the processes that wrote it.
        now: those that have it now.
        bytes: read by all ranks together.
        seconds: from the first file opened to the state loaded, on the slowest rank.
    """

    step: int
    before: ParallelLayout
    now: ParallelLayout
    bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        return round(self.bytes / max(self.seconds, 1e-9) / 1e9, 3)

    def as_json(self) -> dict[str, Any]:
        """The facts of its event."""
        return {
            "step": self.step,
            "from_processes": self.before.world_size,
            "from_stage": self.before.zero_stage,
            "to_processes": self.now.world_size,
            "to_stage": self.now.zero_stage,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "from_deepspeed": self.before.deepspeed,
            "to_deepspeed": self.now.deepspeed,
            "gb_per_s": self.gb_per_s,
        }

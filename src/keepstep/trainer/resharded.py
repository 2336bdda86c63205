"""What it took to give a checkpoint's state to other processes than wrote it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Resharded:
    """A checkpoint's state, given to other processes than wrote it.

    Attributes:
        step: of the checkpoint.
        from_processes, from_stage, from_deepspeed: that wrote it (stage 0: nothing is sharded).
        to_processes, to_stage, to_deepspeed: that have it now.
        bytes: read by all ranks together.
        seconds: from the first file opened to the state loaded, on the slowest rank.
    """

    step: int
    from_processes: int
    from_stage: int
    to_processes: int
    to_stage: int
    bytes: int
    seconds: float
    from_deepspeed: bool = False
    to_deepspeed: bool = False

    @property
    def gb_per_s(self) -> float:
        return round(self.bytes / max(self.seconds, 1e-9) / 1e9, 3)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"gb_per_s": self.gb_per_s}

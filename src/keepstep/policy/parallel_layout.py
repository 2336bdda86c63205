"""How many processes hold a run's state, and how it is shared out among them. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """How many processes hold a run's state, and how it is shared out: printed as `2 x ZeRO-3`.

    Of two that are equal, one loads what the other has saved as it is.

    Attributes:
        world_size: processes (ranks).
        zero_stage: DeepSpeed's ZeRO stage: 1 shards the optimizer's state, 2 the gradients, too, 3
            the parameters, too; 0: nothing is sharded.
        deepspeed: whether DeepSpeed has the state. At stage 0 it may be plain PyTorch: DDP, or a
            single process. Above that it is always DeepSpeed, whatever is given.
    """

    world_size: int
    zero_stage: int = 0
    deepspeed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "deepspeed", self.deepspeed or self.zero_stage > 0)

    @property
    def strategy(self) -> str:
        """How it is shared out: `ZeRO-<stage>`, or `DDP`."""
        return f"ZeRO-{self.zero_stage}" if self.deepspeed else "DDP"

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has all of it."""
        return self.zero_stage > 0

    def __str__(self) -> str:
        return f"{self.world_size} x {self.strategy}"

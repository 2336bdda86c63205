"""The main job, which may kill itself: `python -m benchmarks.gpu.killed PHASE STEP [fields]`.

PHASE: `step`, at the end of that step; `write`, in the background thread that writes that step's
checkpoint, once a part of it is on the disk; `none`: it trains to its end. Kernels whose sums come
out in another order each time are replaced by those that torch has in their place: without that no
two runs on a GPU are the same, interrupted or not.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from keepstep import train
from keepstep.ranks import signals
from keepstep.save.rank_part import Part
from keepstep.trainer.sft import KeepstepTrainer

finish = Part.finish


def die(phase: str, step: int) -> None:
    print(f"killed in {phase} {step}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def install(phase: str, step: int) -> None:
    """Have the process killed at that moment."""

    class Killed(KeepstepTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if phase == "step" and self.state.global_step == step:
                die(phase, step)
            return super().training_step(*args, **kwargs)

    def finish_killed(part: Part) -> None:
        if phase == "write" and part.folder.name == f"checkpoint-{step}" and part._later:
            part.attempt(part._later[0])
            die(phase, step)
        finish(part)

    train.KeepstepTrainer = Killed  # type: ignore[misc]
    Part.finish = finish_killed  # type: ignore[method-assign, assignment]


def main(phase: str, step: str, *argv: str) -> int:
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It costs time, and hides nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    install(phase, int(step))
    signals.install_handlers()
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

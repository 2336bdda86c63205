"""The main job with saves that fail: last_save.py FAULT [fields of the recipe].

FAULT: `read-only` (the disk, from the last step on), `for-a-moment` (until the save is tried
again), `mistake` (in a program, from step 2 on), `renamed` (a method that saves need is gone),
`callback` (one whose state is no JSON), `stop-at-4` (none; a TERM in step 4), `gone` (somebody
removes a file of the last checkpoint before the run ends).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from keepstep import train
from keepstep.ranks import collectives, signals
from keepstep.trainer.saving import Saving
from keepstep.trainer.sft import KeepstepTrainer
from keepstep.trainer.state import Contents

FAULT, *ARGV = sys.argv[1:]
DISK = Path(ARGV[ARGV.index("--output_dir") + 1]).parent
state_json, rest, finish = Contents._state_json, Saving._rest, Saving.finish


def remount(how: str) -> None:
    if collectives.is_main():
        subprocess.run(["mount", "-o", f"remount,{how}", DISK], check=True)


class ReadOnly(KeepstepTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == self.state.max_steps - 1:
            self.hear()
            remount("ro")
        return super().training_step(*args, **kwargs)


class Stopped(KeepstepTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3 and collectives.is_main():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(*args, **kwargs)


def rest_and_mend(self: Saving, seconds: float) -> bool:
    remount("rw")
    return rest(self, seconds)


def finish_and_lose(self: Saving) -> None:
    finish(self)
    if collectives.is_main():
        assert self.last_saved is not None
        (self.last_saved.checkpoint.path / "optimizer.pt").unlink()


def mistaken(self: Contents) -> bytes:
    if self.trainer.state.global_step == 2:
        raise KeyError("a name that is not there")
    return state_json(self)


class Odd(TrainerCallback, ExportableState):
    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seen": {1, 2}}}


class WithOdd(KeepstepTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Odd())


if FAULT in ("read-only", "for-a-moment"):
    train.KeepstepTrainer = ReadOnly  # type: ignore[misc]
if FAULT == "for-a-moment":
    Saving._rest = rest_and_mend  # type: ignore[method-assign]
elif FAULT == "stop-at-4":
    signals.install_handlers()
    train.KeepstepTrainer = Stopped  # type: ignore[misc]
elif FAULT == "gone":
    Saving.finish = finish_and_lose  # type: ignore[method-assign]
elif FAULT == "mistake":
    Contents._state_json = mistaken  # type: ignore[method-assign]
elif FAULT == "renamed":
    del Trainer._save_rng_state
elif FAULT == "callback":
    train.KeepstepTrainer = WithOdd  # type: ignore[misc]
sys.exit(train.main(ARGV))

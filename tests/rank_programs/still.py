"""The main job, in which a rank stands still: still.py WHERE:RANK:STEP:SECONDS,… [its fields].

WHERE: forward, loader (in the main thread), worker (of the loader; STEP counts batches),
evaluation, save (the snapshot), write (the files), callback (on_step_end), saved (on_save).
SECONDS 0: for ever. Where it begins with `eager,` a hang is called after twice the usual time.
No learnt bound counts before somebody stands still: on a busy machine steps may, and are no hang.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from keepstep import train
from keepstep.policy import standstill
from keepstep.ranks import collectives, signals
from keepstep.save.rank_part import Part
from keepstep.trainer.sft import KeepstepTrainer
from keepstep.trainer.state import Contents

WANTED, *ARGV = sys.argv[1:]
STILL = {
    (where, int(rank), int(step)): float(seconds) or None
    for where, rank, step, seconds in (
        each.split(":") for each in WANTED.removeprefix("eager,").split(",")
    )
}
OUTPUT = ARGV[ARGV.index("--output_dir") + 1]
SOMEBODY = Path(f"{OUTPUT}-{os.environ['MASTER_PORT']}.stands-still")  # in this launch
bound_of = standstill.Standstills._bound
if WANTED.startswith("eager,"):  # else what is slow on a busy machine is not slow enough
    standstill.TIMES_USUAL = 2


def stand_still(where: str, step: int) -> None:
    key = where, collectives.rank(), step
    if key in STILL:
        seconds = STILL.pop(key)
        SOMEBODY.touch()
        os.write(1, f"rank {key[1]} stands still: {where}, step {step}\n".encode())
        threading.Event().wait(seconds)


def bound(self: standstill.Standstills, phase: standstill.Phase) -> standstill.Bound:
    found = bound_of(self, phase)
    counts = not found.is_learnt or SOMEBODY.exists()
    return found if counts else standstill.Bound(self.most, phase, is_learnt=False)


class Collator:
    """In a loader's worker."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.batches = inner, multiprocessing.Value("i")  # a worker for each epoch

    def __call__(self, rows: Any) -> Any:
        with self.batches:
            self.batches.value += 1
        stand_still("worker", self.batches.value)
        return self.inner(rows)


class Callback(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stand_still("callback", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stand_still("saved", state.global_step)


class Still(KeepstepTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Callback())
        self.data_collator = Collator(self.data_collator)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        stand_still("loader", self.state.global_step)
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            stand_still("forward", self.state.global_step)
        return super().compute_loss(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        stand_still("evaluation", self.state.global_step)
        return super().prediction_step(*args, **kwargs)


store, finish = Contents.store, Part.finish


def store_still(self: Contents, part: Part) -> None:
    stand_still("save", self.trainer.state.global_step)
    store(self, part)


def finish_still(self: Part) -> None:
    name, _, step = self.folder.name.rpartition("-")
    if name == "checkpoint":
        stand_still("write", int(step))
    finish(self)


standstill.Standstills._bound = bound  # type: ignore[method-assign]
Contents.store = store_still  # type: ignore[method-assign]
Part.finish = finish_still  # type: ignore[method-assign]
train.KeepstepTrainer = Still  # type: ignore[misc]
signals.install_handlers()
sys.exit(train.main(ARGV))

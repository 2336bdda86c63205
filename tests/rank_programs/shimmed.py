"""The main job with something wrong with its saves: shimmed.py FAULT[+SECONDS] [its fields].

SECONDS: Slurm's job ends so long after training has begun, however long that took to begin.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from keepstep import train
from keepstep.ranks import collectives, signals
from keepstep.run_folder.storage import Storage
from keepstep.save import saver
from keepstep.save.failure import SaveError
from keepstep.save.rank_part import Part
from keepstep.save.saver import Saver
from keepstep.sharding.hf_weights import LayoutError
from keepstep.trainer import state
from keepstep.trainer.pacing import EveryStep
from keepstep.trainer.publish_callback import Publishing
from keepstep.trainer.sft import KeepstepTrainer
from tests.helpers.waiting import PATIENCE

FAULT, *ARGV = sys.argv[1:]
FAULT, _, SECONDS = FAULT.partition("+")
finish, write_at, replace = Part.finish, Storage.write_at, Storage.replace
save, settle, begin = Saver.save, Saver.settle, EveryStep.on_train_begin
BEGUN, AWAITED, REFUSED = (threading.Event() for _ in range(3))


def slow(self: Part) -> None:
    """Every part is written until somebody waits for it, and for two seconds more."""
    if self._later:
        print(f"rank {self.rank} writes {self.folder.name}", flush=True)
        BEGUN.set()
        if FAULT == "held" and self.folder.name != "checkpoint-4":
            time.sleep(PATIENCE)
        assert AWAITED.wait(PATIENCE)
        time.sleep(2)
    finish(self)


class Slow(KeepstepTrainer):
    """A step after a save begins when that is being written. `held`: the first such, when a stop
    was asked for; what is saved then is never written."""

    def training_step(self, *arguments: Any, **kwargs: Any) -> Any:
        if self.manager.saver.in_flight:
            assert BEGUN.wait(PATIENCE)
        if FAULT in ("asked", "held") and self.state.global_step == 4 and collectives.is_main():
            while signals.requested() is None:
                time.sleep(0.01)
        return super().training_step(*arguments, **kwargs)


def save_slowly(self: Saver, *arguments: Any) -> None:
    BEGUN.clear()
    AWAITED.clear()
    save(self, *arguments)


def settle_slowly(self: Saver) -> Any:
    AWAITED.set()
    return settle(self)


def stuck(self: Part) -> None:
    """The disk of rank 1 does not answer at step 4, until another save could not begin."""
    if self.rank == 1 and self.folder.name == "checkpoint-4":
        assert REFUSED.wait(PATIENCE)
    finish(self)


def save_though_stuck(self: Saver, manifest: Any, *arguments: Any) -> None:
    """Its time is short; that of the others is not, on a busy machine."""
    self.timeout = 1.5 if manifest.global_step == 4 else PATIENCE
    try:
        save(self, manifest, *arguments)
    except SaveError:
        REFUSED.set()
        raise


def full(self: Storage, path: Path, *arguments: Any) -> str:
    if collectives.rank() == 1 and path.parent.name == "checkpoint-4":
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_at(self, path, *arguments)


def speechless(self: Storage, path: Path, content: bytes) -> None:
    """Rank 1 cannot even say that its disk is full."""
    if path.parent.name == "checkpoint-4-reports" and path.name == "1.json":
        raise OSError(errno.ENOSPC, "No space left on device")
    replace(self, path, content)


class Evaluates(KeepstepTrainer):
    """An evaluation that takes a second a batch, and says that it begins."""

    def evaluate(self, *arguments: Any, **kwargs: Any) -> Any:
        print(f"evaluation of step {self.state.global_step} begins", flush=True)
        return super().evaluate(*arguments, **kwargs)

    def prediction_step(self, *arguments: Any, **kwargs: Any) -> Any:
        time.sleep(1)
        return super().prediction_step(*arguments, **kwargs)


class Longer(Evaluates):
    """One whose batches take longer and longer: it ends when a stop is heard, or not at all."""

    batches = 0

    def prediction_step(self, *arguments: Any, **kwargs: Any) -> Any:
        self.batches += 1
        time.sleep(0.2 * 1.4**self.batches)
        return KeepstepTrainer.prediction_step(self, *arguments, **kwargs)


class Published(KeepstepTrainer):
    """An evaluation begins when the push under way is over, however slow the machine is."""

    def evaluate(self, *arguments: Any, **kwargs: Any) -> Any:
        found = [c for c in self.callback_handler.callbacks if isinstance(c, Publishing)]
        push = next((c._publisher._push for c in found if c._publisher is not None), None)
        if push is not None:
            push.wait()
        return super().evaluate(*arguments, **kwargs)


def begin_a_job(self: EveryStep, *arguments: Any, **kwargs: Any) -> None:
    moment = time.time() + float(SECONDS)
    os.environ["SLURM_JOB_END_TIME"] = str(moment)
    if collectives.is_main():
        print(f"the job ends at {moment}", flush=True)
    begin(self, *arguments, **kwargs)


def unknown_layout(model: Any) -> Any:
    raise LayoutError("save_pretrained makes experts from other weights")


if FAULT in ("slow", "asked", "held"):
    Part.finish, Saver.settle = slow, settle_slowly  # type: ignore[method-assign]
    Saver.save = save_slowly  # type: ignore[method-assign, assignment]
    train.KeepstepTrainer = Slow  # type: ignore[misc]
elif FAULT == "stuck":
    Part.finish = stuck  # type: ignore[method-assign]
    Saver.save = save_though_stuck  # type: ignore[method-assign, assignment]
elif FAULT == "full":
    Storage.write_at = full  # type: ignore[method-assign, assignment]
elif FAULT == "speechless":
    Storage.replace = speechless  # type: ignore[method-assign]
elif FAULT == "little-memory":
    saver.free_host_memory = lambda: 5_000_000
elif FAULT == "evaluates":
    train.KeepstepTrainer = Evaluates  # type: ignore[misc]
elif FAULT == "longer":
    train.KeepstepTrainer = Longer  # type: ignore[misc]
elif FAULT == "published":
    train.KeepstepTrainer = Published  # type: ignore[misc]
elif FAULT == "gather":
    state.ask = unknown_layout
if SECONDS:
    EveryStep.on_train_begin = begin_a_job  # type: ignore[method-assign]
sys.exit(train.main(ARGV))

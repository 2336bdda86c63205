"""The main job, signalled in a given phase: stopped.py PHASE[@STEP] TARGET SIGNAL [its fields].

TARGET: a rank, `all`, or the `launcher`. Phases: tokenisation, forward, backward, evaluation, save,
write (in the background thread, which training waits for); STEP: after so many, 4, the first that
are saved, if none is named. `mirrored`: as forward, and no step begins before a copy to the mirror
is over that is under way: it has no core while training has one. `none`: nothing happens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from huggingface_hub import constants

from keepstep import train
from keepstep.ranks import collectives, signals
from keepstep.save.rank_part import Part
from keepstep.trainer.mirror_callback import Mirrored
from keepstep.trainer.sft import KeepstepTrainer
from keepstep.trainer.state import Contents
from tests.helpers.waiting import PATIENCE

WHERE, TARGET, SIGNAL, *ARGV = sys.argv[1:]
PHASE, _, AT = WHERE.partition("@")
STEP = int(AT or 4)
WRITES = threading.Event()  # and the signal is sent


def fire(phase: str, step: int = STEP) -> None:
    """The signal comes while this rank is in the middle of it."""
    if phase != PHASE or step != STEP:
        return
    number, rank = getattr(signal, SIGNAL), collectives.rank()
    if TARGET == "launcher" and signals.requested() is None:
        if rank == 0:
            print(f"{SIGNAL} in {phase} to the launcher", flush=True)
            os.kill(os.getppid(), number)
        time.sleep(1)  # until the launcher has passed it on
    elif TARGET in ("all", str(rank)):
        print(f"{SIGNAL} in {phase} to rank {rank}", flush=True)
        os.kill(os.getpid(), number)


class Stopped(KeepstepTrainer):
    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        fire("tokenisation")
        return super()._prepare_dataset(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        training = self.model.training
        if training:
            self._wait()
            fire("forward" if PHASE != "mirrored" else PHASE, self.state.global_step)
        loss = super().compute_loss(*args, **kwargs)
        if training and PHASE == "backward":
            loss.register_hook(lambda gradient: fire("backward", self.state.global_step))
        return loss

    def _wait(self) -> None:
        """For what goes on beside training, however long that takes on this machine."""
        if PHASE == "write" and self.state.global_step == STEP:
            assert WRITES.wait(PATIENCE)
        if PHASE == "mirrored":
            found = [c for c in self.callback_handler.callbacks if isinstance(c, Mirrored)]
            for mirroring in [c._mirroring for c in found if c._mirroring is not None]:
                mirroring.wait()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        fire("evaluation", self.state.global_step)
        return super().prediction_step(*args, **kwargs)


store, finish = Contents.store, Part.finish


def store_signalled(self: Contents, part: Part) -> None:
    fire("save", self.trainer.state.global_step)
    store(self, part)


def finish_signalled(self: Part) -> None:
    if self.folder.name == f"checkpoint-{STEP}" and self._later:
        fire("write")
        WRITES.set()
    finish(self)


Contents.store = store_signalled  # type: ignore[method-assign]
Part.finish = finish_signalled  # type: ignore[method-assign]
train.KeepstepTrainer = Stopped  # type: ignore[misc]
if "HF_ENDPOINT" in os.environ:  # the test's Hub: in a fork, its client was imported before
    constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], False
signals.install_handlers()
sys.exit(train.main(ARGV))

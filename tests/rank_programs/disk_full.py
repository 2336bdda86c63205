"""The main job on a small disk: disk_full.py RANK STEP LEFT UNTIL BALLAST [fields of the recipe].

When RANK is about to write its part of STEP (and the other rank has written its own), BALLAST takes
all but LEFT bytes of the disk; the step after that waits until it was tried. At step UNTIL it goes
away.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from keepstep import train
from keepstep.ranks import collectives, signals
from keepstep.save.rank_part import Part
from keepstep.trainer.sft import KeepstepTrainer
from tests.helpers.waiting import PATIENCE

RANK, STEP, LEFT, UNTIL = map(int, sys.argv[1:5])
BALLAST, ARGV = Path(sys.argv[5]), sys.argv[6:]
TRIED = threading.Event()


class Ballasted(KeepstepTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == UNTIL:
            BALLAST.unlink(missing_ok=True)
        if self.state.global_step == STEP and collectives.rank() == RANK:
            assert TRIED.wait(PATIENCE)
        return super().training_step(*args, **kwargs)


finish = Part.finish


def finish_on_a_full_disk(self: Part) -> None:
    first = self.folder.name == f"checkpoint-{STEP}" and self._later and not BALLAST.exists()
    if first and collectives.rank() == RANK:
        report = self.folder.with_name(f"{self.folder.name}-reports") / f"{1 - RANK}.json"
        while not report.exists():
            time.sleep(0.01)
        size = shutil.disk_usage(BALLAST.parent).free - LEFT
        descriptor = os.open(BALLAST, os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(descriptor, 0, size)
        os.close(descriptor)
        print(f"rank {RANK}: {LEFT} bytes are left", flush=True)
    finish(self)
    if self.folder.name == f"checkpoint-{STEP}":
        TRIED.set()


Part.finish = finish_on_a_full_disk  # type: ignore[method-assign]
train.KeepstepTrainer = Ballasted  # type: ignore[misc]
signals.install_handlers()
sys.exit(train.main(ARGV))

"""The main job with something wrong with its saves: shimmed.py FAULT [fields of the recipe]."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Any

from keepstep import train
from keepstep.ranks import collectives
from keepstep.run_folder.storage import Storage
from keepstep.save import saver
from keepstep.save.rank_part import Part
from keepstep.sharding.hf_weights import LayoutError
from keepstep.trainer import state
from keepstep.trainer.publish_callback import Publishing
from keepstep.trainer.sft import KeepstepTrainer

FAULT, *ARGV = sys.argv[1:]
finish, write_at, replace = Part.finish, Storage.write_at, Storage.replace


def slow(self: Part) -> None:
    """Every part takes two seconds to be written."""
    if self._later:
        print(f"rank {self.rank} writes {self.folder.name}", flush=True)
        time.sleep(2)
    finish(self)


def stuck(self: Part) -> None:
    """The disk of rank 1 does not answer at step 4, for six seconds."""
    if self.rank == 1 and self.folder.name == "checkpoint-4":
        time.sleep(6)
    finish(self)


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


class Published(KeepstepTrainer):
    """An evaluation begins when the push under way is over, however slow the machine is."""

    def evaluate(self, *arguments: Any, **kwargs: Any) -> Any:
        found = [c for c in self.callback_handler.callbacks if isinstance(c, Publishing)]
        push = next((c._publisher._push for c in found if c._publisher is not None), None)
        if push is not None:
            push.wait()
        return super().evaluate(*arguments, **kwargs)


def unknown_layout(model: Any) -> Any:
    raise LayoutError("save_pretrained makes experts from other weights")


if FAULT in ("slow", "stuck"):
    Part.finish = globals()[FAULT]  # type: ignore[method-assign]
elif FAULT == "full":
    Storage.write_at = full  # type: ignore[method-assign]
elif FAULT == "speechless":
    Storage.replace = speechless  # type: ignore[method-assign]
elif FAULT == "little-memory":
    saver.free_host_memory = lambda: 5_000_000
elif FAULT == "evaluates":
    train.KeepstepTrainer = Evaluates  # type: ignore[misc]
elif FAULT == "published":
    train.KeepstepTrainer = Published  # type: ignore[misc]
elif FAULT == "gather":
    state.ask = unknown_layout
sys.exit(train.main(ARGV))

"""On PYTHONPATH of a job's ranks: makes them slow, pause, or die, where a file says so.

$KEEPSTEP_FAULTS is JSON: `step_seconds`, of steps behind step `from`; `hold`, a step behind which
each rank stands still until it has heard a signal, so that the run is at work then, however late
that comes; and `place` (start, step, evaluation, save), `step`, `rank`, with `seconds` to pause
there, once, if the rank hears no signal meanwhile, or `die`, every time. While a save pauses, so
does its rank's training. What has fired is added to FILE.fired.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "-1"))


def arm() -> None:
    """Patch the classes as soon as they are there: seconds before they are used."""
    file = Path(os.environ["KEEPSTEP_FAULTS"])
    faults = json.loads(file.read_text())
    while not hasattr(sys.modules.get("keepstep.trainer.sft"), "KeepstepTrainer"):
        time.sleep(0.02)
    trainer = sys.modules["keepstep.trainer.sft"].KeepstepTrainer
    part = sys.modules["keepstep.save.rank_part"].Part
    signals = sys.modules["keepstep.ranks.signals"]
    pauses = threading.Event()

    def at(place: str, step: int) -> None:
        if (place, RANK) != (faults.get("place"), faults.get("rank", 0)):
            return
        fired = Path(f"{file}.fired")
        line = f"{place} {faults.get('step', step)}\n"
        known = fired.read_text() if fired.exists() else ""
        if step != faults.get("step", step) or ("die" not in faults and line in known):
            return
        fired.write_text(known + line)
        if "die" in faults:
            os._exit(1)
        pauses.set()
        end = time.monotonic() + faults["seconds"]
        while time.monotonic() < end and signals.requested() is None:
            time.sleep(0.02)
        pauses.clear()

    def patched(owner: Any, name: str, place: str, step_of: Any) -> None:
        original = getattr(owner, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            step = step_of(self)
            if place == "step":
                slow_down(step)
            at(place, step)
            return original(self, *args, **kwargs)

        setattr(owner, name, method)

    def slow_down(step: int) -> None:
        while pauses.is_set():
            time.sleep(0.02)
        if step >= faults.get("from", 0):
            time.sleep(faults.get("step_seconds", 0.0))
        while step == faults.get("hold") and signals.requested() is None:
            time.sleep(0.01)

    def current(self: Any) -> int:
        return int(self.state.global_step)

    patched(trainer, "_prepare_for_training", "start", lambda self: 0)
    patched(trainer, "training_step", "step", current)
    patched(trainer, "prediction_step", "evaluation", current)
    patched(part, "finish", "save", lambda self: int(self.folder.name.partition("-")[2]))


if RANK >= 0 and "KEEPSTEP_FAULTS" in os.environ:
    threading.Thread(target=arm, daemon=True).start()

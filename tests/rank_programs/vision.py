"""The main job, its rows with images written down: vision.py FOLDER STEP [fields of the recipe].

At STEP (0: never) the last rank is killed, before it computes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from keepstep import train
from keepstep.ranks import collectives
from keepstep.trainer.sft import KeepstepTrainer

FOLDER, STEP, *ARGV = sys.argv[1:]


class Watched(KeepstepTrainer):
    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        step, rank = self.state.global_step + 1, collectives.rank()
        rows = [row for batch in batches for row in seen(batch)]
        with open(Path(FOLDER) / f"rows-{self.manager.attempt}-{rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        if step == int(STEP) and rank == collectives.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches, count


def seen(batch: dict[str, Any]) -> list[str]:
    """A digest of the pixels and the tokens of each row that is trained on."""
    return [
        hashlib.sha1(pixels.numpy().tobytes() + ids[mask.bool()].numpy().tobytes()).hexdigest()[:12]
        for pixels, ids, mask, labels in zip(
            *(batch[n] for n in ("pixel_values", "input_ids", "attention_mask", "labels")),
            strict=True,
        )
        if bool((labels != -100).any())
    ]


Path(FOLDER).mkdir(parents=True, exist_ok=True)
train.KeepstepTrainer = Watched  # type: ignore[misc]
sys.exit(train.main(ARGV))

"""The main job with a row that spoils what is trained: poisoned.py FOLDER KIND STEP RANK [fields]

The first row of that rank in that step is the one, wherever it is dealt later: its loss is NaN
(KIND `loss`), or finite with a gradient that is not (`norm`), or a thousand times what it is
(`spike`), or the last two (`both`). KIND `killed`: as `loss`, and the main process is killed when
it has written down that it goes back; `full`: the disk is, when that is to be written down;
`asked`: a rank is asked to stop in that step. KIND `stale`: nothing is spoiled, and what is saved
of the optimizer is always what it was at the first save. The rows of every step are written down.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from keepstep import train
from keepstep.ranks import collectives
from keepstep.run_folder.writer import RunWriter
from keepstep.trainer.sft import KeepstepTrainer

FOLDER, KIND, STEP, RANK, *ARGV = sys.argv[1:]
POISON = Path(FOLDER) / "poison"


def digests(batch: dict[str, torch.Tensor]) -> list[str]:
    """Of each row that is learned from."""
    taught = (batch["labels"] != -100).any(dim=1)
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    rows = [ids[mask.bool()] for ids, mask in pairs]
    return [
        hashlib.sha1(row.numpy().tobytes()).hexdigest()[:12]
        for row, learned in zip(rows, taught, strict=True)
        if learned
    ]


class Poisoned(KeepstepTrainer):
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        rows = [row for batch in batches for row in digests(batch)]
        step, rank = self.state.global_step + 1, collectives.rank()
        with open(Path(FOLDER) / f"rows-{self.manager.attempt}-{rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        if step == int(STEP) and rank == int(RANK) and not POISON.exists():
            POISON.write_text(rows[0])
        return batches, count

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        bad = self.model.training and POISON.exists() and POISON.read_text() in digests(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not bad or KIND == "stale":
            return loss
        if KIND == "asked":
            os.kill(os.getpid(), signal.SIGTERM)
        if KIND in ("norm", "both"):
            loss = loss + torch.sqrt(loss - loss.detach())  # 0, and its gradient is 1 / 0
        if KIND == "norm":
            return loss
        return loss * (1000.0 if KIND in ("spike", "both") else float("nan"))


def as_it_was(optimizer: torch.optim.AdamW) -> Any:
    """Its state when it was asked first."""
    if not BEFORE:
        BEFORE.append(copy.deepcopy(state_dict(optimizer)))
    return copy.deepcopy(BEFORE[0])


def killed(writer: RunWriter, event: str, **facts: Any) -> None:
    if event == "rewind" and KIND == "full":  # no file of this process may grow beyond this one
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.run.events.stat().st_size,) * 2)
    record(writer, event, **facts)
    if event == "rewind" and KIND == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


BEFORE: list[Any] = []
if KIND in ("killed", "full"):
    record, RunWriter.record = RunWriter.record, killed  # type: ignore[method-assign, assignment]
if KIND == "stale":  # what is written is a copy from before
    state_dict = torch.optim.AdamW.state_dict
    torch.optim.AdamW.state_dict = as_it_was  # type: ignore[method-assign, assignment]
Path(FOLDER).mkdir(parents=True, exist_ok=True)
train.KeepstepTrainer = Poisoned  # type: ignore[misc]
sys.exit(train.main(ARGV))

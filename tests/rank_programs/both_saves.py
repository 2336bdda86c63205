"""Train two steps, then save twice: as the stock Trainer does, into PLAIN, and as keepstep does.

both_saves.py PLAIN [fields of the recipe]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from keepstep import train
from keepstep.trainer.sft import KeepstepTrainer
from tests.helpers.plain import save_plain

PLAIN, *ARGV = sys.argv[1:]
if "three" in PLAIN:  # what no rank has written is NaN: the padding of the last one's partitions
    torch.use_deterministic_algorithms(True, warn_only=True)


class Twice(KeepstepTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "frozen" in PLAIN:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("layers.0." not in name)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_plain(self, Path(PLAIN))
        super()._save_checkpoint(model, trial)


train.KeepstepTrainer = Twice  # type: ignore[misc]
sys.exit(train.main(ARGV))

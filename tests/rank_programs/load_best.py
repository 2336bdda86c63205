"""The main job; at its end the weights in memory are compared with the best checkpoint's."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file

from keepstep import train
from keepstep.ranks import collectives
from keepstep.trainer.sft import KeepstepTrainer


class Compared(KeepstepTrainer):
    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._finalize_training(*args, **kwargs)
        best = self.manager.best()
        assert best is not None
        stored = load_file(best.path / "model.safetensors")
        same = True
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                same = same and torch.equal(parameter.detach(), stored[name])
        if collectives.is_main():
            print(f"best {best.step} of {self.state.global_step}, loaded: {same}", flush=True)
        return result


train.KeepstepTrainer = Compared  # type: ignore[misc]
sys.exit(train.main(sys.argv[1:]))

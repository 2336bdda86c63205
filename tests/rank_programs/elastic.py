"""The main job, watched: elastic.py FOLDER STOP [fields of the recipe].

Each save leaves the state, as DeepSpeed's own accessors gather it, in FOLDER/state-STEP.pt; what is
restored is gathered in the same way and compared. The rows of every step are written down. At STOP
the job is asked to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from keepstep import train
from keepstep.ranks import collectives
from keepstep.sharding import reshard
from keepstep.sharding.flat_buffers import flats, groups, is_stage3
from keepstep.sharding.reshard import IMPLEMENTATION
from keepstep.trainer.sft import KeepstepTrainer
from tests.helpers.plain import save_plain

FOLDER, STOP, *ARGV = sys.argv[1:]


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer computes, not how (an offloaded one has a field of its own)."""
    how = (*IMPLEMENTATION, "bias_correction")
    return {name: value for name, value in settings.items() if name not in how}


def gathered(trainer: KeepstepTrainer) -> dict[str, Any]:
    """The whole state, by parameter name: the same on every rank."""
    state: dict[str, Any] = {}
    engine = trainer.contents.engine
    optimizer = trainer.contents.optimizer()
    assert optimizer is not None
    if engine is not None and not is_stage3(engine):
        # DeepSpeed 0.19.8 links the state of all groups once, after the first group's first step.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                state[f"{name} (frozen)"] = parameter.detach().clone()
        elif engine is not None:
            state[f"{name} fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(parameter, key)
                state[f"{name} {key}"] = None if moment is None else moment.clone()
        else:
            state[f"{name} fp32"] = parameter.detach().clone()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                state[f"{name} {key}"] = optimizer.state[parameter][key].clone()
    for group in [] if engine else optimizer.param_groups:
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        state |= {f"{names[id(p)]} settings": plain(group) for p in group["params"]}
    if engine is not None:
        state["engine steps"] = engine.global_steps, engine.skipped_steps
        state["engine scaler"] = vars(engine.optimizer.loss_scaler).copy()
    for i, parameters in enumerate(groups(engine)) if engine else ():
        number = engine.optimizer.sub_group_to_group_id[i] if is_stage3(engine) else i
        settings = plain(optimizer.param_groups[number])
        flat = flats(engine)[i]
        for parameter in parameters:
            name = engine.param_names[parameter]
            state[f"{name} settings"] = settings
            state[f"{name} step"] = torch.tensor(float(optimizer.state[flat].get("step", -1)))
    return state


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b.view(a.shape))
    return type(a) is type(b) and a == b


class Watched(KeepstepTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "frozen" in FOLDER:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("layers.0." not in name)
        if "buffer" in FOLDER:
            self.model.register_buffer("seen", torch.zeros(3))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.start is not None:
            expected = torch.load(Path(FOLDER) / f"state-{self.start.step}.pt", weights_only=False)
            found = gathered(self)
            if not (expected.keys() ^ found.keys()) - {"engine steps", "engine scaler"}:
                expected |= {n: found[n] for n in found if n not in expected}  # DDP has none
                found |= {n: expected[n] for n in expected if n not in found}
            other = [n for n in expected | found if not equal(expected.get(n), found.get(n))]
            if "buffer" in FOLDER and self.model.seen.tolist() != [self.start.step] * 3:
                other.append("buffer")
            told = f"restored {len(found)}: {other or 'all equal'}"
            print(f"rank {collectives.rank()} {told}", flush=True)
        return prepared

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        state = gathered(self)
        if collectives.is_main():
            torch.save(state, Path(FOLDER) / f"state-{self.state.global_step}.pt")
        if "stock" in FOLDER and self.start is None:
            save_plain(self, Path(FOLDER))
        super()._save_checkpoint(model, trial)

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        step = self.state.global_step + 1
        if not batches:  # a pass over a stream ends where it ends
            return batches, count
        rows = [row for batch in batches for row in documents(batch)]
        attempt, rank = self.manager.attempt, collectives.rank()
        with open(Path(FOLDER) / f"rows-{attempt}-{rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "rows": rows, "items": int(count)}) + "\n")
        if "buffer" in FOLDER:
            self.model.seen.fill_(step)
        if step == int(STOP) and collectives.rank() == collectives.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches, count


def documents(batch: dict[str, torch.Tensor]) -> list[str]:
    """A digest of each row that is trained on; of packed rows, of each document."""
    found = []
    for i, ids in enumerate(batch["input_ids"]):
        if "attention_mask" in batch:
            kept = batch["attention_mask"][i].bool()
            pieces = [(ids[kept], batch["labels"][i][kept])]
        else:
            starts = (batch["position_ids"][i] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], len(ids)]
            ranges = zip(starts, ends, strict=True)
            pieces = [(ids[a:b], batch["labels"][i][a:b]) for a, b in ranges]
        for tokens, labels in pieces:
            if bool((labels != -100).any()):
                found.append(hashlib.sha1(tokens.numpy().tobytes()).hexdigest()[:12])
    return found


def killed(*arguments: Any) -> None:
    """The last rank is killed in the middle of its slices."""
    if collectives.rank() == collectives.world_size() - 1 and arguments[2] > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    copy_slice(*arguments)


if STOP == "killed":
    copy_slice, reshard.copy_slice = reshard.copy_slice, killed  # type: ignore[assignment]
    STOP = "0"
if "fp16" in FOLDER:  # this CPU computes it, slowly; DeepSpeed asks whether it does so fast
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
Path(FOLDER).mkdir(parents=True, exist_ok=True)
train.KeepstepTrainer = Watched  # type: ignore[misc]
sys.exit(train.main(ARGV))

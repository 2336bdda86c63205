"""Counts what waits for a device: counted.py stock|keepstep [the recipe's fields].

At every step's beginning each rank says how often the host has read a tensor so far (on a GPU it
would wait until all queued work is done), and how many collectives it has entered in the default
group (NCCL's, on a GPU). The stock Trainer and keepstep's get the same recipe.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback
from trl import SFTTrainer

from keepstep import train
from keepstep.ranks import collectives
from keepstep.recipe import model
from keepstep.recipe.parse import parse_recipe
from keepstep.trainer.attempt import CurrentAttempt

# What needs a tensor's content, or a copy of it, on the host.
READS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
    *("__contains__", "__format__", "__repr__", "nonzero", "equal", "allclose", "is_nonzero"),
    *("masked_select", "unique", "synchronize"),
}


def among_hosts() -> bool:
    """Whether a decision goes around: its tensors were made on the host, and stay there."""
    frame: FrameType | None = sys._getframe()
    name = collectives.__file__
    while frame is not None and frame.f_code.co_filename != name:
        frame = frame.f_back
    return frame is not None


class HostReads(TorchFunctionMode):
    """Counts them, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        given = [*args[1:], *(kwargs or {}).values()]
        # By its name: to the trainer's own device, which is a torch.device, tensors come and stay.
        moved = name == "to" and any(isinstance(one, str) and one == "cpu" for one in given)
        if (name in READS or moved) and not among_hosts():
            self.counts[name] += 1
        return function(*args, **kwargs or {})


class Tells(TrainerCallback):
    def __init__(self, reads: HostReads) -> None:
        self.reads = reads

    def on_step_begin(self, args, state, control, **kwargs):
        grouped = collectives.is_grouped()
        entered = dist.group.WORLD._get_sequence_number_for_group() if grouped else 0
        print(
            f"rank {args.process_index}: step {state.global_step}: "
            f"reads={self.reads.counts.total()} collectives={entered} {dict(self.reads.counts)}",
            flush=True,
        )


def main(kind: str, argv: list[str]) -> None:
    """The trainer is gone when this returns: DDP must not outlive its process group."""
    recipe = parse_recipe(argv)
    inputs, settings, _ = train.gather_inputs(recipe)
    reads = HostReads()
    if kind == "keepstep":
        attempt = CurrentAttempt(recipe)
        with attempt:
            attempt.begin()
            attempt.choose(settings)
            trainer = train.build_trainer(attempt, inputs)
            trainer.add_callback(Tells(reads))
            with reads:
                trainer.train()
        return
    del inputs["sources"], inputs["renamed"]  # told by keepstep's trainer
    trainer = SFTTrainer(**inputs, **model.trainer_arguments(recipe.model, recipe.training, None))
    trainer.add_callback(Tells(reads))
    with reads:
        trainer.train()


main(sys.argv[1], sys.argv[2:])
collectives.leave()

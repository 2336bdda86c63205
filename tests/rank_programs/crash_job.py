"""A run without a model: every step is saved through CheckpointManager, by real ranks on gloo.

    job.py RUN PROGRESS LIMIT STEPS RANK NTH REQUEST MODE

On rank RANK the process kills itself ahead of its NTH disk operation (0: never). PROGRESS gets a
line, outside of the run folder, before and after every save, and one when the kill fires.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keepstep.policy.batch import Batch
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Policy
from keepstep.ranks import collectives
from keepstep.run_folder.storage import Storage
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part, Piece
from keepstep.save.resume_checks import Resume
from tests.helpers.folders import manifest

RUN, PROGRESS, LIMIT, STEPS, RANK, NTH, REQUEST, MODE = sys.argv[1:]


def tell(text: str) -> None:
    with open(PROGRESS, "a") as file:
        file.write(text + "\n")


class CrashAt:
    """A fault: SIGKILL ahead of the nth disk operation."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.count = 0

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.nth:
            tell(f"killed {operation} {path.name}")
            os.kill(os.getpid(), signal.SIGKILL)


def state(step: int, rank: int) -> torch.Tensor:
    return torch.full((1000,), float(step * 10 + rank))


def shard(step: int, rank: int) -> str:
    """In a folder of its own for one rank only: of several, whichever comes first makes it."""
    folder = f"global_step{step}/" if collectives.world_size() == 1 else ""
    return f"{folder}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write(part: Part, step: int) -> None:
    part.save(shard(step, part.rank), {"x": state(step, part.rank)}, deferred=True)
    # Halves of a file that all ranks write together.
    world = collectives.world_size()
    half = Piece(part.rank * 4000, state(step, part.rank), 0, 1000, torch.float32)
    part.weights("model.safetensors", world * 4000, b"", [half])
    name = f"rng_state_{part.rank}.pth" if collectives.world_size() > 1 else "rng_state.pth"
    part.write(name, b"rng")
    if part.rank == 0:
        part.write("scheduler.pt", b"scheduler")
        part.write("trainer_state.json", b"{}")
        (part.folder / "config.json").write_text("{}")  # what a library writes by itself


def main() -> None:
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    rank = collectives.rank()
    crash = CrashAt(int(NTH) if rank == int(RANK) else 0)
    world = collectives.world_size()
    # The first two saves are the best: retention has a choice to make.
    policy = Policy(int(LIMIT), "metric" if int(LIMIT) > 1 else "recency", "eval_loss")
    mode: Any = MODE
    manager = CheckpointManager(RUN, policy, Storage(before=crash), mode=mode)
    manager.start()
    chosen, choice = manager.choose(
        Resume(
            REQUEST,
            batch=Batch(1, 1, world),
            parallel_layout=ParallelLayout(world, 3),
            patience=10**6,
        )
    )
    if MODE != "off":
        assert manager.saver.reserve(1 << 20) is None
    begin = 0
    if chosen is not None:
        begin = chosen.step
        restored = torch.load(chosen.path / shard(begin, rank))
        assert torch.equal(restored["x"], state(begin, rank))
    if rank == 0:
        tell(f"resumed {begin} {dict(choice.passed_by)}")
    for step in range(begin + 1, int(STEPS) + 1):
        if rank == 0:
            tell(f"saving {step}")
        made = manifest(step, world_size=world, metrics={"eval_loss": 1.0 + step})
        manager.saver.save(made, partial(write, step=step))
        manager.saver.settle()
        if rank == 0:
            tell(f"saved {step}")
    tell(f"operations {rank} {crash.count}")
    collectives.leave()


main()

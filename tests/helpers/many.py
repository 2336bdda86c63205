"""What thousands of ranks do, in small: the files of ZeRO-3, with a few numbers for each tensor."""

from __future__ import annotations

from pathlib import Path

import torch

from keepstep.policy.manifest import Manifest
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Policy
from keepstep.ranks import collectives
from keepstep.run_folder.storage import Storage
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part, Piece
from keepstep.save.resume_checks import Resume
from keepstep.save.safetensors_format import Entry, lay_out
from tests.helpers.folders import manifest
from tests.helpers.world import World

ELEMENTS = 64  # of a rank's slice of the weights
BYTES = 4 * ELEMENTS


def begin(world: World, run: Path) -> list[CheckpointManager]:
    """A new attempt of all ranks, and what it goes on from."""

    def start(rank: int) -> CheckpointManager:
        manager = CheckpointManager(run, Policy(1, "metric", "eval_loss"), Storage())
        manager.start()
        manager.choose(Resume(parallel_layout=ParallelLayout(world.size, 3, True)))
        return manager

    return world.run(start)


def save(manager: CheckpointManager, step: int) -> None:
    """A save from its beginning to its commit, in the foreground. Ranks: all (collective)."""
    manager.saver.save(
        described(step), lambda part: store(part, manager.storage, collectives.world_size())
    )
    assert manager.saver.settle() is not None


def described(step: int) -> Manifest:
    """What is known of a step beside its files."""
    return manifest(
        step,
        world_size=collectives.world_size(),
        deepspeed=True,
        settings={f"setting_{index}": index for index in range(25)},
        versions={f"library_{index}": "1.0.0" for index in range(8)},
    )


def store(part: Part, storage: Storage, world_size: int) -> None:
    """The files of one rank, as DeepSpeed and the Trainer name them."""
    rank, folder = part.rank, "global_step1"
    storage.make_folder(part.folder / folder)
    flat = torch.full((ELEMENTS,), float(rank))
    module = {"module": {}, "param_shapes": [{"w": flat.shape}]}
    part.save(f"{folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", module)
    moments = {"exp_avg": flat, "exp_avg_sq": flat * 2, "step": torch.tensor(1.0)}
    shard = {"fp32_flat_groups": [flat * 3], "optimizer_state_dict": {"state": {0: moments}}}
    state = {"optimizer_state_dict": shard, "zero_stage": 3}
    part.save(f"{folder}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", state)
    part.save(f"rng_state_{rank}.pth", {"cpu": torch.arange(16), "python": (3, [rank] * 625)})
    header, offsets = lay_out([("w", Entry(torch.float32, (world_size, ELEMENTS)))])
    first = len(header) + offsets["w"]
    piece = Piece(first + rank * BYTES, flat, 0, ELEMENTS, torch.float32)
    size = first + world_size * BYTES
    part.weights("model.safetensors", size, header if rank == 0 else b"", [piece])
    if rank == 0:
        part.save("scheduler.pt", {"last_epoch": 1})
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            part.write(name, b"{}")
        part.write("trainer_state.json", b'{"log_history": []}')
        part.write("latest", folder.encode())

"""Write a checkpoint of DeepSpeed's shards anew for another number of processes, without them.

A resume needs none of this (reshard.py); it is for those who want such a checkpoint as files, for a
tool that cannot reshard. One process, one shard in memory at a time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from keepstep.output.progress import Tell, added_up, nobody
from keepstep.policy.batch import Dealt, agree
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.torch_files import torch_save
from keepstep.sharding.reshard import rng_seed
from keepstep.sharding.shards import Zero3Source, Zero12Source, ZeroStored, zero_source
from keepstep.sharding.sources import MASTER, ReshardError, Source, copy_slice

REMADE = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt|rng_state")
ALIGNMENT = 2  # elements per rank (deepspeed 0.19.8, stage_1_and_2.py: nccl_start_alignment_factor)


def reshard(
    checkpoint: Checkpoint,
    run: RunFolder,
    world_size: int,
    storage: Storage | None = None,
    *,
    progress: Tell = nobody,
) -> Checkpoint:
    """Commit `checkpoint` into `run`, with shards for `world_size` processes. One process.

    Args:
        checkpoint: with all its files.
        run: a new folder.
        world_size: processes that will resume it.
        storage: changes the disk.
        progress: told how many bytes are written, file by file, and of how many about.

    Raises:
        ReshardError: it has no shards, or of a kind that is not supported.
        BatchError: so many processes cannot share out the rows of its steps.
        OSError: of the disk.
    """
    if checkpoint.manifest.is_part:
        raise ReshardError(
            f"{checkpoint.path.name} here is one machine's part (node_local): a launch on other "
            "machines reshards by itself, and `keepstep fetch` brings the whole from the mirror",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    with only_listed(checkpoint) as shown:
        source, storage = zero_source(shown.path), storage or Storage()
        return _reshard(checkpoint, source, run, world_size, storage, progress)


def _reshard(
    checkpoint: Checkpoint,
    source: Source | None,
    run: RunFolder,
    world_size: int,
    storage: Storage,
    progress: Tell,
) -> Checkpoint:
    if not isinstance(source, ZeroStored):
        raise ReshardError(
            f"{checkpoint.path.name} holds no shards: any number of processes resumes it as it is",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    before = Dealt.from_json(checkpoint.manifest.dealt)
    dealt = checkpoint.manifest.dealt
    if before is not None:
        asked = replace(before.asked, world_size=world_size)
        dealt = replace(before, batch=agree(before, asked), asked=asked).as_json()
    writer = RunWriter(run, run.policy(), storage)
    if run.is_used():
        raise ReshardError(f"{run.path} is a run already: name a new folder", path=run.path)
    writer.identify()
    staged = writer.stage(checkpoint.step)
    try:
        files, count = {}, added_up(progress, checkpoint.manifest.total_bytes)
        for name, entry in _files(checkpoint, source, world_size, staged, writer.storage):
            files[name] = entry
            count(entry.bytes)
        manifest: Manifest = replace(
            checkpoint.manifest,
            run_id=writer.run_id,
            attempt=writer.attempt,
            parent=None,
            world_size=world_size,
            files=files,
            dealt=dealt,
        )
        made = writer.commit(manifest, resharded_from=checkpoint.manifest.world_size)
    except BaseException:
        writer.discard(checkpoint.step)
        raise
    writer.point()
    return made


def _files(
    checkpoint: Checkpoint, source: ZeroStored, world_size: int, staged: Path, storage: Storage
) -> Iterator[tuple[str, FileEntry]]:
    for name in checkpoint.manifest.files:
        if not REMADE.search(name):
            storage.make_folder((staged / name).parent)
            file = storage.copy(checkpoint.path / name, staged / name)
            yield name, FileEntry(0, file.bytes, file.xxh3_128)
    seed = int(checkpoint.manifest.settings.get("seed", 42))
    storage.make_folder(staged / source.folder.name)
    for rank in range(world_size):
        states = dict(_shards(source, rank, world_size))
        rng = "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"
        states[rng] = _rng_state(rng_seed(seed, checkpoint.step, rank))
        for name, state in states.items():
            with storage.create(staged / name) as file:
                torch_save(state, file)
            yield name, FileEntry(rank, file.bytes, file.xxh3_128)


def _shards(source: ZeroStored, rank: int, world_size: int) -> Iterator[tuple[str, Any]]:
    """What DeepSpeed would have stored on this rank: name → content."""
    folder, prefix = source.folder.name, source.prefix
    model = source.model_states | {"dp_world_size": world_size}
    if isinstance(source, Zero3Source):
        frozen = model["frozen_param_fragments"] and {
            name: _frozen_part(source, name, rank, world_size)
            for name in model["frozen_param_shapes"]
        }
        model["frozen_param_fragments"] = frozen
        yield f"{folder}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model
        shard = _stage3(source, rank, world_size)
    else:
        assert isinstance(source, Zero12Source)
        if rank == 0:
            yield f"{folder}/mp_rank_00_model_states.pt", model
        shard = _stage12(source, rank, world_size)
    name = f"{folder}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    yield name, source.first_file | {"optimizer_state_dict": shard}


def _stage3(source: Zero3Source, rank: int, world_size: int) -> dict[str, Any]:
    masters, state = [], {}
    for i, group in enumerate(source.groups):
        shares = {name: -(-source.sizes[name] // world_size) for name in group}
        flats = {key: torch.zeros(sum(shares.values())) for key in (MASTER, *source.moments)}
        position = 0
        for name, share in shares.items():
            begin = rank * share
            count = max(0, min(share, source.sizes[name] - begin))
            for key, flat in flats.items() if count else ():
                copy_slice(source, source.pieces(name, key), begin, flat[position:][:count])
            position += share
        masters.append(flats.pop(MASTER))
        if source.moments:
            state[i] = {"step": source.step(group[0]), **flats}
    shard: dict[str, Any] = source.first_file["optimizer_state_dict"]
    return shard | {
        "partition_count": world_size,
        "fp32_flat_groups": masters,
        "optimizer_state_dict": shard["optimizer_state_dict"] | {"state": state},
    }


def _stage12(source: Zero12Source, rank: int, world_size: int) -> dict[str, Any]:
    masters, state, paddings, places = [], {}, [], []
    for i, group in enumerate(source.groups):
        total = source.totals[i]
        part = -(-total // (ALIGNMENT * world_size)) * ALIGNMENT
        low = rank * part
        padding = min(part, max(0, low + part - total))
        flats = {key: torch.zeros(part) for key in (MASTER, *source.moments)}
        found = {}
        for name in group:
            offset = source.offsets[name]
            begin, end = max(low, offset), min(low + part, offset + source.sizes[name])
            if begin < end:
                found[name] = fragment_address(numel=end - begin, start=begin - low)
            for key, flat in flats.items() if begin < end else ():
                out = flat[begin - low : end - low]
                copy_slice(source, source.pieces(name, key), begin - offset, out)
        masters.append(flats.pop(MASTER)[: part - padding].clone())
        paddings.append(padding)
        places.append(found)
        if source.moments:
            state[i] = {"step": source.step(group[0]), **flats}
    shard: dict[str, Any] = source.first_file["optimizer_state_dict"]
    return shard | {
        "base_optimizer_state": shard["base_optimizer_state"] | {"state": state},
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        "partition_count": [world_size for _ in source.groups],
        "param_slice_mappings": places,
    }


def _frozen_part(source: Zero3Source, name: str, rank: int, world_size: int) -> torch.Tensor:
    pieces = list(source.frozen(name))
    total, kind = pieces[-1].end, pieces[0].flat().dtype
    part = torch.zeros(-(-total // world_size), dtype=kind)
    count = max(0, min(part.numel(), total - rank * part.numel()))
    if count:
        copy_slice(source, iter(pieces), rank * part.numel(), part[:count])
    return part


def _rng_state(seed: int) -> dict[str, Any]:
    """As Trainer stores it, of generators seeded like transformers' set_seed (CPU)."""
    return {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
        "cpu": torch.Generator().manual_seed(seed).get_state(),
    }

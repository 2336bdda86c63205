"""What a checkpoint lacks, by its manifest: files, state, weights. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.parallel_layout import ParallelLayout

SHOWN = 5  # of ranks without files
SHARD = re.compile(r"zero_pp_rank_\d+_mp_rank_00_optim_states\.pt\Z")
UNIVERSAL = "/zero/optimizer_state.pt"  # in a universal checkpoint of DeepSpeed
WHOLE = "/mp_rank_00_model_states.pt"  # DeepSpeed's own file at stage 0: the optimizer is in it


def ranks_without_files(files: Mapping[str, FileEntry], world_size: int) -> Sequence[int]:
    """Ranks whose part is absent: every rank stores at least its RNG state."""
    present = {entry.rank for entry in files.values()}
    return [rank for rank in range(world_size) if rank not in present]


def differences(manifest: Manifest, sizes: Mapping[str, int | None]) -> list[str]:
    """What is wrong with a folder whose files have these sizes (name → bytes; None: what is there
    is no regular file); empty: nothing.

    A file that the manifest does not list is not a fault: people leave notes in folders.
    """
    whole = not manifest.is_part
    absent = ranks_without_files(manifest.files, manifest.world_size) if whole else ()
    found = [f"rank {rank} has no file in it" for rank in absent[:SHOWN]]
    if len(absent) > SHOWN:
        found.append(f"nor have {len(absent) - SHOWN} other ranks")
    return found + of_files(manifest.files, sizes)


def of_files(files: Mapping[str, FileEntry], sizes: Mapping[str, int | None]) -> list[str]:
    """The same of some of its files."""
    found = []
    for name, entry in sorted(files.items()):
        if name not in sizes:
            found.append(f"{name} is missing")
        elif sizes[name] is None:
            found.append(f"{name} is no regular file")
        elif sizes[name] != entry.bytes:
            found.append(f"{name} has {sizes[name]} bytes, {entry.bytes} were written")
    return found


def part_of(manifest: Manifest, rank: int, world_size: int) -> dict[str, FileEntry]:
    """The files that one of so many ranks will load: what the ranks wrote whose part falls to it,
    and the main process's, which are everybody's. Every file is at least one rank's."""
    written = manifest.world_size
    first = rank * written // world_size
    last = max(first, -(-(rank + 1) * written // world_size) - 1)
    return {
        name: entry
        for name, entry in manifest.files.items()
        if first <= entry.rank <= last or entry.rank == 0
    }


def on_machine(manifest: Manifest, ranks: Collection[int], layout: ParallelLayout) -> set[str]:
    """The files that ranks on a disk of their own will load.

    Args:
        layout: of all ranks. Another one than the checkpoint's begins a rank's share anywhere in
            what others wrote, by the size and padding of each parameter: then it is all files.
    """
    if manifest.parallel_layout != layout:
        return set(manifest.files)
    return {name for rank in ranks for name in part_of(manifest, rank, layout.world_size)}


def missing_state(manifest: Manifest) -> list[str]:
    """Files that resuming this checkpoint needs, and that were never written into it.

    (`save_only_model: true` writes weights alone.)
    """
    needed = ["trainer_state.json", "scheduler.pt"]
    world = range(manifest.world_size)
    if not manifest.origin:  # else a stream is derived where none is stored
        needed += [f"rng_state_{r}.pth" for r in world] if len(world) > 1 else ["rng_state.pth"]
    if manifest.zero_stage == 0 and not any(name.endswith(WHOLE) for name in manifest.files):
        needed.append("optimizer.pt")
    missing = [name for name in needed if name not in manifest.files]
    shards = [f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in world]
    universal = any(name.endswith(UNIVERSAL) for name in manifest.files)
    if manifest.zero_stage and not universal:
        found = {match[0] for match in map(SHARD.search, manifest.files) if match}
        missing += [shard for shard in shards if shard not in found]
    return missing


def stale_files(before: Manifest, now: Manifest) -> list[str]:
    """The optimizer's files, if all of them are what they were at another step: then what was
    written is not the state of this step, but a copy from before. Empty: they are not, or it is not
    known which they are."""
    if before.global_step == now.global_step or before.run_id != now.run_id:
        return []
    states = [
        {name.rpartition("/")[2]: entry.xxh3_128 for name, entry in files.items()}
        for files in map(_optimizer_files, (before, now))
    ]
    return sorted(_optimizer_files(now)) if states[0] == states[1] else []


def _optimizer_files(manifest: Manifest) -> dict[str, FileEntry]:
    return {
        name: entry
        for name, entry in manifest.files.items()
        if name == "optimizer.pt" or SHARD.search(name)
    }


def has_weights(manifest: Manifest) -> bool:
    """Whether there is a weights file in Hugging Face layout (see `save_weights`)."""
    return any(name.endswith((".safetensors", ".bin")) for name in manifest.files)


def not_reshardable(names: Iterable[str]) -> str | None:
    """Why files of these names cannot be given to other processes; None when they can."""
    kinds = {
        r"expert": "mixture of experts",
        r"(^|/)layer_\d+": "pipeline parallelism",
        r"_?mp_rank_(?!00)\d+": "tensor parallelism",
        r"(^|/)offloaded_tensors/": "an optimizer on NVMe",
    }
    for name in names:
        for pattern, kind in kinds.items():
            if re.search(pattern, name):
                return f"{kind} is not resharded"
    return None

"""What a checkpoint is, and when it is complete. Pure: no disk, no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
UNIVERSAL = "/zero/optimizer_state.pt"  # in a universal checkpoint of DeepSpeed
FOLDER_PATTERN = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


class ManifestError(ValueError):
    """A manifest that cannot be read: not JSON, another format, a missing field."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: the rank that wrote it, its size, its xxh3-128 digest in hex."""

    rank: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about one committed checkpoint.

    Attributes:
        run_id: random name of the run, the same in all its checkpoints.
        attempt: which launch of the run wrote it, counted from 1.
        parent: the step of the checkpoint that this attempt resumed from; None: from the start.
        global_step: optimizer steps completed.
        epoch: passes over the training data completed, a fraction.
        samples: training rows drawn, over all ranks, since the start of the run; None: not known.
        metrics: the evaluation at this step (`eval_loss`, …); empty when none was made here.
        world_size: processes that wrote it.
        zero_stage: DeepSpeed's ZeRO stage, 0 for DDP or a single process.
        dtype: the weights' type, as in `float32`.
        adapter: True when only an adapter (LoRA) is stored, not the base model.
        planned_steps: how many optimizer steps the run was to have; 0: not known.
        settings: what determines the trajectory (learning rate, seed, data, …), to find drift.
        health: `finite`: no loss or gradient norm of this attempt was NaN or infinite; the last
            `loss` and `grad_norm` logged.
        versions: of the main libraries.
        saved_at: UTC, ISO 8601.
        save_seconds: how long training stood still for it.
        files: path relative to the checkpoint → `FileEntry`; the manifest itself is not in it.
        origin: where it came from, if not from a run of keepstep (`keepstep adopt`).
        dealt: how the rows of a step were shared out (`Dealt`); empty: not known.
        about: for the model card: base model, data, license, sizes, hardware, tokens, seconds.
    """

    run_id: str
    attempt: int
    parent: int | None
    global_step: int
    epoch: float
    samples: int | None
    metrics: dict[str, float]
    world_size: int
    zero_stage: int
    dtype: str
    adapter: bool
    planned_steps: int
    settings: dict[str, Any]
    health: dict[str, Any]
    versions: dict[str, str]
    saved_at: str
    save_seconds: float
    files: dict[str, FileEntry] = field(default_factory=dict)
    origin: str = ""
    dealt: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: the text is not a manifest of a format that this version reads.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["format_version"] != FORMAT_VERSION:
                raise ManifestError(
                    f"manifest format {values['format_version']}; this keepstep reads "
                    f"{FORMAT_VERSION}"
                )
            values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
            return Manifest(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"not a manifest: {error}") from error


def folder_name(step: int) -> str:
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step in a folder name, None when the name is not exactly `checkpoint-<step>`."""
    match = FOLDER_PATTERN.fullmatch(name)
    return int(match.group(1)) if match else None


def ranks_without_files(files: Mapping[str, FileEntry], world_size: int) -> list[int]:
    """Ranks whose part is absent: every rank stores at least its RNG state."""
    present = {entry.rank for entry in files.values()}
    return [rank for rank in range(world_size) if rank not in present]


def differences(manifest: Manifest, sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with a folder whose files have these sizes (name → bytes); empty: nothing.

    A file that the manifest does not list is not a fault: people leave notes in folders.
    """
    found = [
        f"rank {rank} has no file in it"
        for rank in ranks_without_files(manifest.files, manifest.world_size)
    ]
    for name, entry in sorted(manifest.files.items()):
        if name not in sizes:
            found.append(f"{name} is missing")
        elif sizes[name] != entry.bytes:
            found.append(f"{name} has {sizes[name]} bytes, {entry.bytes} were written")
    return found


def missing_state(manifest: Manifest) -> list[str]:
    """Files that resuming this checkpoint needs, and that were never written into it.

    (`save_only_model: true` writes weights alone.)
    """
    needed = ["trainer_state.json", "scheduler.pt"]
    world = range(manifest.world_size)
    if not manifest.origin:  # else a stream is derived where none is stored
        needed += [f"rng_state_{r}.pth" for r in world] if len(world) > 1 else ["rng_state.pth"]
    if manifest.zero_stage == 0:
        needed.append("optimizer.pt")
    missing = [name for name in needed if name not in manifest.files]
    shards = [f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in world]
    universal = any(name.endswith(UNIVERSAL) for name in manifest.files)
    for shard in shards if manifest.zero_stage and not universal else []:
        if not any(name.endswith(shard) for name in manifest.files):
            missing.append(shard)
    return missing


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


def strategy_name(zero_stage: int) -> str:
    return f"ZeRO-{zero_stage}" if zero_stage else "DDP"


def drift(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Settings that changed since a checkpoint was made: `field: before → now`, in their order.

    A setting that only one side knows is none: another version of keepstep may record more.
    """
    return [
        f"{name}: {before[name]} → {value}"
        for name, value in now.items()
        if name in before and before[name] != value and name not in allowed
    ]


def finite_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an evaluation's report: JSON has no NaN, and NaN never wins."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }

"""What DeepSpeed has stored of each parameter: shards of ZeRO stages, and universal checkpoints.

The layouts are those of layout.py; here they are taken from what the files say of themselves
(deepspeed 0.19.8: `param_shapes`, `param_groups`, `group_paddings`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keepstep.output.units import counted
from keepstep.sharding.sources import (
    MASTER,
    MODULE_FILE,
    MOMENTS,
    Piece,
    ReshardError,
    Stored,
    load_pickled,
    tagged,
)

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class ZeroStored(Stored):
    """Shards of DeepSpeed's ZeRO: one optimizer file per rank.

    Attributes:
        folder: of the shards.
        prefix: of the optimizer files' names.
        model_states, first_file: what rank 0 stored of the model and of the optimizer.
    """

    _masters = _optimizer = ""  # their names in a shard

    def __init__(self, folder: Path, model_file: str) -> None:
        super().__init__()
        self.folder = folder
        states = self.model_states = load_pickled(folder / model_file)
        if states["mp_world_size"] != 1 or "num_experts" in states:
            raise ReshardError(
                "mixture of experts, tensor or pipeline parallel: not supported", path=folder
            )
        self.groups = [list(group) for group in states["param_shapes"]]
        for group in states["param_shapes"]:
            self.sizes |= {name: math.prod(shape) for name, shape in group.items()}
        self.buffers = {name: states["module"][name] for name in states["buffer_names"]}
        self.counters = {name: states[name] for name in COUNTERS}
        self.world_size = int(states["dp_world_size"])
        self._files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
        if [_rank_of(file) for file in self._files] != list(range(self.world_size)):
            raise ReshardError(
                f"{folder.name} does not hold the shards of {counted(self.world_size, 'rank')}",
                path=folder,
            )
        self.prefix = self._files[0].name.split("zero_pp_rank_")[0]
        self.first_file = load_pickled(self._files[0])
        self._shards: dict[int, Any] = {0: self.first_file["optimizer_state_dict"]}
        shard = self._shard(0)
        if "zero_stage" not in shard:
            raise ReshardError(
                "an optimizer of DeepSpeed's that is not ZeRO's is not supported", path=folder
            )
        self.scaler, self.stage = shard["loss_scaler"], int(shard["zero_stage"])
        self.loss_scale = self.scaler.cur_scale if shard["dynamic_loss_scale"] else None
        base = self._shard(0)[self._optimizer]
        if not isinstance(base, dict):
            raise ReshardError(
                "shards written with elastic_checkpoint: true are not supported", path=folder
            )
        # Flat buffers are numbered as they come, parameter group by parameter group.
        self._settings_of = {i: group for group in base["param_groups"] for i in group["params"]}
        self._group_of = {name: i for i, group in enumerate(self.groups) for name in group}
        self.take_moments(next(iter(base["state"].values()), {}))

    def settings(self, name: str) -> dict[str, Any]:
        return dict(self._settings_of[self._group_of[name]])

    def step(self, name: str) -> Any:
        return self._shard(0)[self._optimizer]["state"][self._group_of[name]]["step"]

    def _shard(self, rank: int) -> Any:
        if rank not in self._shards:
            self._shards[rank] = load_pickled(self._files[rank])["optimizer_state_dict"]
        return self._shards[rank]

    def _flat(self, rank: int, key: str, group: int) -> torch.Tensor:
        """A rank's flat buffer of a group: of the masters or of a moment."""
        shard = self._shard(rank)
        if key == MASTER:
            flat: torch.Tensor = shard[self._masters][group]
        else:
            flat = shard[self._optimizer]["state"][group][key]
        return flat.reshape(-1)


class Zero3Source(ZeroStored):
    """Shards of stage 3."""

    _masters, _optimizer = "fp32_flat_groups", "optimizer_state_dict"

    def __init__(self, folder: Path) -> None:
        (first,) = folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")
        super().__init__(folder, first.name)
        self._frozen: dict[int, dict[str, torch.Tensor]] = {}  # rank → its slices
        self._first: dict[str, int] = {}  # name → where it begins in its sub-group's flat buffer
        for group in self.groups:
            position = 0
            for name in group:
                self._first[name] = position
                position += self._share(self.sizes[name])

    def pieces(self, name: str, key: str) -> Iterator[Piece]:
        group, total, share = self._group_of[name], self.sizes[name], self._share(self.sizes[name])
        for rank in range(self.world_size):
            begin, end = rank * share, min((rank + 1) * share, total)
            yield Piece(begin, end, partial(self._flat, rank, key, group), self._first[name])

    def frozen(self, name: str) -> Iterator[Piece]:
        shapes = self.model_states["frozen_param_shapes"] or {}
        if name in shapes:
            total = math.prod(shapes[name])
            share = self._share(total)
            for rank in range(self.world_size):
                begin, end = rank * share, min((rank + 1) * share, total)
                yield Piece(begin, end, partial(self._frozen_part, rank, name), 0)

    def _frozen_part(self, rank: int, name: str) -> torch.Tensor:
        if rank not in self._frozen:
            (path,) = self.folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            self._frozen[rank] = load_pickled(path)["frozen_param_fragments"]
        return self._frozen[rank][name].reshape(-1)

    def _share(self, elements: int) -> int:
        return -(-elements // self.world_size)


class Zero12Source(ZeroStored):
    """Shards of stages 1 and 2.

    Attributes:
        totals: elements of each group, with what aligns its parameters.
        offsets: name → where the parameter begins in its group.
    """

    _masters, _optimizer = "single_partition_of_fp32_groups", "base_optimizer_state"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, MODULE_FILE)
        shard = self._shard(0)
        self._part = [  # elements of a rank's part of each group, padding included
            flat.numel() + padding
            for flat, padding in zip(shard[self._masters], shard["group_paddings"], strict=True)
        ]
        paddings = shard.get("param_alignment_paddings") or [[0] * len(g) for g in self.groups]
        self.totals: list[int] = []
        self.offsets: dict[str, int] = {}
        for group, behind in zip(self.groups, paddings, strict=True):
            position = 0
            for name, padding in zip(group, behind, strict=True):
                self.offsets[name] = position
                position += self.sizes[name] + padding
            self.totals.append(position)

    def pieces(self, name: str, key: str) -> Iterator[Piece]:
        group, offset = self._group_of[name], self.offsets[name]
        part, end = self._part[group], offset + self.sizes[name]
        for rank in range(offset // part, -(-end // part)):
            low, high = max(offset, rank * part), min(end, (rank + 1) * part)
            flat = partial(self._flat, rank, key, group)
            yield Piece(low - offset, high - offset, flat, low - rank * part)

    def frozen(self, name: str) -> Iterator[Piece]:
        stored = self.model_states["module"].get(name)
        if stored is not None:
            yield Piece(0, stored.numel(), lambda: stored.reshape(-1), 0)


class UniversalSource(Stored):
    """What DeepSpeed's `ds_to_universal` makes of shards: a folder per parameter."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder / "zero"
        states = load_pickled(next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt")))))
        common = load_pickled(self._folder / "optimizer_state.pt")
        self.groups = [list(group) for group in states["param_shapes"]]
        for group in states["param_shapes"]:
            self.sizes |= {name: math.prod(shape) for name, shape in group.items()}
        self.buffers = {name: states["module"][name] for name in states["buffer_names"]}
        self.counters = {name: states[name] for name in COUNTERS}
        self.scaler, self.stage = common["loss_scaler"], int(common["zero_stage"])
        self.loss_scale = self.scaler.cur_scale if common["dynamic_loss_scale"] else None
        self._group_of = {name: i for i, group in enumerate(self.groups) for name in group}
        self._settings_of = {i: group for group in common["param_groups"] for i in group["params"]}
        self._common = common.get("optimizer_state_dict", {}).get("state", {})
        self.take_moments(dict.fromkeys(MOMENTS))
        for name in self.sizes:
            for key in (MASTER, *MOMENTS):
                if not (self._folder / name / f"{key}.pt").is_file():
                    raise ReshardError(f"{folder.name} holds no {key} of {name}", path=folder)

    def pieces(self, name: str, key: str) -> Iterator[Piece]:
        stored = self._load(name, key)
        yield Piece(0, stored.numel(), lambda: stored.reshape(-1), 0)

    def settings(self, name: str) -> dict[str, Any]:
        return dict(self._settings_of[self._group_of[name]])

    def step(self, name: str) -> Any:
        if self._common:
            return next(iter(self._common.values()))["step"]
        return self._load(name, "step")

    def _load(self, name: str, key: str) -> torch.Tensor:
        stored = load_pickled(self._folder / name / f"{key}.pt")
        tensor: torch.Tensor = stored["param"] if isinstance(stored, dict) else stored
        return tensor


def zero_source(checkpoint: Path) -> Zero3Source | Zero12Source | UniversalSource | None:
    """What DeepSpeed has stored in a checkpoint; None when it has stored no shards.

    Raises:
        ReshardError: it is not all there, or of a kind that is not supported.
    """
    for tag in ("latest", "latest_universal"):
        if not (checkpoint / tag).is_file():
            continue
        folder = tagged(checkpoint, tag)
        if (folder / "zero" / "optimizer_state.pt").is_file():
            return UniversalSource(folder)
        if (folder / MODULE_FILE).is_file() and not any(folder.glob("*zero_pp_rank_*")):
            return None  # stage 0
        stage3 = any(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt"))
        return Zero3Source(folder) if stage3 else Zero12Source(folder)
    return None


def _rank_of(path: Path) -> int:
    (number,) = re.findall(r"zero_pp_rank_(\d+)_mp_rank_00", path.name) or [-1]
    return int(number)

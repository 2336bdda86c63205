"""DeepSpeed's own save and load, led through a `Part`: its files are written as all others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from keepstep.save.rank_part import Part

DERIVED = "keepstep_derived"  # in DeepSpeed's model states: names of parameters not stored there


class SnapshotCheckpointEngine(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """DeepSpeed's CheckpointEngine, writing through a `Part`: snapshots, digests, errors kept.

    DeepSpeed calls save() between collectives; an error raised there on one rank would leave the
    others waiting (deepspeed 0.19.8, runtime/engine.py: save_checkpoint).

    Attributes:
        part: of the checkpoint that is being saved, None between saves.
        derivable: addresses of parameters that are not stored (ZeRO-1 and 2): a load makes the
            trained ones anew from the fp32 masters, and an adapter's base model is there already.
        engine: DeepSpeed's, which saves and loads through this.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.name = "keepstep"
        self.engine = engine
        self.part: Part | None = None
        self.derivable: set[int] = set()

    def create(self, info: Any) -> None:
        """A save begins; the staging folder is there already."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: `Part` makes the folders that it needs."""

    def preserves_storage_sharing(self) -> bool:
        return False  # DeepSpeed need not clone: a Part gives every tensor a storage of its own

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.part is None:
            raise RuntimeError("DeepSpeed was asked to save outside of KeepstepTrainer's save path")
        module = state_dict.get("module")
        if module and self.derivable:
            stored = ((n, t) for n, t in module.items() if t.data_ptr() not in self.derivable)
            kept = type(module)(stored)
            left_out = [name for name in module if name not in kept]
            state_dict = {**state_dict, "module": kept, DERIVED: left_out}
        name = Path(path).relative_to(self.part.folder).as_posix()
        # The module's buffers may change in a forward pass, the optimizer's state does not.
        self.part.save(name, state_dict, deferred="optimizer_state_dict" in state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        # DeepSpeed stores its own classes beside the tensors, so weights_only cannot be used. The
        # files are this run's own: their sizes (and digests) were checked against the manifest.
        state = torch.load(path, map_location=map_location, weights_only=False)
        left_out = state.pop(DERIVED, [])
        if left_out:  # loaded onto themselves, and made from the masters afterwards
            if not self.engine.zero_load_from_fp32_weights():
                raise ValueError(
                    f"{Path(path).name} holds no 16-bit weights beside the fp32 masters, and "
                    "load_from_fp32_weights: false leaves nothing to load\n"
                    "    Hint: set zero_optimization.load_from_fp32_weights to true"
                )
            current = self.engine.module_state_dict()
            state["module"] |= {name: current[name] for name in left_out}
        return state

    def commit(self, info: Any) -> bool:
        return True


def save_shards(engine: Any, folder: str, tag: str, exclude_frozen_parameters: bool) -> None:
    """Have DeepSpeed store its files. Ranks: all (collective).

    What `engine.save_checkpoint` does (deepspeed 0.19.8), without two barriers and a comparison of
    tags: they are the device's, and every rank would wait until that has nothing left to do. The
    folder is there, and folder and tag were told by the main process.
    """
    if engine.has_moe_layers or engine.zero_nvme_offload_optimizer():  # more files; rare
        engine.save_checkpoint(
            folder,
            tag=tag,
            save_latest=False,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        return
    if engine._optimizer_has_ckpt_event_prologue():
        engine.optimizer.checkpoint_event_prologue()
    engine._save_checkpoint(folder, tag, exclude_frozen_parameters=exclude_frozen_parameters)
    if engine.save_zero_checkpoint:
        engine._save_zero_checkpoint(folder, tag)
    if engine._optimizer_has_ckpt_event_epilogue():
        engine.optimizer.checkpoint_event_epilogue()

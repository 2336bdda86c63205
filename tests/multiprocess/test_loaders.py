"""Loaders see what the manifest lists, whatever else lies in a checkpoint's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

FIELDS = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def merged_into(checkpoint: Path, demo: Path, mark: Path) -> None:
    """The base model beside the adapter, as of somebody who has merged them there; what another
    way to share out would have left."""
    shutil.copy(demo / "model/model.safetensors", checkpoint)
    torch.save({}, checkpoint / "pytorch_model.bin")
    (checkpoint / "pytorch_model_fsdp_0").mkdir()


def planted(checkpoint: Path, demo: Path, mark: Path) -> None:
    """Names that DeepSpeed, and those who read its shards, look for."""
    (shards,) = checkpoint.glob("global_step*")
    (shards / "zero").mkdir()
    names = ("mp_rank_009_model_states.pt", "zero_pp_rank_0_mp_rank_009_model_states.pt")
    for name in (
        *names,
        "copy_zero_pp_rank_0_mp_rank_00_model_states.pt",
        "zero/optimizer_state.pt",
    ):
        torch.save(Planted(mark), shards / name)


def digests(run: Path) -> dict[str, str]:
    """(torch's optimizer holds the same, but not in the same order of objects: LoRA has a parameter
    group that is empty.)"""
    return {n: digest for n, digest in final_digests(run, 4).items() if n != "optimizer.pt"}


@pytest.mark.parametrize(
    ("plant", "strategy", "processes", "fields"),
    [(merged_into, "ddp", 1, LORA), (planted, "cpu_zero3", 2, {})],
)
def test_what_is_not_listed_is_not_loaded(
    ranks: Ranks,
    demo: Path,
    tmp_path: Path,
    plant: object,
    strategy: str,
    processes: int,
    fields: dict[str, object],
) -> None:
    """Bit for bit, in a folder whose name is a pattern to `glob`."""
    run, mark = tmp_path / "run [x]", tmp_path / "unpickled"
    command = argv(demo, run, **FIELDS, **fields)
    ranks.run(command, strategy=strategy, processes=processes)
    expected = digests(run)
    shutil.rmtree(run / "checkpoint-4")
    plant(run / "checkpoint-2", demo, mark)  # type: ignore[operator]
    again = ranks.run(command, strategy=strategy, processes=processes)
    assert "carrying on from checkpoint-2" in again.output
    assert digests(run) == expected
    assert not mark.exists()
    assert RunFolder(run).checkpoints()[0].step == 2, "what people put there is left alone"

"""Snapshots of a device's memory: pinned, on a stream of their own. Needs a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.save.rank_part import Part
from keepstep.save.snapshot_memory import Arena
from keepstep.save.torch_files import owned
from tests.helpers.ranks import ROOT
from tests.helpers.recipes import LORA, argv

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ELEMENTS = 64 << 20


@pytest.fixture
def arena() -> Arena:
    torch.cuda.init()  # as the model has by then
    arena = Arena(ELEMENTS * 4 + (1 << 20))
    arena.start()
    return arena


def test_the_memory_is_pinned(arena: Arena) -> None:
    assert arena.put(torch.ones(ELEMENTS, device="cuda"), deferred=True).is_pinned()


def test_memory_that_is_given_back_is_not_pinned_any_more(arena: Arena) -> None:
    """Mapped anew at the same address, it would be copied to where the old pages were."""
    place = arena.put(torch.ones(8, device="cuda"), deferred=True)
    arena.begin_copy()
    arena.close()
    assert not place.is_pinned()
    for value in range(3):
        again = Arena(arena.size)
        again.start()
        place = again.put(torch.full((8,), float(value), device="cuda"), deferred=True)
        assert place.is_pinned()
        again.begin_copy()
        again.copy()
        assert place.tolist() == [value] * 8
        again.close()


def test_a_state_is_stored_in_the_foreground_without_a_copy_of_it_on_the_device() -> None:
    whole = torch.ones(ELEMENTS, device="cuda")
    before = torch.cuda.memory_allocated()
    state = owned({"a part": whole[: ELEMENTS // 2], "all": whole})
    assert torch.cuda.memory_allocated() == before
    assert state["a part"].untyped_storage().nbytes() == whole.nbytes // 2
    assert state["a part"].data_ptr() == whole.data_ptr()


def test_what_is_copied_is_what_was_there_at_the_save(arena: Arena) -> None:
    """The next optimizer step is queued at once; the device holds it until the copy is done."""
    for value in (1.0, 2.0, 3.0):
        arena.start()
        source = torch.full((ELEMENTS,), value, device="cuda")
        place = arena.put(source, deferred=True)
        arena.begin_copy()
        assert not arena.copied.is_set(), "the host does not wait"
        arena.hold()
        source.fill_(-1.0)  # the step
        arena.copy()
        assert torch.equal(place, torch.full((ELEMENTS,), value))


def test_a_step_that_is_not_held_would_be_seen(arena: Arena) -> None:
    """That the test above can fail: without `hold` the copy sees the step, or a part of it."""
    source = torch.zeros(ELEMENTS, device="cuda")
    torch.cuda.synchronize()
    place = arena.put(source, deferred=True)
    arena.begin_copy()
    source.fill_(1.0)
    arena.copy()
    assert place.max() == 1.0


def test_foreground_and_background_hold_the_same(tmp_path: Path) -> None:
    state = {"a": torch.randn(1000, device="cuda"), "view": torch.randn(100, device="cuda")[3:9]}
    torch.cuda.init()
    for name, arena in (("off", None), ("lazy", Arena(1 << 20))):
        (tmp_path / name).mkdir()
        part = Part(tmp_path / name, 0, Storage(), arena)
        part.save("state.pt", state, deferred=True)
        part.begin_copy()
        part.copy()
        part.finish()
        assert part.error is None
        loaded = torch.load(tmp_path / name / "state.pt", map_location="cuda")
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("fields", [{}, LORA], ids=["full", "lora"])
def test_modes_end_with_the_same_weights(
    demo: Path, tmp_path: Path, strategy: str, fields: dict[str, object]
) -> None:
    ends = set()
    for mode in ("off", "snapshot", "lazy"):
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", f"accelerate_configs/{strategy}.yaml"),
            *("--num_processes", "1", "--num_machines", "1", "--main_process_port", "0"),
            *("-m", "keepstep.train"),
            *argv(demo, tmp_path / mode, async_save=mode, **fields),
        ]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
        last = RunFolder(tmp_path / mode).checkpoints()[-1]
        ends |= {e.xxh3_128 for n, e in last.manifest.files.items() if n.endswith(".safetensors")}
    assert len(ends) == 1

"""keepstep adds nothing to a step that waits for the device. Needs a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import stall
from benchmarks.gpu.launches import Budget
from benchmarks.gpu.speed import measure

from keepstep.save.snapshot_memory import Arena
from keepstep.trainer.step_numbers import Numbers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_for_no_more_than_trl_does(tmp_path: Path) -> None:
    counts = {
        arm: measure(stall.COUNTED, arm, tmp_path, cpu=False, budget=Budget(900), count=True)
        for arm in ("plain", "keepstep")
    }
    assert sum(counts["plain"]["waits"].values()) > 0, "a step of TRL's reads its loss"
    assert stall.added(counts["plain"]["waits"], counts["keepstep"]["waits"]) == 0


def test_a_lazy_copy_is_queued(waiting_is_an_error: None) -> None:
    """From the beginning of a save to the optimizer's step: the host does not wait."""
    torch.cuda.set_sync_debug_mode("default")
    sources = [torch.ones(1 << 20, device="cuda") for _ in range(8)]
    arena = Arena(1 << 26)
    arena.start()
    torch.cuda.set_sync_debug_mode("error")
    places = [arena.put(source, deferred=True) for source in sources]
    arena.begin_copy()
    arena.hold()
    for source in sources:
        source.add_(1)
    torch.cuda.set_sync_debug_mode("default")
    arena.copy()
    assert all(bool((place == 1).all()) for place in places)
    arena.close()


def test_what_a_step_notes_of_its_loss_stays_on_the_device(waiting_is_an_error: None) -> None:
    """As in Health.add_loss and set_grad_norm, and in KeepstepTrainer.compute_loss."""
    loss = torch.ones((), device="cuda")
    numbers = Numbers(1, loss.device)
    numbers.add_loss(loss)
    numbers.set_grad_norm(2 * loss)
    numbers.ended()
    assert (loss * (torch.zeros(4, device="cuda") != 1).any()).is_cuda
    numbers.wait()
    assert (numbers.losses, numbers.norm) == ([1.0], 2.0)

"""Run folders made by hand, with real files and true manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from keepstep.policy.manifest import MANIFEST_NAME, FileEntry, Manifest, folder_name
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.reader import RunFolder

RUN_ID = "0123456789ab"


def manifest(step: int, **changes: object) -> Manifest:
    values: dict[str, object] = {
        "run_id": RUN_ID,
        "attempt": 1,
        "parent": None,
        "global_step": step,
        "epoch": step / 10,
        "samples": step * 16,
        "metrics": {"eval_loss": 1 + 1 / (step + 1)},
        "world_size": 2,
        "zero_stage": 3,
        "dtype": "float32",
        "adapter": False,
        "planned_steps": 100,
        "settings": {"learning_rate": 1e-3},
        "health": {"finite": True},
        "versions": {"keepstep": "0.1.0"},
        "saved_at": "2026-11-21T05:00:00.000+00:00",
        "save_seconds": 0.1,
        **changes,
    }
    return Manifest(**values)  # type: ignore[arg-type]


STATE = {"trainer_state.json": 0, "scheduler.pt": 0} | {
    f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": rank for rank in (0, 1)
}


def commit(
    run: Path, step: int, more: Mapping[str, int] = MappingProxyType({}), **changes: object
) -> Path:
    """A committed checkpoint of two ranks, a few bytes each.

    Args:
        more: further files → the rank that wrote them; `STATE`: a resume finds what it needs.
    """
    folder = run / folder_name(step)
    files = {}
    names = {"model.safetensors": 0, "rng_state_0.pth": 0, "rng_state_1.pth": 1, **more}
    for name, rank in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} of step {step}".encode() * 20)
        files[name] = FileEntry(rank, path.stat().st_size, digest_of(path))
    (folder / MANIFEST_NAME).write_text(manifest(step, files=files, **changes).to_json())
    return folder


def final_digests(run: Path, step: int) -> dict[str, str]:
    """Digests of all that the last checkpoint, of this step, restores: weights, optimizer,
    scheduler, RNG. (The log in trainer_state.json holds how long each evaluation took.)"""
    last = RunFolder(run).checkpoints()[-1]
    assert last.step == step
    files = last.manifest.files
    return {name: e.xxh3_128 for name, e in files.items() if name != "trainer_state.json"}


def events(run: RunFolder, kind: str) -> list[dict]:
    """The events of that kind, in their order."""
    lines = map(json.loads, run.events.read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def left_behind(run: RunFolder) -> list[Path]:
    """What lies in the attempts' parts of staging and trash."""
    return [path for place in (run.staging, run.trash) for path in place.glob("*/*")]


def identify(run: Path, **policy: object) -> Path:
    """What the first attempt writes down about a run."""
    private = run / ".keepstep"
    private.mkdir(parents=True, exist_ok=True)
    (private / "run.json").write_text(json.dumps({"run_id": RUN_ID, "policy": policy}))
    return run

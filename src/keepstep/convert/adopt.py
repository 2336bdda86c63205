"""Take in a checkpoint that keepstep did not write: a stock Trainer's, or a universal one.

Its files are copied into a run folder, opened as a resume would open them, listed in a manifest
and committed like any other. What nobody has written down cannot be checked; that is said.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from keepstep.errors import KeepstepError
from keepstep.output.progress import Tell, nobody
from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.completeness import missing_state
from keepstep.policy.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ManifestError,
    finite_metrics,
)
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.torch_files import torch_save
from keepstep.sharding.shards import UniversalSource, zero_source
from keepstep.sharding.sources import MASTER, Source, load_pickled, stored_optimizer

# Left where they are: a pickle of all arguments, secrets among them, and copies of programs.
LEFT_OUT = re.compile(r"training_args\.bin|zero_to_\w+\.py|trainer_state\.json")


@dataclass(frozen=True)
class Adopted:
    """A checkpoint that was taken in.

    Attributes:
        checkpoint: as it is committed now.
        unchecked: what could not be checked, a sentence each.
    """

    checkpoint: Checkpoint
    unchecked: list[str]


class AdoptError(KeepstepError, ValueError):
    """A folder that cannot be taken in; says why."""


def adopt(
    path: Path,
    run: RunFolder,
    storage: Storage | None = None,
    *,
    progress: Tell = nobody,
) -> Adopted:
    """Copy the checkpoint at `path` into `run`, and commit it. One process.

    Args:
        path: the checkpoint.
        run: a new folder.
        storage: changes the disk.
        progress: told how many of so many bytes are copied.

    Raises:
        AdoptError: it is no checkpoint with the state to go on from, or is damaged.
        OSError: of the disk.
    """
    if (path / MANIFEST_NAME).exists():
        raise AdoptError(
            f"{path} has a manifest: resume_from_checkpoint: {path} takes it as it is", path=path
        )
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    files = {name: file for name, file in found.items() if not LEFT_OUT.search(name)}
    if (path / "zero").is_dir():  # a bare universal checkpoint: its own folder, and nothing else
        files = {f"universal/{name}": file for name, file in files.items()}
    source = _open(path)
    state = _trainer_state(path, source)
    step = int(state["global_step"])
    if run.is_used():
        raise AdoptError(f"{run.path} is a run already: name a new folder", path=run.path)
    writer = RunWriter(run, run.policy(), storage or Storage())
    writer.identify()
    staged = writer.stage(step)
    try:
        made = dict(_made(path, source, state))
        entries = _filled(writer.storage, staged, files, made, progress)
        manifest = _manifest(path, source, state, entries, writer)
        missing = missing_state(manifest)
        if missing:
            raise AdoptError(
                f"{path} has no {', '.join(missing)}: there is no state to go on from", path=path
            )
        _check(staged)
        checkpoint = writer.commit(manifest, origin=manifest.origin)
    except ManifestError as error:
        writer.discard(step)
        raise AdoptError(f"{path} cannot be taken in: {error}", path=path) from error
    except BaseException:
        writer.discard(step)
        raise
    writer.point()
    return Adopted(checkpoint, list(_unchecked(manifest, made)))


def _open(path: Path) -> Source | None:
    """What DeepSpeed has stored at `path`; None when torch has stored the optimizer."""
    with _naming(path):
        source = UniversalSource(path) if (path / "zero").is_dir() else zero_source(path)
    if source is None and not any((path / name).is_file() for name in ("optimizer.pt", "latest")):
        raise AdoptError(
            f"{path} is no checkpoint: it holds neither shards of DeepSpeed (with `latest` or "
            "`latest_universal` beside them), nor optimizer.pt, nor a universal checkpoint's zero/",
            path=path,
        )
    return source


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What torch and pickle raise of a damaged file, a dozen types, says nothing of which one."""
    try:
        yield
    except Exception as error:
        raise AdoptError(f"{path} cannot be read: {error}", path=path) from error


def _trainer_state(path: Path, source: Source | None) -> dict[str, Any]:
    file = path / "trainer_state.json"
    if file.is_file():
        state: dict[str, Any] = json.loads(file.read_text())
        stored = source.counters["global_steps"] if source else state["global_step"]
        if stored != state["global_step"]:
            raise AdoptError(
                f"{path}: trainer_state.json is of step {state['global_step']}, DeepSpeed's state "
                f"of step {stored}",
                path=file,
            )
        return state
    if source is None:
        raise AdoptError(f"{path} has no trainer_state.json: its step is not known", path=path)
    # What Trainer asks of the file; the last is only compared with the recipe's, for a warning.
    step = source.counters["global_steps"]
    return {"global_step": step, "epoch": 0.0, "log_history": [], "train_batch_size": 1}


def _made(path: Path, source: Source | None, state: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """What is written anew, or made because a bare universal checkpoint lacks it."""
    if (path / "zero").is_dir():
        yield "latest_universal", b"universal"
    # The path of its best checkpoint, an absolute one, means nothing here.
    yield "trainer_state.json", json.dumps(state | {"best_model_checkpoint": None}).encode()
    if source is not None and not (path / "scheduler.pt").is_file():
        names = [group[0] for group in source.groups if group]
        settings = [source.settings(name) for name in names]
        schedule = {
            "base_lrs": [group.get("initial_lr", group["lr"]) for group in settings],
            "_last_lr": [group["lr"] for group in settings],
            "last_epoch": state["global_step"],
            "_step_count": state["global_step"] + 1,
            "lr_lambdas": [None for _ in settings],
        }
        buffer = io.BytesIO()
        torch.save(schedule, buffer)
        yield "scheduler.pt", buffer.getvalue()


def _filled(
    storage: Storage,
    staged: Path,
    files: dict[str, Path],
    made: dict[str, bytes],
    progress: Tell,
) -> dict[str, FileEntry]:
    """Copy `files` into `staged`, and write what was made for it."""
    entries = {}
    done, total = 0, sum(path.stat().st_size for path in files.values())
    for name, path in files.items():
        entries[name] = _take(storage, path, staged / name)
        done += path.stat().st_size
        progress(done, total)
    for name, content in made.items():
        file = storage.write(staged / name, content)
        entries[name] = FileEntry(0, file.bytes, file.xxh3_128)
    return entries


def _take(storage: Storage, source: Path, target: Path) -> FileEntry:
    storage.make_folder(target.parent)
    if target.suffix == ".pt" and not zipfile.is_zipfile(source):
        # Of the old kind, that DeepSpeed writes by default: it could not be mapped at a resume.
        with _naming(source), storage.create(target) as file:
            torch_save(load_pickled(source), file)
    else:
        file = storage.copy(source, target)
    numbers = re.findall(r"(?:zero_pp_rank|rng_state)_(\d+)", target.name)
    return FileEntry(int(numbers[0]) if numbers else 0, file.bytes, file.xxh3_128)


def _manifest(
    path: Path,
    source: Source | None,
    state: dict[str, Any],
    files: dict[str, FileEntry],
    writer: RunWriter,
) -> Manifest:
    step = int(state["global_step"])
    universal = isinstance(source, UniversalSource)
    world_size = 1 if universal else 1 + max(entry.rank for entry in files.values())
    history = [entry for entry in state.get("log_history", []) if entry.get("step") == step]
    metrics = {n: v for entry in history for n, v in entry.items() if n.startswith("eval_")}
    return Manifest(
        run_id=writer.run_id,
        attempt=writer.attempt,
        parent=None,
        global_step=step,
        epoch=round(state.get("epoch") or 0.0, 6),
        samples=None,
        metrics=finite_metrics(metrics),
        world_size=world_size,
        zero_stage=source.stage if source else 0,
        deepspeed=any(name.endswith("model_states.pt") for name in files),
        dtype=_dtype(path),
        adapter=(path / "adapter_config.json").is_file(),
        planned_steps=int(state.get("max_steps", 0)),
        settings={},
        health={},
        versions={},
        saved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        save_seconds=0.0,
        files=files,
        origin="DeepSpeed's universal checkpoint" if universal else "a stock Trainer's checkpoint",
        dealt=_dealt(path, world_size),
    )


def _dealt(path: Path, world_size: int) -> dict[str, Any]:
    """DeepSpeed writes down how the rows of a step were shared out; torch does not."""
    names = sorted(path.rglob("*mp_rank_00_model_states.pt"))
    if not names:
        return {}
    states = load_pickled(names[0])
    config, processes = states.get("ds_config") or {}, states["dp_world_size"]
    per_device = config.get("train_micro_batch_size_per_gpu")
    times = config.get("gradient_accumulation_steps")
    if not (isinstance(per_device, int) and isinstance(times, int)):
        return {}
    batch = Batch(per_device, times, processes)
    return Dealt(batch, batch, None).as_json()


def _dtype(path: Path) -> str:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                return str(weights.get_tensor(name).dtype).removeprefix("torch.")
    return "unknown"


def _check(staged: Path) -> None:
    """Open the copy as a resume would: every element has its place in a file that can be read."""
    source = zero_source(staged)
    if source is None:
        with _naming(Path("the optimizer's state")):
            stored_optimizer(staged)
        return
    for name, elements in source.sizes.items():
        for key in (MASTER, *source.moments):
            found = [piece for piece in source.pieces(name, key) if piece.end > piece.begin]
            held = [p for p in found if p.flat().numel() >= p.first + p.end - p.begin]
            if sum(piece.end - piece.begin for piece in held) != elements:
                raise AdoptError(f"{name} ({key}) is not whole")


def _unchecked(manifest: Manifest, made: dict[str, bytes]) -> Iterator[str]:
    yield "whether the files are what was once written: nobody took their digests"
    yield "the settings of the run (learning rate, data, seed, ...): they are not compared"
    if not manifest.dealt:
        yield "the rows of a step: the recipe's are taken"
    yield "the rows drawn: the position in the data is counted from the step"
    if not any("rng_state" in name for name in manifest.files):
        yield "the random generators: they are seeded from (seed, step, rank)"
    if "scheduler.pt" in made:
        yield "the learning rate's schedule: it goes on at this step by the recipe"
    if manifest.zero_stage == 0:
        yield "which parameter is which in optimizer.pt: their order is that of the model"

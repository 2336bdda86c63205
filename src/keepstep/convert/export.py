"""Export: a checkpoint's weights for inference, in Hugging Face layout. One process, streaming.

The weights come from the checkpoint's own weights file or, where it has none (or is asked for more
precision than that holds), from the fp32 masters in the shards. What is read is mapped, what is
written goes out some megabytes at a time: memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from keepstep.convert.companions import is_companion, write_companions
from keepstep.errors import KeepstepError
from keepstep.output.printable import quoted
from keepstep.policy.manifest import LONGEST_MANIFEST, FileEntry, Manifest
from keepstep.policy.strict import TextError, parse
from keepstep.run_folder.checkpoint import damaged
from keepstep.run_folder.contents import sizes_under
from keepstep.run_folder.files import CHUNK
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.place import read_place
from keepstep.run_folder.reader import Checkpoint, RunFolder, run_that_would_prune
from keepstep.run_folder.safe_read import OddFileError, read_text
from keepstep.run_folder.storage import Storage
from keepstep.save.safetensors_format import DTYPES, Entry, lay_out
from keepstep.save.snapshot_memory import aligned
from keepstep.save.torch_files import bytes_of
from keepstep.sharding.shards import zero_source
from keepstep.sharding.sources import LAYOUT_FILE, MASTER, ReshardError, Source, copy_slice

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ExportError(KeepstepError, ValueError):
    """A checkpoint that cannot be exported as asked for; says why, and what can be done."""


class Weights(Protocol):
    """Named tensors, of which any elements can be read.

    Attributes:
        entries: name → type and shape, as stored.
    """

    entries: dict[str, Entry]

    def fill(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Copy a tensor's elements from `begin` into `out`, cast to its type."""


@dataclass(frozen=True)
class Exported:
    """What an export has written.

    Attributes:
        folder: the new folder.
        files: path relative to it → bytes.
        dtype: the type of most weights, as in `bfloat16`.
    """

    folder: Path
    files: dict[str, int]
    dtype: str


class FileWeights:
    """The weights file(s) of a checkpoint.

    Raises:
        ExportError: one is no safetensors file, whatever its digest says.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:  # mapped: what is touched is read
                    for name in file.offset_keys():  # in the order in which they lie there
                        kind = file.get_slice(name).get_dtype()
                        if kind not in DTYPES:
                            told = f"{path} holds {kind!r}, a type that is not known here"
                            raise ExportError(told, path=path)
                        self._tensors[name] = file.get_tensor(name)
            except SafetensorError as error:
                raise ExportError(f"{path} is no safetensors file: {error}", path=path) from error
        self.entries = {n: Entry(t.dtype, tuple(t.shape)) for n, t in self._tensors.items()}

    def fill(self, name: str, begin: int, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name].reshape(-1)[begin : begin + out.numel()])


class ShardWeights:
    """The same from DeepSpeed's shards, laid out as `weights_layout.json` says."""

    def __init__(self, source: Source, layout: dict[str, Any]) -> None:
        self._source, tensors = source, layout["tensors"]
        self._names = {t["name"]: t["parameter"] for t in tensors}
        self.entries = {t["name"]: Entry(DTYPES[t["dtype"]], tuple(t["shape"])) for t in tensors}

    def fill(self, name: str, begin: int, out: torch.Tensor) -> None:
        parameter = self._names[name]
        if parameter in self._source.buffers:
            out.copy_(self._source.buffers[parameter].reshape(-1)[begin : begin + out.numel()])
            return
        trained = parameter in self._source.sizes
        pieces = (
            self._source.pieces(parameter, MASTER) if trained else self._source.frozen(parameter)
        )
        try:
            copy_slice(self._source, pieces, begin, out)
        except ReshardError as error:
            raise ExportError(f"{parameter} is not stored in the checkpoint: {error}") from error


def export(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    storage: Storage | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write `checkpoint`'s weights, configuration and tokenizer into the new folder `folder`.

    Args:
        dtype: bf16, fp16 or fp32; None: as the weights are.
        max_shard_size: of one file, as in `5GB`.
        progress: told the bytes written so far, and in all.

    Raises:
        ExportError: it cannot be done; `folder` does not exist then.
        OSError: of the disk.
    """
    storage = storage or Storage()
    with only_listed(checkpoint) as shown:
        weights, file_name = open_weights(checkpoint, shown, dtype)
        with new_folder(folder, storage) as partial:
            _write_weights(weights, file_name, dtype, max_shard_size, partial, storage, progress)
            write_companions(checkpoint, partial, storage, dtype and str(PRECISIONS[dtype]))
    return Exported(folder, dict(sorted(sizes_under(folder).items())), _main_type(weights, dtype))


@contextlib.contextmanager
def new_folder(folder: Path, storage: Storage) -> Iterator[Path]:
    """Where to write what `folder` is to hold; it gets that name when all is there, or never.

    Raises:
        ExportError: it exists.
    """
    if folder.exists():
        raise ExportError(f"{folder} exists: name a new folder", path=folder)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        storage.remove(partial)
    storage.make_folder(partial)
    try:
        yield partial
    except BaseException:
        storage.remove(partial)
        raise
    storage.rename(partial, folder)


def open_weights(
    checkpoint: Checkpoint, shown: Checkpoint, dtype: str | None = None
) -> tuple[Weights, str]:
    """The weights of a checkpoint, and the name that their file has or would have.

    Args:
        shown: the same checkpoint, as loaders are shown it.

    Raises:
        ExportError: they are not there, or not understood.
    """
    names = [name for name in checkpoint.manifest.files if is_weights(name)]
    stored = FileWeights([checkpoint.path / name for name in sorted(names)])
    file_name = "adapter_model.safetensors" if checkpoint.manifest.adapter else "model.safetensors"
    layout = checkpoint.path / LAYOUT_FILE
    if stored.entries and (_suffice(stored, dtype) or not layout.is_file()):
        return stored, file_name
    if checkpoint.manifest.is_part:
        raise ExportError(_why_a_part_is_not_enough(checkpoint), path=checkpoint.path)
    if not layout.is_file():
        raise ExportError(
            f"{checkpoint.path.name} holds no weights, and not how to make them",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    source = _verified_shards(checkpoint, shown)
    try:
        return ShardWeights(source, parse(read_text(layout, LONGEST_MANIFEST))), file_name
    except (OddFileError, TextError, KeyError, TypeError) as error:
        raise ExportError(
            f"{checkpoint.path.name}: {LAYOUT_FILE}: {error!r}",
            step=checkpoint.step,
            path=checkpoint.path,
        ) from error


def _why_a_part_is_not_enough(checkpoint: Checkpoint) -> str:
    place = read_place(RunPaths(checkpoint.path.parent))
    mirror = place.mirror if place and place.mirror else "MIRROR/RUN"
    host = f"the part of it on {place.host}" if place else "one machine's part of it"
    return (
        f"{checkpoint.path.name} here is {host} (node_local), without its weights\n"
        f"    Hint: keepstep export {quoted(f'{mirror}/{checkpoint.path.name}')} --to DIR"
    )


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds weights as they are exported."""
    return name.endswith(".safetensors") and "/" not in name


def files_for(manifest: Manifest) -> dict[str, FileEntry]:
    """What an export reads of a checkpoint: with weights files all but the optimizer's state, as
    long as `shards_are_wanted` does not say otherwise; without, all of it."""
    if not any(map(is_weights, manifest.files)):
        return manifest.files
    return {
        name: entry
        for name, entry in manifest.files.items()
        if is_weights(name) or is_companion(name) or name == LAYOUT_FILE
    }


def shards_are_wanted(checkpoint: Checkpoint, dtype: str | None) -> bool:
    """Whether its weights files are less precise than what was asked for, and its shards are not.

    Raises:
        ExportError: they are not understood.
    """
    names = [name for name in checkpoint.manifest.files if is_weights(name)]
    stored = FileWeights([checkpoint.path / name for name in sorted(names)])
    return not _suffice(stored, dtype) and LAYOUT_FILE in checkpoint.manifest.files


def _suffice(stored: FileWeights, dtype: str | None) -> bool:
    floats = [entry for entry in stored.entries.values() if _is_float(entry)]
    return dtype != "fp32" or all(entry.dtype.itemsize >= 4 for entry in floats)


def check_request(folder: Path, dtype: str | None, max_shard_size: str) -> None:
    """What can be known before anything is read.

    Raises:
        ExportError: it cannot be done so.
    """
    if dtype not in (None, *PRECISIONS):
        raise ExportError(f"dtype: {dtype} is none of {', '.join(PRECISIONS)}")
    run = run_that_would_prune(folder)
    if run is not None:
        raise ExportError(f"{folder} would be among the checkpoints of {run}: name another folder")
    if folder.exists():
        raise ExportError(f"{folder} exists: name a new folder", path=folder)
    _split({}, "model.safetensors", max_shard_size)


def _split(entries: dict[str, Entry], file_name: str, max_shard_size: int | str) -> StateDictSplit:
    """Which file each tensor goes to."""
    try:
        return split_state_dict_into_shards_factory(
            entries,
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern=file_name.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ExportError(f"max_shard_size: {max_shard_size!r} is no size: 5GB, 500MB") from error


def _verified_shards(checkpoint: Checkpoint, shown: Checkpoint) -> Source:
    """DeepSpeed's shards are pickles: every byte is compared with the manifest before."""
    faults = RunFolder(checkpoint.path.parent).faults(checkpoint, deep=True)
    if faults:
        raise ExportError(
            damaged(checkpoint.path.name, faults),
            step=checkpoint.step,
            path=checkpoint.path,
        )
    try:
        source = zero_source(shown.path)
    except ReshardError as error:
        raise ExportError(
            f"{checkpoint.path.name}: {error}", step=checkpoint.step, path=checkpoint.path
        ) from error
    if source is None:
        raise ExportError(
            f"{checkpoint.path.name} holds no shards to take the weights from",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    return source


def _write_weights(
    weights: Weights,
    file_name: str,
    dtype: str | None,
    max_shard_size: str,
    folder: Path,
    storage: Storage,
    progress: Callable[[int, int], None],
) -> None:
    entries = {name: as_written(entry, dtype) for name, entry in weights.entries.items()}
    total, done = sum(entry.nbytes for entry in entries.values()), 0
    whole = file_name.startswith("adapter")  # PEFT reads one file
    memory = aligned(CHUNK)
    split = _split(entries, file_name, total + 1 if whole else max_shard_size)
    for name, members in split.filename_to_tensors.items():
        # By falling element size: every tensor is aligned, as the library does it.
        members = sorted(members, key=lambda member: -entries[member].dtype.itemsize)
        header, _ = lay_out((member, entries[member]) for member in members)
        with storage.create(folder / name) as file:
            file.write(header)
            for member in members:
                for content in contents(weights, member, entries[member], memory):
                    done += file.write(bytes_of(content))
                    progress(done, total)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
        storage.write(folder / f"{file_name}.index.json", text)


def contents(
    weights: Weights, name: str, entry: Entry, memory: torch.Tensor
) -> Iterator[torch.Tensor]:
    """A tensor's elements in their type, as many at a time as `memory` holds, and there."""
    bounce = memory.view(entry.dtype)
    for begin in range(0, entry.numel, bounce.numel()):
        part = bounce[: min(bounce.numel(), entry.numel - begin)]
        weights.fill(name, begin, part)
        if entry.dtype == torch.float16 and not part.isfinite().all():
            raise ExportError(f"{name} has values beyond the range of fp16: export as bf16")
        yield part


def as_written(entry: Entry, dtype: str | None) -> Entry:
    return Entry(PRECISIONS[dtype], entry.shape) if dtype and _is_float(entry) else entry


def _is_float(entry: Entry) -> bool:
    return entry.dtype.is_floating_point


def _main_type(weights: Weights, dtype: str | None) -> str:
    """The type of most weights."""
    sizes: dict[str, int] = {}
    for entry in weights.entries.values():
        cast = as_written(entry, dtype)
        name = str(cast.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + cast.nbytes
    return max(sizes, key=lambda name: sizes[name])

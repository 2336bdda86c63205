"""One rank's part of a checkpoint, and the hook that makes DeepSpeed write through it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from .manifest import FileEntry
from .storage import Storage, digest_of, sizes_under


class Part:
    """What this rank writes of one checkpoint.

    A disk error is kept, not raised: the other ranks are on their way to the next collective, and
    would wait there for this one. After the first error nothing more is written. Ranks exchange
    their parts once all have been written, and then fail together or commit.

    Attributes:
        files: path relative to the checkpoint → size and digest, for everything written so far.
        error: the first thing that went wrong, None so far.
    """

    def __init__(self, folder: Path, rank: int, storage: Storage) -> None:
        self.folder = folder
        self.rank = rank
        self.files: dict[str, FileEntry] = {}
        self.error: Exception | None = None
        self._storage = storage

    def attempt(self, write: Callable[[], object]) -> None:
        """Run `write` unless this part already failed; keep its error."""
        if self.error is None:
            try:
                write()
            except Exception as error:
                self.error = error

    def save(self, name: str, state: object) -> None:
        """Store a state dict as `name`, in torch's zip format, digested on the way."""

        def write() -> None:
            path = self.folder / name
            self._storage.make_folder(path.parent)
            with self._storage.create(path) as file:
                torch.save(state, file)  # type: ignore[arg-type]  # needs only write() and flush()
            self.files[name] = FileEntry(self.rank, file.bytes, file.xxh3_128)

        self.attempt(write)

    def write(self, name: str, content: bytes) -> None:
        """Store `content` as `name`."""

        def write() -> None:
            file = self._storage.write(self.folder / name, content)
            self.files[name] = FileEntry(self.rank, file.bytes, file.xxh3_128)

        self.attempt(write)

    def adopt(self, *names: str) -> None:
        """Take in files that a library wrote: sync them, and read them once for their digest."""

        def take() -> None:
            for name in names:
                path = self.folder / name
                self._storage.sync(path)
                self.files[name] = FileEntry(self.rank, path.stat().st_size, digest_of(path))

        self.attempt(take)

    def adopt_unclaimed(self, claimed: set[str]) -> None:
        """Take in every file of the folder that no rank has claimed."""
        self.attempt(lambda: self.adopt(*sorted(set(sizes_under(self.folder)) - claimed)))


class PartEngine(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """DeepSpeed's CheckpointEngine, writing through `Part`: digests on the way, errors kept.

    DeepSpeed calls save() between its own barriers; an error raised there on one rank would leave
    the others waiting (deepspeed 0.19.8, runtime/engine.py: save_checkpoint).
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "keepstep"
        self.part: Part | None = None

    def create(self, info: Any) -> None:
        """A save begins; the staging folder is there already."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: `Part.save` makes the folders that it needs."""

    def save(self, state_dict: Any, path: str) -> None:
        if self.part is None:
            raise RuntimeError("DeepSpeed was asked to save outside of KeepstepTrainer's save path")
        part = self.part
        part.save(Path(path).relative_to(part.folder).as_posix(), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        # DeepSpeed stores its own classes beside the tensors, so weights_only cannot be used. The
        # files are this run's own: their sizes (and digests) were checked against the manifest.
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        return True

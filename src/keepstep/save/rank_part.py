"""One rank's part of a checkpoint: taken while training stands still, written while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from keepstep.policy.manifest import FileEntry
from keepstep.policy.strict import TextError, build, names_fault
from keepstep.run_folder.contents import digest_of, names_under
from keepstep.run_folder.files import BLOCK, CHUNK, DigestingFile
from keepstep.run_folder.storage import Storage
from keepstep.save.failure import Cause
from keepstep.save.shared_file import Share, merged
from keepstep.save.snapshot_memory import Arena, aligned
from keepstep.save.torch_files import (
    Memory,
    Nowhere,
    Recorder,
    bytes_of,
    memory_of,
    owned,
    torch_save,
    with_tensors,
)

Changes = Literal["anytime", "at_step", "never"]


@dataclass(frozen=True)
class Piece:
    """Elements of one tensor of a joint file that this rank stores.

    Attributes:
        offset: of the first one, in bytes from the beginning of the file.
        source: where they come from: a live tensor, of any shape.
        first: the first element taken from `source`, flattened.
        count: elements.
        dtype: in the file.
        changes: when `source` may: at an optimizer step, at any time (a buffer), or never.
    """

    offset: int
    source: torch.Tensor
    first: int
    count: int
    dtype: torch.dtype
    changes: Changes = "at_step"


@dataclass
class Report:
    """What one rank says when its part is written (or is not), for the main process to commit.

    Attributes:
        files: path relative to the checkpoint → what this rank alone wrote there.
        shares: path → this rank's share of a joint file.
        error: what went wrong, None when nothing did.
        seconds: of `stall` and (within it) `wait` and `hold`, `copy`, `write` and (within it)
            `digest`.
        bytes: written by this rank.
    """

    rank: int
    files: dict[str, FileEntry] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    error: Cause | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Report:
        """What `as_json` gave.

        Raises:
            TextError: it is not that, or names files outside of the checkpoint.
        """
        report: Report = build(Report, values)
        fault = names_fault({*report.files, *report.shares})
        if fault is not None:
            raise TextError(fault)
        return report


class Part:
    """What this rank writes of one checkpoint.

    What is to be written is taken at once, and written by `finish()`, in whichever thread calls it.
    (Without an arena there is no room to take a state dict: `save` writes it at once.)

    An error is kept, not raised: the other ranks are on their way to the next collective, and
    would wait there for this one. After the first error nothing more is written.

    Attributes:
        report: what has been written so far.
        error: the first thing that went wrong, None so far.
    """

    def __init__(
        self, folder: Path, rank: int, storage: Storage, arena: Arena | None = None
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.report = Report(rank)
        self.error: Exception | None = None
        self._storage = storage
        self._arena = arena
        self._later: list[Callable[[], None]] = []
        self._unsynced: list[Path] = []
        # A live tensor's memory → its snapshot, and the tensor: it must not be freed and reused.
        self._places: dict[Memory, tuple[torch.Tensor, torch.Tensor]] = {}
        if arena is not None:
            arena.start()

    def attempt(self, write: Callable[[], object]) -> None:
        """Run `write` unless this part already failed; keep its error."""
        if self.error is None:
            try:
                write()
            except Exception as error:
                self.error = error
                self.report.error = Cause.of(error, self.rank)

    def save(self, name: str, state: object, deferred: bool = False) -> None:
        """Store a state dict as `name`, in torch's zip format.

        `deferred`: its tensors do not change before the next optimizer step, and may be copied
        until then. Everything that is not a tensor is taken now.
        """
        if self._arena is None:
            # On CUDA torch copies one storage at a time: no room is needed for all of them.
            started = time.perf_counter()
            self.attempt(lambda: self._store(name, lambda file: torch_save(owned(state), file)))
            self._count("write", time.perf_counter() - started)
        else:
            recorder = Recorder()
            self.attempt(lambda: torch_save(self._snapshot(state, deferred, recorder), recorder))
            self._afterwards(lambda: self._store(name, recorder.replay))

    def write(self, name: str, content: bytes) -> None:
        """Store `content` as `name`."""
        self._afterwards(lambda: self._store(name, lambda file: file.write(content)))

    def weights(self, name: str, size: int, header: bytes, pieces: list[Piece]) -> None:
        """Store this rank's pieces of a joint file of `size` bytes, cast to their types.

        `header` is what the file begins with, of the rank that writes it, else empty.
        """
        if self._arena is not None:
            for piece in pieces:
                if piece.changes != "never":
                    self._place(piece.source, piece.changes == "at_step")
        self._afterwards(lambda: self._store_pieces(name, size, header, pieces))

    def adopt(self, *names: str) -> None:
        """Take in files that a library wrote: sync them, and read them once for their digest."""

        def take() -> None:
            for name in names:
                path = self.folder / name
                self._unsynced.append(path)
                self._enter(name, path.stat().st_size, digest_of(path))

        self._afterwards(take)

    def adopt_unclaimed(self, claimed: set[str]) -> None:
        """Take in every file of the folder that no rank has claimed."""
        self.attempt(lambda: self.adopt(*sorted(names_under(self.folder) - claimed)))
        self.finish()

    def begin_copy(self) -> None:
        """On CUDA: have the device begin to copy what is deferred. In the main thread."""
        if self._arena is not None:
            self.attempt(self._arena.begin_copy)

    def copy(self) -> None:
        """Copy what is deferred, and let the next optimizer step go on."""
        if self._arena is not None:
            started = time.perf_counter()
            self.attempt(self._arena.copy)
            self._arena.copied.set()
            self._count("copy", time.perf_counter() - started)

    def finish(self) -> None:
        """Write everything that is still to be written. Any one thread, after `copy()`."""
        started = time.perf_counter()
        for write in self._later:
            self.attempt(write)
        for path in self._unsynced:
            self.attempt(partial(self._storage.sync, path))
        self._later, self._unsynced, self._places = [], [], {}
        self._count("write", time.perf_counter() - started)

    def _afterwards(self, write: Callable[[], None]) -> None:
        self._later.append(write)

    def _snapshot(self, state: object, deferred: bool, recorder: Recorder) -> object:
        def place(tensor: torch.Tensor) -> torch.Tensor:
            copy = self._place(tensor, deferred)
            recorder.expect(copy)
            return copy

        return with_tensors(state, place)

    def _place(self, tensor: torch.Tensor, deferred: bool) -> torch.Tensor:
        """The snapshot of a live tensor: one for the same memory, however often it is met."""
        assert self._arena is not None
        key = memory_of(tensor)
        if key not in self._places:
            self._places[key] = self._arena.put(tensor, deferred), tensor
        return self._places[key][0].view(tensor.shape)

    def _store(self, name: str, write: Callable[[DigestingFile], object]) -> None:
        path = self.folder / name
        self._storage.make_folder(path.parent)
        with self._storage.create(path, sync=False) as file:
            write(file)
        self._unsynced.append(path)
        self._enter(name, file.bytes, file.xxh3_128)
        self._count("digest", file.digest_seconds)

    def _store_pieces(self, name: str, size: int, header: bytes, pieces: list[Piece]) -> None:
        extents: list[tuple[int, int]] = []
        bounce = self._arena.bounce if self._arena else aligned(CHUNK + BLOCK)

        def contents() -> Iterator[tuple[int, memoryview]]:
            if header:
                extents.append((0, len(header)))
                yield 0, memoryview(header)
            for piece in sorted(pieces, key=lambda piece: piece.offset):
                source, _ = self._places.get(memory_of(piece.source), (piece.source, None))
                for offset, content in _cast(piece, source, bounce):
                    extents.append((offset, content.nbytes))
                    yield offset, content

        if header or pieces:
            digest = self._storage.write_at(self.folder / name, size, contents())
            self.report.shares[name] = Share(size, merged(extents), digest)
            self.report.bytes += sum(length for _, length in extents)

    def _enter(self, name: str, size: int, digest: str) -> None:
        self.report.files[name] = FileEntry(self.rank, size, digest)
        self.report.bytes += size

    def _count(self, what: str, seconds: float) -> None:
        self.report.seconds[what] = self.report.seconds.get(what, 0.0) + seconds


class Rehearsal(Part):
    """Takes what any part takes, tensors left empty, and writes nothing."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, rank, Storage())

    def save(self, name: str, state: object, deferred: bool = False) -> None:
        def hollow(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(0, dtype=tensor.dtype)

        self.attempt(lambda: torch_save(with_tensors(state, hollow), Nowhere()))

    def _afterwards(self, write: Callable[[], None]) -> None:
        """What is taken is not stored."""


def _cast(
    piece: Piece, source: torch.Tensor, bounce: torch.Tensor
) -> Iterator[tuple[int, memoryview]]:
    """(offset in the file, content) of a piece, in its type, some megabytes at a time.

    The content lies in `bounce`, as far behind a block's beginning as it does in the file: so
    O_DIRECT can write all but its edges.
    """
    flat, size = source.detach().reshape(-1), piece.dtype.itemsize
    for begin in range(0, piece.count, CHUNK // size):
        count = min(CHUNK // size, piece.count - begin)
        offset = piece.offset + begin * size
        place = bounce[offset % BLOCK :][: count * size]
        place.view(piece.dtype).copy_(flat[piece.first + begin :][:count])
        yield offset, bytes_of(place)

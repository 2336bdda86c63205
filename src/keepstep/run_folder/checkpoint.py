"""One checkpoint on the disk: what its manifest says, and whether its files are what was written.

Damage is one thing, a disk that does not answer another: the one belongs in quarantine, the other
is passed by until it can be read again.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keepstep.errors import KeepstepError
from keepstep.output.units import counted
from keepstep.policy.completeness import differences
from keepstep.policy.manifest import (
    LONGEST_MANIFEST,
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    NewerFormatError,
    folder_name,
    step_of,
)
from keepstep.policy.selection import UnreadableError
from keepstep.policy.strict import TextError, build, name_fault, parse, shown
from keepstep.run_folder.contents import digest_of, sizes_of
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, read_evaluations
from keepstep.run_folder.safe_read import ABSENT, PAUSES, OddFileError, patiently, read_text

# What is read in less than a minute, at a rate that any disk reaches.
DIGEST_ALL_BELOW_BYTES = 60 * 500 * 10**6
TAGS = ("latest", "latest_universal")  # files that name the folder of DeepSpeed's shards
GONE = "it is not there any more: a run at work prunes, or somebody has removed it"
INDEX = "*.index.json"  # files that name the weights' files


class DamagedError(KeepstepError, ValueError):
    """A checkpoint whose files are not what was written; `step` and `path` say which.

    Attributes:
        faults: what differs, a sentence each.
    """

    def __init__(self, checkpoint: Checkpoint, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        text = damaged(checkpoint.path.name, self.faults)
        super().__init__(text, step=checkpoint.step, path=checkpoint.path)


def damaged(name: str, faults: Sequence[str]) -> str:
    """What is wrong with a checkpoint, in a sentence."""
    if faults[0] == GONE:
        return f"{name}: {GONE}"
    more = f" (and {counted(len(faults) - 1, 'more fault')})" if len(faults) > 1 else ""
    return f"{name} is damaged: {faults[0]}{more}"


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint of a run: its folder, and what its manifest says of the content.

    `RunFolder.checkpoints()` lists them, `Checkpoint.at(path)` reads one. That its manifest can be
    read says that it was committed; `verify` says whether its files are still what was written.
    transformers and PEFT load the weights: `from_pretrained(checkpoint.path)`. (With
    `save_weights: best` or `never` there may be none in it: `keepstep.export` makes them.)

    Attributes:
        path: the folder `checkpoint-<step>`.
        manifest: step, metrics, the processes that wrote it, files with sizes and digests.
        evaluated: what `keepstep evaluate` has measured of it afterwards.
    """

    path: Path
    manifest: Manifest
    evaluated: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The committed checkpoint in a folder, of whichever run.

        Args:
            path: the folder, or a link to it (`RUN/best`, `RUN/latest`).

        Returns:
            It, at its own path. Only its manifest has been read: see `verify`.

        Raises:
            ManifestError: there is none, or its manifest is not what was written.
            UnreadableError: it cannot be read now.

        Ranks: any.
        """
        return read_checkpoint(Path(path).resolve())

    @property
    def step(self) -> int:
        """Optimizer steps completed when it was saved."""
        return self.manifest.global_step

    @property
    def metrics(self) -> dict[str, float]:
        """The evaluation at this step, and those made afterwards, by full names (`eval_loss`);
        empty: there was none."""
        return {**self.evaluated, **self.manifest.metrics}

    def faults(self, deep: bool | None = False) -> list[str]:
        """What differs from the manifest: a sentence each, nothing when it is intact.

        Args:
            deep: True: every byte is read and digests are compared. False: ranks, names and sizes.
                None: digests too, if reading every byte takes less than a minute.

        Returns:
            The faults, an empty list for none.

        Raises:
            UnreadableError: it cannot be read now, though it was tried a few times.

        Ranks: any.
        """
        return faults_of(self, deep)

    def verify(
        self, deep: bool | None = False, progress: Callable[[int], None] = lambda count: None
    ) -> None:
        """Compare its files with the manifest.

        Args:
            deep: as for `faults`.
            progress: told of the bytes that are read for digests, chunk by chunk.

        Raises:
            DamagedError: they are not what was written.
            UnreadableError: it cannot be read now, though it was tried a few times.

        Ranks: any.
        """
        found = faults_of(self, deep, progress)
        if found:
            raise DamagedError(self, found)


@dataclass(frozen=True)
class Unfit:
    """Why a folder named like a checkpoint cannot be taken.

    Attributes:
        kind: `damaged`: its manifest is not what was written; `unreadable`: it cannot be read now;
            `newer`: a newer keepstep wrote it.
        reason: in words.
    """

    kind: Literal["damaged", "unreadable", "newer"]
    reason: str


def look_at(folder: Path, any_name: bool = False) -> Checkpoint | Unfit | None:
    """The checkpoint in `folder`, or why there is none to be had; None: it has no manifest.

    Args:
        any_name: it is no run's: the folder may be called otherwise than `checkpoint-<step>`.
    """
    try:
        manifest = Manifest.from_json(read_text(folder / MANIFEST_NAME, LONGEST_MANIFEST))
    except ABSENT:
        return None
    except NewerFormatError as error:
        return Unfit("newer", str(error))
    except ManifestError as error:
        return Unfit("damaged", str(error))
    except OddFileError as error:
        return Unfit("damaged", f"{MANIFEST_NAME}: {error}")
    except OSError as error:
        return Unfit("unreadable", f"its {MANIFEST_NAME} cannot be read: {error}")
    if not any_name and folder.name != folder_name(manifest.global_step):
        return Unfit("damaged", f"its manifest is of step {manifest.global_step}")
    return Checkpoint(folder, manifest, read_evaluations(folder, manifest))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The committed checkpoint at a path, of whichever run.

    Args:
        folder: `checkpoint-<step>`.

    Returns:
        It, its manifest read and checked; its files are not looked at.

    Raises:
        UnreadableError: it cannot be read now.
        ManifestError: there is none.

    Ranks: any.
    """
    found = look_at(folder)
    if found is None:
        raise ManifestError(
            f"{folder} holds no readable {MANIFEST_NAME}: there is none", path=folder
        )
    if isinstance(found, Checkpoint):
        return found
    if found.kind == "unreadable":
        raise UnreadableError(f"{folder}: {found.reason}", path=folder)
    raise ManifestError(f"{folder} holds no readable {MANIFEST_NAME}: {found.reason}", path=folder)


def faults_of(
    checkpoint: Checkpoint,
    deep: bool | None = False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What differs from a checkpoint's manifest.

    Args:
        checkpoint: of whichever run.
        deep: whether digests are compared too, which reads every byte; None: if that takes less
            than a minute. Ranks, names and sizes always are.
        progress: told of the bytes that are read for digests, chunk by chunk.

    Returns:
        A line for each difference; empty: none; `GONE` alone: the folder has gone meanwhile.

    Raises:
        UnreadableError: it cannot be read now, though it was tried a few times.

    Ranks: any.
    """
    manifest = checkpoint.manifest
    if deep is None:
        deep = manifest.total_bytes < DIGEST_ALL_BELOW_BYTES
    try:
        sizes = patiently(lambda: sizes_of(checkpoint.path, manifest.files))
        found = differences(manifest, sizes)
        if not found:
            found = list(_names_elsewhere(checkpoint))
        if deep and not found:
            found = list(_changed(checkpoint, progress))
        if found and not os.path.lexists(checkpoint.path):
            return [GONE]  # not a fault of the disk
    except OSError as error:
        raise UnreadableError(
            f"{checkpoint.path.name} cannot be read: {error}",
            step=checkpoint.step,
            path=checkpoint.path,
            errno=error.errno,
        ) from error
    return found


def _changed(checkpoint: Checkpoint, progress: Callable[[int], None]) -> Iterator[str]:
    for name, entry in sorted(checkpoint.manifest.files.items()):
        path = checkpoint.path / name
        try:
            digest = patiently(lambda path=path: digest_of(path, progress))  # type: ignore[misc]
        except ABSENT:
            yield f"{name} is missing"
        else:
            if digest != entry.xxh3_128:
                yield f"{name}: content has changed (xxh3-128 differs)"


def _names_elsewhere(checkpoint: Checkpoint) -> Iterator[str]:
    """Files that tell a loader of others are believed as far as these are the manifest's."""
    files, path = checkpoint.manifest.files, checkpoint.path
    try:
        for tag in [name for name in TAGS if name in files][:1]:  # the first is what is loaded
            folder = patiently(lambda: read_text(path / tag)).strip()  # noqa: B023
            listed = any(name.startswith(f"{folder}/") for name in files)
            if name_fault(folder) or not listed:
                yield f"{tag} names {shown(folder)}, and nothing is listed there"
        for index in fnmatch.filter(files, INDEX):
            text = patiently(lambda: read_text(path / index, LONGEST_MANIFEST))  # noqa: B023
            above = index.rpartition("/")[0]
            names = set(build(dict[str, str], _weight_map(text), index).values())
            named = {f"{above}/{name}" if above else name for name in names}
            if not named <= files.keys():
                yield f"{index} names {shown(min(named - files.keys()))}, which is not listed"
    except (TextError, OddFileError) as error:
        yield f"a file that names others: {error}"


def _weight_map(text: str) -> object:
    values = parse(text)
    return values.get("weight_map") if isinstance(values, dict) else values


class Listing:
    """What is in the folders of a run that are named like checkpoints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[Path, tuple[Any, Checkpoint | Unfit | None]] = {}
        self._held: tuple[dict[str, Checkpoint | Unfit | None], dict[str, bool]] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, all answers are those of one look."""
        before = self._held
        self._held = before or (self.found(), self.names())
        try:
            yield
        finally:
            self._held = before

    def found(self) -> dict[str, Checkpoint | Unfit | None]:
        """Each folder's name and what is in it; None: it has no manifest.

        Raises:
            OSError: the run's folder cannot be listed, though it was tried a few times.
        """
        if self._held is not None:
            return self._held[0]
        names = [name for name, is_link in self.names().items() if not is_link]
        return {name: self._manifest_in(self._path / name) for name in names}

    def names(self) -> dict[str, bool]:
        """What is named like a checkpoint, and whether it is a link. Raises as `found`."""
        if self._held is not None:
            return self._held[1]

        def look() -> dict[str, bool]:
            with os.scandir(self._path) as entries:
                return {e.name: e.is_symlink() for e in entries if step_of(e.name) is not None}

        try:
            return patiently(look)
        except ABSENT:
            return {}

    def wait_until_readable(self) -> None:
        """Give a disk that does not answer a moment."""
        for pause in PAUSES:
            found = self.found().values()
            if not any(isinstance(f, Unfit) and f.kind == "unreadable" for f in found):
                return
            time.sleep(pause)

    def _manifest_in(self, folder: Path) -> Checkpoint | Unfit | None:
        """What is in a folder. A manifest is read again only when its file has changed: thousands
        cost a stat each."""
        path = folder / MANIFEST_NAME
        try:
            status = os.lstat(path)
        except ABSENT:
            return None
        except OSError as error:
            return Unfit("unreadable", f"its {MANIFEST_NAME} cannot be read: {error}")
        signature = _signature(status), _signature_of(folder / EVALUATIONS_NAME)
        known = self._read.get(path)
        if known is not None and known[0] == signature:
            return known[1]
        found = look_at(folder)
        if not (isinstance(found, Unfit) and found.kind == "unreadable"):
            self._read[path] = signature, found
        return found


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        return _signature(os.lstat(path))
    except OSError:  # absent, as a rule
        return None

"""What is put aside: pruned and replaced checkpoints, leftovers of attempts, damaged checkpoints.

A folder goes in one rename, so that it is never seen half removed; and every attempt has a part of
the trash, which the next owner takes away in one rename as well: whoever still wants to put
something there cannot. Where a file system renames only files (the lower layer of an overlay), the
manifest is the first to go: without it a folder is no checkpoint.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from pathlib import Path

from keepstep.policy.completeness import differences
from keepstep.policy.manifest import (
    LONGEST_MANIFEST,
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    folder_name,
    step_of,
)
from keepstep.run_folder.contents import sizes_of, sizes_under
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import OddFileError, is_file, read_text
from keepstep.run_folder.setbacks import Setbacks
from keepstep.run_folder.storage import FULL, TEMPORARY, NotOwnerError, Storage

logger = logging.getLogger(__name__)

REPLACED = "replaced-"  # the name of a checkpoint whose step is being saved again
SWEPT = "swept-"  # beside staging and trash: what earlier attempts left there
PRUNED = "manifest.pruned.json"  # a manifest's name in a folder that is removed where it lies


def manifest_first(path: Path) -> tuple[bool, str]:
    """The order in which a checkpoint is taken apart: it is none from the first rename on."""
    return path.name != MANIFEST_NAME, path.name


def manifest_last(path: Path) -> tuple[bool, str]:
    """The order in which it is put together again."""
    return path.name == MANIFEST_NAME, path.name


class Trash:
    """An attempt's part of the trash. One process: the main one.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, run: RunFolder, storage: Storage, owner: str, setbacks: Setbacks) -> None:
        self.folder = run.trash / owner
        self._run, self._storage, self._setbacks = run, storage, setbacks

    def sweep(self) -> None:
        """Remove what earlier attempts staged and threw away. First: the disk may be full.

        What cannot be removed stays, and is told; the next start tries again.
        """
        for place in (self._run.staging, self._run.trash):
            swept = self._run.private / f"{SWEPT}{place.name}-{secrets.token_hex(4)}"
            try:
                if place.exists():
                    self._storage.rename(place, swept)
            except NotOwnerError:
                raise
            except OSError:
                continue  # it is emptied where it lies
        for place in (*self._leftovers(), self._run.staging, self._run.trash):
            with self._setbacks.allowed(f"{place.name} is not removed"):
                for aside in sorted(place.glob(f"*/{REPLACED}*")):
                    self.settle(aside)
                self._storage.remove(place, aside=place.name.startswith(SWEPT))
        for temporary in sorted(self._run.private.glob(TEMPORARY)):
            with self._setbacks.allowed(f"{temporary.name} is not removed"):
                # (The owner's may be that of a launch of this moment.)
                if not temporary.name.startswith(f".{self._run.owner_file.name}."):
                    self._storage.remove(temporary)
        for name in self._run.folders():
            with self._setbacks.allowed(f"{name} is not removed"):
                marker = self._run.path / name / PRUNED
                if is_file(marker) and self._is_this_runs(marker):
                    self.empty(marker.parent)

    def clear(self) -> None:
        """Try once more to remove what this attempt threw away."""
        for aside in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            with self._setbacks.allowed(f"{aside.name} is not removed"):
                if aside.name.startswith(REPLACED):
                    self.settle(aside)
                self.empty(aside)

    def take(self, folder: Path) -> Path:
        """Put a checkpoint's folder aside; returns where it lies, without needing any space.

        Raises:
            FileNotFoundError: somebody else (`keepstep prune`) was faster.
        """
        name = f"{folder.name}-{secrets.token_hex(3)}"
        aside = self.folder / name
        try:
            self._storage.make_folder(self.folder)
        except OSError as error:
            if error.errno not in FULL:
                raise
            aside = self._run.private / f"{SWEPT}{name}"
        try:
            self._storage.rename(folder, aside)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._storage.rename(folder / MANIFEST_NAME, folder / PRUNED)
            return folder
        return aside

    def make_way(self, target: Path) -> Path | None:
        """Put aside the checkpoint of the same step, of a branch that this attempt went back from;
        None: there is none.

        It is kept whole until its successor stands in its place: see `settle`.

        Raises:
            FileExistsError: what is there is not this run's.
        """
        if not os.path.lexists(target):
            return None
        if target.name not in {c.path.name for c in self._run.checkpoints()}:
            raise in_the_way(target)
        self._storage.make_folder(self.folder)
        aside = self.folder / f"{REPLACED}{target.name}"
        if aside.exists():
            self._storage.remove(aside)
        self._storage.move(target, aside, manifest_first)
        return aside

    def settle(self, aside: Path) -> None:
        """Put back what had to make way, if its successor has not come; keep it elsewhere, if it
        has and somebody had pinned this one. What is there afterwards may be removed.

        Raises:
            FileExistsError: neither: something else is in its place.
        """
        target = self._run.path / aside.name.removeprefix(REPLACED)
        if step_of(target.name) is None:
            return  # nothing of ours
        try:
            text = read_text(aside / MANIFEST_NAME, LONGEST_MANIFEST)
            manifest = Manifest.from_json(text)
        except (FileNotFoundError, NotADirectoryError, OddFileError, ManifestError):
            return  # its removal had begun: the successor was in place
        if (target / MANIFEST_NAME).exists():
            if manifest.global_step in self._run.pinned():
                self._keep_elsewhere(aside, manifest)
            return
        here = sizes_of(aside, manifest.files)
        there = sizes_under(target) if target.is_dir() and not target.is_symlink() else {}
        if differences(manifest, {**here, **there}):
            return
        if not os.path.lexists(target):
            self._storage.move(aside, target, manifest_last)
        elif set(there) == set(manifest.files) - set(here):  # moved file by file, and killed there
            self._storage.move_content(aside, target, manifest_last)
        else:
            raise in_the_way(target)

    def empty(self, aside: Path) -> None:
        """Remove what was put aside; its manifest first, so that nobody restores a part."""
        with self._setbacks.allowed(f"{aside.name} is not removed"):
            self._storage.remove(aside / MANIFEST_NAME)
            if (aside / PRUNED).exists():  # the last to go: without it the rest is nobody's
                for child in sorted(aside.iterdir()):
                    if child.name != PRUNED:
                        self._storage.remove(child)
            self._storage.remove(aside, aside=aside.parent != self._run.path)

    def _keep_elsewhere(self, aside: Path, manifest: Manifest) -> None:
        """A pin says: whatever happens. Its step is another checkpoint's now; the pin ends."""
        place = self._run.pinned_aside / f"attempt-{manifest.attempt}"
        self._storage.make_folder(place)
        target = place / folder_name(manifest.global_step)
        self._storage.move(aside, target, manifest_first)
        self._storage.remove(self._run.pins / str(manifest.global_step))
        logger.warning(
            "the pinned %s of attempt %s lies in %s now: a branch has saved that step again",
            *(target.name, manifest.attempt, target.relative_to(self._run.path)),
        )

    def _leftovers(self) -> list[Path]:
        return sorted(self._run.private.glob(f"{SWEPT}*"))

    def _is_this_runs(self, marker: Path) -> bool:
        try:
            manifest = Manifest.from_json(read_text(marker, LONGEST_MANIFEST))
        except (OddFileError, ManifestError):
            return False
        return manifest.run_id == self._run.run_id()


def in_the_way(target: Path) -> FileExistsError:
    """The error of a save whose folder's name is taken by something that is not to be touched."""
    return FileExistsError(errno.EEXIST, "in the way, and not this run's", str(target))

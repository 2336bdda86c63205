"""What is put aside before it is removed: pruned and replaced checkpoints, leftovers of attempts.

A folder goes in one rename, so that it is never seen half removed; and every attempt has a part of
its own, which the next owner takes away in one rename as well: whoever still wants to put something
there cannot.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .manifest import MANIFEST_NAME, Manifest, ManifestError, differences
from .runfolder import RunFolder
from .storage import Storage, sizes_of

REPLACED = "replaced-"  # the name of a checkpoint whose step is being saved again
SWEPT = "swept-"  # beside staging and trash: what earlier attempts left there


class Trash:
    """An attempt's part of the trash. One process: the main one.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, run: RunFolder, storage: Storage, owner: str) -> None:
        self.folder = run.trash / owner
        self._run, self._storage = run, storage

    def sweep(self) -> None:
        """Remove what earlier attempts staged and threw away. First: the disk may be full."""
        self._restore_replaced()
        for place in (self._run.staging, self._run.trash):
            if place.exists():
                swept = f"{SWEPT}{place.name}-{secrets.token_hex(4)}"
                self._storage.rename(place, self._run.private / swept)
        for swept_folder in sorted(self._run.private.glob(f"{SWEPT}*")):
            self._storage.remove(swept_folder)

    def take(self, folder: Path) -> Path:
        """Put a checkpoint's folder aside; returns where it lies.

        Raises:
            FileNotFoundError: somebody else (`keepstep prune`) was faster.
        """
        aside = self.folder / f"{folder.name}-{secrets.token_hex(3)}"
        self._storage.make_folder(self.folder)
        self._storage.rename(folder, aside)
        return aside

    def make_way(self, target: Path) -> Path | None:
        """Put aside the checkpoint of the same step, of a branch that this attempt went back from;
        None: there is none.

        It is kept whole until its successor stands in its place: see `_restore_replaced`.

        Raises:
            ManifestError: what is there is not this run's.
        """
        if not os.path.lexists(target):
            return None
        if target.name not in {c.path.name for c in self._run.checkpoints()}:
            raise ManifestError(f"{target.name} is in the way, and is not this run's")
        self._storage.make_folder(self.folder)
        aside = self.folder / f"{REPLACED}{target.name}"
        if aside.exists():
            self._storage.remove(aside)
        self._storage.rename(target, aside)
        return aside

    def empty(self, aside: Path) -> None:
        """Remove what was put aside; its manifest first, so that nobody restores a part."""
        self._storage.remove(aside / MANIFEST_NAME)
        self._storage.remove(aside)

    def _restore_replaced(self) -> None:
        """A commit killed between putting the old folder aside and placing the new: undo it."""
        for aside in self._run.trash.glob(f"*/{REPLACED}*") if self._run.trash.is_dir() else []:
            target = self._run.path / aside.name.removeprefix(REPLACED)
            try:
                manifest = Manifest.from_json((aside / MANIFEST_NAME).read_text())
            except (OSError, ManifestError):
                continue  # its removal had begun: the successor was in place
            complete = not differences(manifest, sizes_of(aside, manifest.files))
            if complete and not os.path.lexists(target):
                self._storage.rename(aside, target)

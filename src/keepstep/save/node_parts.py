"""A run whose folder lies on each machine's own disk: what the other machines do with theirs.

The main process commits its own machine's part last, when all others stand. Such a checkpoint is
nothing to go on from alone; the mirror puts the parts together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from xxhash import xxh3_128_hexdigest

from keepstep.policy.manifest import WHOLE_NAME, FileEntry, Manifest, folder_name
from keepstep.policy.retention import Decision
from keepstep.ranks import collectives
from keepstep.ranks.nodes import Nodes
from keepstep.run_folder.ownership import Owner, take_over
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter


class NodeParts:
    """The disks of all machines. Ranks: any; nothing is collective.

    Attributes:
        nodes: the machines.
        writer: of this machine's folder, on its first rank; None on other ranks, and on the machine
            of the main process, which has a writer of its own.
    """

    def __init__(self, nodes: Nodes, run: RunFolder, storage: Storage) -> None:
        self.nodes = nodes
        self._run, self._storage = run, storage
        self.writer: RunWriter | None = None

    def begin(self, token: str, facts: tuple[str, int]) -> None:
        """Own this machine's folder, as the main process owns its own.

        Args:
            token: the owner's.
            facts: the run's name, and the number of the attempt before this one.
        """
        if collectives.is_main() or not self.nodes.acts:
            return
        take_over(self._run, self._storage, token)
        self._storage.guard(Owner(self._run, token).check)
        self.writer = RunWriter(self._run, self._run.policy(), self._storage, token)
        self.writer.run_id, self.writer.attempt = facts
        self.writer.start()

    def stage(self, step: int) -> None:
        """A folder for this machine's part."""
        if self.writer is not None:
            self.writer.stage(step)

    def commit(self, manifest: Manifest) -> None:
        """Make what is staged here this machine's part of a checkpoint."""
        if self.writer is not None:
            commit_part(self.writer, manifest, self.split(manifest))

    def tidy(self, step: int, kept: Collection[int]) -> None:
        """Remove what is staged for a step, and the parts of all steps that are not kept: the main
        process decides on retention. What cannot go now goes later."""
        if self.writer is None:
            return
        with self.writer.setbacks.allowed("not all is removed that is kept no more"):
            self.writer.discard(step)
            self.writer.trash.clear()
            there = [checkpoint.step for checkpoint in self._run.checkpoints()]
            gone = [Decision(s, False, "as the main process") for s in there if s not in kept]
            self.writer.discard_all(gone)
            self.writer.point()

    def split(self, manifest: Manifest) -> dict[str, FileEntry]:
        """Those files of a checkpoint that this machine's ranks have written."""
        here = self.nodes.here
        files = manifest.files.items()
        return {name: entry for name, entry in files if self.nodes.of(entry.rank) == here}


def commit_part(
    writer: RunWriter, whole: Manifest, files: Mapping[str, FileEntry], **facts: Any
) -> Checkpoint:
    """Commit these files of a checkpoint, and the manifest of all of them beside."""
    content = whole.to_json().encode()
    writer.storage.write(writer.staging / folder_name(whole.global_step) / WHOLE_NAME, content)
    rank = min(entry.rank for entry in files.values())
    own = FileEntry(rank, len(content), xxh3_128_hexdigest(content))
    return writer.commit(replace(whole, files={**files, WHOLE_NAME: own}), **facts)

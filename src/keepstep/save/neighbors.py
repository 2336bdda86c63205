"""What the main process's machine takes from the other ones, where the run folder is each machine's
own: its disk was lost, or it had no part in the newest attempts.

The run's log, which one machine alone has to its end; and, of each checkpoint that the machines
have together, what belongs to it: its files come when it is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME, Manifest, folder_name
from keepstep.policy.node_parts import left_over, runs_of, to_show, whose_log
from keepstep.policy.selection import SelectionError
from keepstep.ranks import collectives
from keepstep.run_folder.parts import part_of, whole_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, LONGEST_LOG, read_bytes
from keepstep.run_folder.storage import Storage
from keepstep.save.node_parts import NodeParts, Sources


class Neighbors:
    """What the main process's machine lacks, and another one has.

    Attributes:
        together: what the machines have together, and who has which file.
    """

    def __init__(
        self, run: RunFolder, parts: NodeParts, run_elsewhere: Callable[[], str | None]
    ) -> None:
        """Ranks: all (collective).

        Args:
            run_elsewhere: the name of the run whose checkpoints lie elsewhere; None: none do, or
                nobody knows.

        Raises:
            SelectionError: on every rank: nothing tells which run this is.
        """
        self._run, self._parts = run, parts
        parts.hear()
        parts.run_id = collectives.on_main(
            "finding out which run this is", lambda: self._which(run_elsewhere)
        )
        self.together: Sources = parts.intact()
        # The newest attempt that the main process's own folder tells of.
        own = run.attempts() if collectives.is_main() else []
        self._known = max((attempt.number for attempt in own), default=0)
        self._history = self._ask_history()
        self._manifests = self._ask_manifests()

    def _which(self, run_elsewhere: Callable[[], str | None]) -> str | None:
        """The main process's own; else that of the mirror; else the others'."""
        own = self._run.run_id()
        runs = runs_of(self._parts.machines.values())
        if own is not None or not runs:
            return own
        there = run_elsewhere()
        if there is None and len(runs) > 1:
            told = "; ".join(f"run {name} on {', '.join(hosts)}" for name, hosts in runs.items())
            raise SelectionError(
                f"this machine has nothing of the run, and the others are of several: {told}\n"
                f"    Hint: move {self._run.path} away on those that are not meant.",
                path=self._run.path,
            )
        return there or next(iter(runs))

    def _ask_history(self) -> dict[str, bytes]:
        parts = self._parts
        source = None if parts.run_id is None else whose_log(parts.machines, parts.run_id)
        if source is None:
            return {}
        return collectives.on_one(source, "reading the run's log", lambda: _history(self._run))

    def _ask_manifests(self) -> list[Manifest]:
        if not self._parts.machines:
            return []
        lacking = to_show(self._parts.machines, self.together)

        def read(step: int) -> str:
            here = {c.step: c for c in self._run.checkpoints(any_run=True)}
            return whole_of(here[step]).manifest.to_json()

        texts = [
            collectives.on_one(source, "asking for a manifest", partial(read, step))
            for step, source in lacking.items()
        ]
        return [Manifest.from_json(text) for text in texts]

    def take(self, storage: Storage, staging: Path) -> None:
        """What was asked for into the run folder. Ranks: the main process, which owns it by now.

        Args:
            staging: a folder of the run that a later attempt sweeps.

        Raises:
            OSError: of the disk.
        """
        storage.make_folder(self._run.private)
        files = self._run.history()
        for name, path in files.items():
            if name in self._history:
                storage.replace(path, self._history[name])
        for manifest in self._manifests:
            self._show(manifest, storage, staging)

    def _show(self, manifest: Manifest, storage: Storage, staging: Path) -> None:
        """A part of a checkpoint without any of its files: then it can be chosen."""
        name = folder_name(manifest.global_step)
        target, folder = self._run.path / name, staging / name
        if os.path.lexists(target):
            if name in self._run.in_the_way():
                return  # somebody else's
            storage.make_folder(staging)
            storage.rename(target, staging / f"other-{name}")
        part, content = part_of(manifest, ())
        storage.make_folder(folder)
        storage.write(folder / WHOLE_NAME, content)
        storage.write(folder / MANIFEST_NAME, part.to_json().encode())
        storage.rename(folder, target)

    def left_over(self, takeable: Collection[int]) -> dict[int, list[str]]:
        """Checkpoints that cannot be had any more, though a machine has a part: step → hosts.
        Ranks: the main process."""
        run = self._run.run_id()
        if run is None or not self._parts.machines:
            return {}
        return left_over(self._parts.machines, run, self._known, takeable)


def _history(run: RunFolder) -> dict[str, bytes]:
    found = {}
    for name, path in run.history().items():
        try:
            found[name] = read_bytes(path, LONGEST_LOG)
        except ABSENT:
            continue
    return found

"""A run whose folder lies on each machine's own disk (`node_local`).

The main process commits its own machine's part last, when all others stand. What a machine lacks of
a checkpoint that is gone on from, the others give it over the network; where one is lost, a mirror.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from keepstep.policy.completeness import on_machine
from keepstep.policy.manifest import WHOLE_NAME, Manifest, folder_name
from keepstep.policy.node_parts import Machine, together
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Decision
from keepstep.ranks import collectives
from keepstep.ranks.console import progress
from keepstep.ranks.nodes import Nodes
from keepstep.run_folder.ownership import Owner, take_over
from keepstep.run_folder.parts import held_in, part_of
from keepstep.run_folder.place import Place
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.node_exchange import exchange

logger = logging.getLogger(__name__)
Sources = dict[int, dict[str, int]]  # step → file → rank that has it


class PartWriter(RunWriter):
    """Writes a machine's part of what an attempt saves. The run's log is the main process's."""

    def record(self, event: str, **facts: Any) -> None:
        """No line: it would lack those of the attempts that this machine had no part in."""


class NodeParts:
    """The disks of all machines.

    Attributes:
        nodes: the machines.
        writer: of this machine's folder, on its first rank; None on other ranks.
        machines: what each machine's folder told at the last look, by its first rank.
        run_id: whose checkpoints count; None: any run's.
        layout: how this attempt's ranks share state out, once it has chosen what it goes on from.
    """

    def __init__(self, nodes: Nodes, run: RunFolder, storage: Storage) -> None:
        self.nodes = nodes
        self.writer: RunWriter | None = None
        self.machines: dict[int, Machine] = {}
        self.run_id: str | None = None
        self.layout = ParallelLayout(collectives.world_size())
        self._run, self._storage = run, storage

    def look(self) -> Sources:
        """The checkpoints that the machines have together, and who has which file. Ranks: all
        (collective)."""
        self.hear()
        return self.together()

    def intact(self) -> Sources:
        """The same, by what was heard, without newest ones whose files are not what was written, as
        far as comparing them takes less than a minute. Ranks: all (collective)."""
        found = self.together()
        while found and self.is_damaged(max(found)):
            del found[max(found)]
        return found

    def hear(self) -> None:
        """What each machine's folder tells. Ranks: all (collective)."""
        what = "looking at each machine's parts of checkpoints"
        here = collectives.on_all(what, lambda: self._machine() if self.nodes.acts else None)
        self.machines = collectives.gather_some(here)

    def _machine(self) -> Machine:
        log = self._run.log()
        newest = max((event["attempt"] for event in log), default=0)
        told = (newest, len(log)), held_in(self._run)
        return Machine(self.nodes.host, self._run.run_id(), *told)

    def together(self) -> Sources:
        """What they have together, by what was heard. Ranks: any."""
        held = {rank: machine.parts for rank, machine in self.machines.items()}
        return together(held, self.run_id)

    def is_damaged(self, step: int) -> bool:
        """Whether any machine's part of a checkpoint is not what was written there, compared as by
        `look`. Ranks: all (collective)."""
        what = f"comparing each machine's part of checkpoint-{step}"
        (damaged,) = collectives.any_of(collectives.on_all(what, partial(self._is_damaged, step)))
        return damaged

    def _is_damaged(self, step: int) -> bool:
        if not self.nodes.acts:
            return False
        here = {c.step: c for c in self._run.checkpoints(any_run=True)}.get(step)
        if here is None:
            return False
        bar = progress(f"verifying this machine's part of {here.path.name}")
        with bar as tell, self._run.reading(here.manifest.total_bytes, tell):
            faults = self._run.faults(here, deep=None)
        if faults:
            logger.warning("this machine's part of checkpoint-%s: %s", step, faults[0])
        return bool(faults)

    def begin(
        self, token: str, main: RunWriter | None, facts: tuple[str, int], mirror: str | None
    ) -> None:
        """Own this machine's folder, as the main process owns its own. Ranks: all, each for itself.

        Args:
            token: the owner's.
            main: the main process's writer, there.
            facts: the run's name, and the number of the attempt before this one.
            mirror: the run's address there.
        """
        if not self.nodes.acts:
            return
        self.writer = main or self._take_over(token, facts)
        place = Place(self.nodes.host, self.machines[0].host, mirror)
        with self.writer.setbacks.allowed("where the run's other parts are is not written down"):
            self._storage.replace(self._run.place, place.as_text())

    def _take_over(self, token: str, facts: tuple[str, int]) -> PartWriter:
        take_over(self._run, self._storage, token)
        self._storage.guard(Owner(self._run, token).check)
        writer = PartWriter(self._run, self._run.policy(), self._storage, token)
        writer.run_id, writer.attempt = facts
        writer.start()
        return writer

    @property
    def _other(self) -> RunWriter | None:
        """This machine's writer, if it is not the main process's, which acts by itself."""
        return None if collectives.is_main() else self.writer

    def stage(self, step: int) -> None:
        """A folder for this machine's part. Ranks: all, each for itself; as the following."""
        if self._other is not None:
            self._other.stage(step)

    def commit(self, manifest: Manifest) -> None:
        """Make what is staged here this machine's part of a checkpoint."""
        if self._other is not None:
            commit_part(self._other, manifest, self.written_here(manifest))

    def tidy(self, step: int, kept: Collection[int]) -> None:
        """Remove what is staged for a step, and the parts of all steps that are not kept: the main
        process decides on retention. What cannot go now goes later."""
        writer = self._other
        if writer is None:
            return
        with writer.setbacks.allowed("not all is removed that is kept no more"):
            writer.discard(step)
            writer.trash.clear()
            gone = [Decision(s, False, "as the main process") for s in writer.steps()]
            writer.discard_all([decision for decision in gone if decision.step not in kept])
            writer.point()

    def end(self, status: dict[str, Any]) -> None:
        """Say on this machine, too, how the attempt ended."""
        if self._other is not None:
            self._other.end(status)

    def written_here(self, manifest: Manifest) -> set[str]:
        """Those files of a checkpoint that this machine's ranks have written."""
        return written_on(self.nodes, self.nodes.here, manifest)

    def loaded_here(self, manifest: Manifest) -> set[str]:
        """Those that they will load, as many as there are now."""
        everyone, here = range(collectives.world_size()), self.nodes.here
        ranks = [rank for rank in everyone if self.nodes.of(rank) == here]
        return on_machine(manifest, ranks, self.layout)

    def complete(self, chosen: Checkpoint, sources: Mapping[str, int]) -> None:
        """Have on every machine what its ranks will load of a checkpoint that the machines have
        together. Ranks: all (collective).

        Args:
            chosen: with the manifest of the whole.
            sources: file → rank that has it.

        Raises:
            OSError: on every rank: what one of them met.
        """
        writer, manifest, name = self.writer, chosen.manifest, chosen.path.name

        def compare() -> tuple[Checkpoint | None, set[str]]:
            if writer is None:
                return None, set()
            found = {c.step: c for c in writer.run.checkpoints()}.get(chosen.step)
            return found, self.loaded_here(manifest) - set(found.manifest.files if found else ())

        here, lacking = collectives.on_all(f"looking for parts of {name}", compare)
        staged = None if writer is None or not lacking else writer.staging / name
        exchange(manifest, sources, lacking, self._run.path / name, staged, self._storage)

        def put() -> None:
            if writer is not None and staged is not None:
                self._put(writer, manifest, here, lacking)

        collectives.on_all(f"completing {name} on every machine", put)

    def _put(
        self, writer: RunWriter, manifest: Manifest, here: Checkpoint | None, got: set[str]
    ) -> None:
        """What has come, and what was here, in the place of what was here."""
        staged, had = writer.staging / folder_name(manifest.global_step), set[str]()
        if here is not None:
            had = set(here.manifest.files) - {WHOLE_NAME}
            for name in had:
                self._storage.make_folder((staged / name).parent)
                self._storage.link(here.path / name, staged / name, or_copy=True)
        part, content = part_of(manifest, had | got)
        self._storage.write(staged / WHOLE_NAME, content)
        writer.put_in_place(writer.sealed(staged, part))


def written_on(nodes: Nodes, node: int, manifest: Manifest) -> set[str]:
    """Those files of a checkpoint that the ranks of a machine have written, in the same attempt."""
    return {name for name, entry in manifest.files.items() if nodes.of(entry.rank) == node}


def commit_part(
    writer: RunWriter, whole: Manifest, names: Collection[str], **facts: Any
) -> Checkpoint:
    """Commit these files of a checkpoint, and the manifest of all of them beside."""
    manifest, content = part_of(whole, names)
    writer.storage.write(writer.staging / folder_name(whole.global_step) / WHOLE_NAME, content)
    return writer.commit(manifest, **facts)

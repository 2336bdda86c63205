"""Which checkpoints an attempt can go on from where they lie on several disks, or on a mirror."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol

from keepstep.policy.manifest import ManifestError
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Decision
from keepstep.policy.selection import Choice, SelectionError, UnreadableError
from keepstep.ranks import collectives
from keepstep.run_folder.parts import whole_of
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.safe_read import OddFileError
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.neighbors import Neighbors
from keepstep.save.node_parts import NodeParts, Sources

logger = logging.getLogger(__name__)
LOST = "the rest is lost or damaged, and there is no copy that can be had"


class Elsewhere(Protocol):
    """Where checkpoints lie beside the run folder: a mirror."""

    def bring(
        self, run: RunFolder, storage: Storage, token: str, together: Collection[int] | None
    ) -> None:
        """What is newer there into the folder, which is the owner's of this token by now. Ranks:
        the main process.

        Args:
            together: the steps that all machines have together; None: they see one folder.
        """

    @property
    def url(self) -> str | None:
        """The run's address there. Ranks: any."""

    def run_id(self) -> str | None:
        """Of the run that is there; None: none is, or nobody knows. Ranks: the main process."""

    @property
    def steps(self) -> Collection[int] | None:
        """Of the checkpoints that were there at the start; None: that is not known. Ranks: the main
        process."""

    def complete(self, chosen: Checkpoint, wanted: set[str], writer: RunWriter) -> None:
        """Have these files of a checkpoint in a machine's folder. Ranks: the first of each
        machine."""


class Reach:
    """What lies on the disks of an attempt's machines, and elsewhere.

    Attributes:
        together: what the machines had together at the start, and who has which file; None: they
            see one folder, and what is there is there for all.
    """

    def __init__(
        self, run: RunFolder, parts: NodeParts | None = None, elsewhere: Elsewhere | None = None
    ) -> None:
        """Ranks: all (collective).

        Args:
            parts: the disks of the machines; None: they see one folder.
            elsewhere: where checkpoints lie beside the run folder.
        """
        self._run, self._parts, self._elsewhere = run, parts, elsewhere
        asked = elsewhere.run_id if elsewhere is not None else lambda: None
        self._neighbors = None if parts is None else Neighbors(run, parts, asked)
        self.together: Sources | None = self._neighbors.together if self._neighbors else None

    def bring(self, storage: Storage, token: str) -> None:
        """What other machines know, and what is newer elsewhere. Ranks: the main process, which
        owns the folder by now."""
        if self._neighbors is not None:
            self._neighbors.take(storage, self._run.staging / token)
        if self._elsewhere is not None:
            self._elsewhere.bring(self._run, storage, token, self.together)

    def takeable(self) -> Collection[int] | None:
        """The steps that can be had on all machines; None: they see one folder. Ranks: the main
        process."""
        if self.together is None:
            return None
        elsewhere = self._elsewhere.steps if self._elsewhere else None
        return {*self.together, *(elsewhere or ())}

    def lost(self, choice: Choice) -> dict[int, str]:
        """Newer checkpoints than the chosen one of which not all parts are there: step → why it is
        passed by. Ranks: the main process."""
        chosen = choice.step or 0
        left = {step: hosts for step, hosts in self._left_over().items() if step > chosen}
        told = {
            step: f"there is a part on {', '.join(hosts)}; {LOST}" for step, hosts in left.items()
        }
        if told:
            told[max(told)] += f": steps {chosen + 1} to {max(told)} are made again"
        return told

    def check_beginning(self, choice: Choice, request: str) -> None:
        """Whether a run may begin anew. Ranks: the main process.

        Raises:
            SelectionError: it had checkpoints, and none of them can be had; and nobody has said
                that it is to begin anew.
        """
        left = self._left_over()
        if choice.step is not None or not left or (request == "never" and not choice.under_way):
            return
        hosts = sorted({host for own in left.values() for host in own})
        raise SelectionError(
            f"there is a part of checkpoint-{max(left)} on {', '.join(hosts)}; {LOST}. "
            "There is nothing else to go on from\n"
            "    Hint: launch it again with the machine that is lacking, if its disk is left. Else "
            "the run can only begin anew: resume_from_checkpoint: never",
            step=max(left),
            path=self._run.path,
        )

    def _left_over(self) -> dict[int, list[str]]:
        takeable = self.takeable()
        if takeable is None or self._neighbors is None:
            return {}
        return self._neighbors.left_over(takeable)

    def discard_lost(self, writer: RunWriter, chosen: int) -> None:
        """Parts of older checkpoints that are whole nowhere any more go; one could be the best, and
        never be had. (Newer ones are of a branch that was left.) Ranks: the main process."""
        takeable = self.takeable()
        if takeable is None or self._elsewhere is None or self._elsewhere.steps is None:
            return  # nobody knows where they are
        parts = [c.step for c in self._run.checkpoints() if c.manifest.is_part]
        lost = [step for step in parts if step < chosen and step not in takeable]
        writer.discard_all([Decision(step, False, LOST) for step in lost])

    def mended(self, damaged: Checkpoint, writer: RunWriter) -> bool:
        """Whether a checkpoint that is damaged here has been brought once more from elsewhere.
        Ranks: the main process."""
        elsewhere = self._elsewhere
        if elsewhere is None or damaged.step not in (elsewhere.steps or ()):
            return False
        try:
            whole = whole_of(damaged)
            elsewhere.complete(whole, set(whole.manifest.files), writer)
        except NotOwnerError:
            raise
        except (ManifestError, OddFileError, UnreadableError, OSError) as error:
            logger.warning("%s is not brought once more: %s", damaged.path.name, error)
            return False
        return True

    def complete(self, chosen: Checkpoint | None, at_start: ParallelLayout | None = None) -> None:
        """Have on every machine what its ranks will load of a checkpoint of this run. Ranks: all
        (collective).

        Args:
            chosen: with the manifest of the whole.
            at_start: it is what the attempt goes on from, on ranks that share state out like this:
                no part counts that is damaged.

        Raises:
            OSError, UnreadableError: on every rank: what one of them met.
        """
        parts, elsewhere = self._parts, self._elsewhere
        if parts is None:
            return
        parts.layout = at_start or parts.layout
        if chosen is None or chosen.path.parent != self._run.path:
            return
        sources = self._intact(parts, chosen.step) if at_start else parts.look().get(chosen.step)
        if sources is not None:
            parts.complete(chosen, sources)
            return

        def bring() -> None:
            if parts.writer is not None and elsewhere is not None:
                elsewhere.complete(chosen, parts.loaded_here(chosen.manifest), parts.writer)

        collectives.on_all("bringing the checkpoint to every machine", bring)

    def _intact(self, parts: NodeParts, step: int) -> dict[str, int] | None:
        """Who has which file of a checkpoint that the machines had together at the start; None: not
        all of it is there, or some of it is damaged. Ranks: all (collective)."""
        together = self.together or {}
        if step not in together:
            return None
        compared = step == max(together)  # at the first look
        return None if not compared and parts.is_damaged(step) else together[step]

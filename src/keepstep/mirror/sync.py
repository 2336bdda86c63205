"""A mirror brought up to date by hand: `keepstep sync`.

It becomes the owner there by the number after the one that it has seen, and by no other: whoever
comes in between keeps the run, and an attempt that begins later takes it, as from an attempt.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from keepstep.mirror.download import check_run
from keepstep.mirror.evaluations import send_evaluations
from keepstep.mirror.history import history_to_send
from keepstep.mirror.listing import is_whole, look
from keepstep.mirror.owners import DeposedError, Owner, claim_as
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Entry, Store, StoreError
from keepstep.mirror.upload import Upload
from keepstep.output.progress import Tell
from keepstep.policy.mirror import left_behind, newest_owner, owner_name
from keepstep.policy.mirrored import RETENTION, history_in, read_retention, what_to_send
from keepstep.policy.retention import Policy
from keepstep.policy.strict import TextError, parse
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import is_same_checkpoint
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.parts import whole_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage

BY_HAND = "by-hand-"  # how the names of such owners begin
Sending = Callable[[Checkpoint], AbstractContextManager[Tell]]


class Sync:
    """One run and its mirror, compared.

    Attributes:
        owner: number and name of the newest owner there; 0 and empty: there was none.
        lacking: what the mirror's retention keeps and the mirror lacks, the newest first.
        parts: steps of those of which this machine has a part alone (`node_local`).
        superfluous: steps of what it keeps no more.
        leftovers: whether uploads that never ended, and removals, have left objects there.
    """

    def __init__(self, run: RunFolder, store: Store) -> None:
        """
        Raises:
            StoreError: of the store; OtherRunError: it holds another run.
        """
        check_run(run, store)
        self._run, self._store = run, store
        listed = look(store)
        names, there = listed.names, listed.found
        self._pinned = run.pinned()
        self._policy = self._mirrors_policy(names)
        here = {c.step: _whole(c) for c in run.checkpoints()}
        same = {s for s in here if s in there and self._is_there(here[s], there[s], names)}
        records = run.records_of(
            list(({**there, **here}).values()), self._pinned, self._policy.metric
        )
        steps, self.superfluous = what_to_send(records, self._policy, set(here) - same, set(there))
        in_part = {c.step for c in run.checkpoints() if c.manifest.is_part}
        self.parts = [step for step in steps if step in in_part]
        self.lacking = [here[step] for step in steps if step not in in_part]
        number = newest_owner(names)
        self.owner = number, self._token(number)
        self.leftovers = bool(left_behind(names, number, listed.copies.values()))

    def _is_there(self, here: Checkpoint, there: Checkpoint, names: Mapping[str, Entry]) -> bool:
        """Whether they are one, and all of it is there; or what is there is newer."""
        if there.manifest.attempt > here.manifest.attempt:
            return True
        same = is_same_checkpoint(here.manifest, there.manifest)
        return same and is_whole(self._store, str(there.path), there.manifest, names)

    @property
    def is_another_machines(self) -> bool:
        """Whether the newest owner there is no attempt of this run folder, and was not by hand."""
        number, token = self.owner
        return number > 0 and token != self._run.owner() and not token.startswith(BY_HAND)

    @property
    def is_this_folders(self) -> bool:
        """Whether it is this run folder's newest attempt."""
        number, token = self.owner
        return number > 0 and token == self._run.owner()

    def send_metrics(self) -> list[int]:
        """What was measured of checkpoints that are on both. No owner is asked: nothing is changed.

        Returns:
            The steps of which something new was told.
        """
        return send_evaluations(self._store, self._run)

    def send(self, sending: Sending) -> Iterator[dict[str, Any]]:
        """Become the owner; send what is lacking, one after the other; remove what is not kept.

        Args:
            sending: a block that the sending of a checkpoint is in; it gives what is told how far
                that is.

        Yields:
            What came of each, as a run tells it: `step`, `bytes`, `copied`, `found`, `seconds`; or
            `step` and `error`. At last `pruned`.

        Raises:
            StoreError: of the store; DeposedError: another machine has the run now.
        """
        owner = self._claim()
        keeper = Keeper(self._run, self._run.policy(), Storage())
        for checkpoint in self.lacking:
            began = time.monotonic()
            try:
                with sending(checkpoint) as tell:
                    sent = self._send(owner, checkpoint, tell)
            except StoreError:
                raise
            except OSError as error:  # of this disk: damaged, or pruned meanwhile
                yield {"step": checkpoint.step, "error": str(error)}
                continue
            seconds = round(time.monotonic() - began, 1)
            facts = {"step": checkpoint.step, **sent, "pruned": [], "seconds": seconds}
            keeper.record("mirror", url=self._store.url, **facts)
            yield facts
        self.send_metrics()  # of what has just been sent
        yield {"pruned": prune(self._store, owner, self._run, self._policy, self._pinned)}

    def _send(self, owner: Owner, checkpoint: Checkpoint, tell: Tell) -> dict[str, int]:
        upload = Upload(self._store, owner, checkpoint, tell=tell)
        upload.run(history_to_send(self._run, self._policy, self._pinned))
        return asdict(upload.sent)

    def _claim(self) -> Owner:
        token = f"{BY_HAND}{secrets.token_hex(4)}"
        owner = claim_as(self._store, token, self.owner[0] + 1)
        if owner is None:
            told = f"{self._store.url}: another machine has just taken the run there"
            raise DeposedError(told, fatal=True)
        return owner

    def _token(self, number: int) -> str:
        try:
            told = parse(self._store.get(owner_name(number)).decode(errors="replace"))
        except (FileNotFoundError, TextError):
            return ""
        return str(told.get("token", "")) if isinstance(told, dict) else ""

    def _mirrors_policy(self, names: Any) -> Policy:
        """The run's, with as many checkpoints as the mirror was last asked to keep."""
        policy, place = self._run.policy(), history_in(names).get(RETENTION)
        try:
            text = self._store.get(place).decode(errors="replace") if place else ""
            return replace(policy, limit=read_retention(text)[0].limit) if text else policy
        except (FileNotFoundError, TextError):
            return policy


def _whole(checkpoint: Checkpoint) -> Checkpoint:
    try:
        return whole_of(checkpoint)
    except (ValueError, OSError):  # damaged: sending it tells
        return checkpoint

"""What machines that share a run without a scheduler tell each other, in the run folder:

    .keepstep/machines/ID      a machine: replaced every second, by its own command alone
    .keepstep/machines/plan    what they have agreed on: replaced under the owner's lock

No clocks are compared: a machine is there as long as its file changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from keepstep.policy.machines import Machine, Plan
from keepstep.policy.strict import TextError, build, with_check
from keepstep.run_folder.by_hand import AtWorkError
from keepstep.run_folder.ownership import LOCK, LOCK_SECONDS, at_work, name_owner
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object
from keepstep.run_folder.storage import Storage

FOLDER, PLAN = "machines", "plan"
WAIT_SECONDS = 2.5  # for a sign: there is one each second, as a rule
ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Sign:
    """A machine's file.

    Attributes:
        machine: what it tells of itself.
        beat: another number each second.
        process: its command: host, process id, and when it began (see ownership.py).
        has_left: its command has ended.
        waits: no attempt is at work on it.
    """

    machine: Machine
    beat: int
    process: str
    has_left: bool = False
    waits: bool = True


class MachinesFolder:
    """Reads and writes these files.

    Args:
        run: the run folder; its private folder is made.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run, self._storage = run, Storage()
        self.path = run.private / FOLDER

    def make(self) -> None:
        """
        Raises:
            OSError: it cannot be made.
        """
        self._storage.make_folder(self.path)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands from what they do in such a block.

        Raises:
            OSError: a disk operation failed.
        """
        with self._storage.locked(self._run.private / LOCK, LOCK_SECONDS):
            yield

    def show(self, sign: Sign) -> None:
        """Write this machine's file. Raises OSError."""
        self._storage.show(self.path / sign.machine.id, with_check(json.dumps(asdict(sign))))

    def signs(self) -> dict[str, Sign]:
        """Of all machines. What cannot be believed is not there.

        Raises:
            OSError: the folder cannot be read now.
        """
        try:
            names = [name for name in os.listdir(self.path) if ID.fullmatch(name)]
        except ABSENT:
            return {}
        found = {name: self._read(name, Sign) for name in sorted(names)}
        return {name: one for name, one in found.items() if one and one.machine.id == name}

    def plan(self) -> Plan:
        """What is agreed on; number 0: nothing yet.

        Raises:
            OSError: it cannot be read now.
        """
        return self._read(PLAN, Plan) or Plan()

    def agree(self, plan: Plan, over: Plan) -> bool:
        """Write a plan, and give its attempt the run; False: somebody else was faster.

        Args:
            over: the plan that it takes the place of; its attempt may have had the run until now.

        Raises:
            AtWorkError: another command, of none of these machines, works for the run.
            OSError: nothing can be written there.
        """
        with self.alone():
            if self.plan().number not in (0, over.number):  # 0: nobody can read what is there
                return False
            if plan.end is None:
                who = None if self._run.owner() in (None, over.token) else at_work(self._run)
                if who is not None:
                    raise AtWorkError(
                        f"{self._run.path} is being trained by {who}", path=self._run.path
                    )
                name_owner(self._run, self._storage, plan.token)
            self._storage.replace(self.path / PLAN, with_check(json.dumps(asdict(plan))).encode())
        return True

    def forget(self, names: list[str]) -> None:
        """Remove the files of machines that are gone. Raises OSError."""
        for name in names:
            self._storage.remove(self.path / name)

    def record_lost(self, attempt: int, moment: str, machines: list[str]) -> None:
        """Write down that an attempt has ended for the lack of a machine. Raises OSError."""
        self._record("machine_lost", moment, attempt, machines=machines)

    def _record(self, event: str, moment: str, attempt: int, **facts: Any) -> None:
        line = {"time": moment, "attempt": attempt, "event": event, **facts}
        self._storage.append_line(self._run.events, with_check(json.dumps(line)))

    def _read(self, name: str, kind: Any) -> Any:
        try:
            values = read_object(self.path / name)
            known = {f.name: values[f.name] for f in fields(kind) if f.name in values}
            return build(kind, known)
        except (*ABSENT, OddFileError, TextError):
            return None


def someone_waits(run: RunFolder) -> bool:
    """Whether machines wait here for an attempt; some seconds, where there are any."""
    folder = MachinesFolder(run)
    before = {name: sign for name, sign in folder.signs().items() if not sign.has_left}
    if not before:
        return False
    time.sleep(WAIT_SECONDS)
    signs = folder.signs()
    alive = [s for name, s in signs.items() if name in before and before[name].beat != s.beat]
    return bool(alive) and all(sign.waits for sign in alive)

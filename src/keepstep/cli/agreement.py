"""What machines that share a run without a scheduler agree on between two attempts: who makes the
next one, or the end of all. Each comes to the same answer (policy/machines.py), and the first of a
group writes it down."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from keepstep.cli.again import commits_of, from_where
from keepstep.cli.gone import gone_words, is_there, say
from keepstep.cli.neighbors import Neighbors
from keepstep.cli.network import free_port
from keepstep.output.printable import quoted
from keepstep.policy.batch import Dealt
from keepstep.policy.lineage import Attempt
from keepstep.policy.machines import (
    Machine,
    Plan,
    Range,
    Rows,
    Verdict,
    after,
    ended_of,
    linked,
    meeting_address,
    pending,
    processes_of_each,
    suspects,
    together,
)
from keepstep.policy.next_step import STOPPED, how_it_ended
from keepstep.run_folder.by_hand import AtWorkError
from keepstep.run_folder.machines import MachinesFolder
from keepstep.run_folder.ownership import OURS
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object

ENDING_SECONDS = 60.0  # for ranks to see by themselves that a machine is gone


def newest_number(attempts: Sequence[Attempt]) -> int:
    """0: no attempt has begun."""
    return attempts[-1].number if attempts else 0


@dataclass(frozen=True)
class Terms:
    """What a command asks for.

    Attributes:
        machines: how many make an attempt.
        retries: so often in a row without a new checkpoint.
        patience: seconds for which others are waited for: who may still come, who gives no sign.
        any_rows: a step may have other rows on another number of processes.
    """

    machines: Range
    retries: int
    patience: float
    any_rows: bool = False


class Agreement:
    """
    Attributes:
        plan: the newest one that was seen.
        since: the number of the one that was there before this command.
    """

    def __init__(
        self, run: RunFolder, files: MachinesFolder, neighbors: Neighbors, terms: Terms
    ) -> None:
        self._run, self._files, self._neighbors, self._terms = run, files, neighbors, terms
        self.plan = files.plan()
        self.since = self.plan.number
        self._company: tuple[tuple[str, ...], float] = ((), time.monotonic())
        self._rows = Rows()
        self._stop_before = self._stop_file()

    def look(self) -> bool:
        """Whether there is a plan that this command has seen the making of."""
        try:
            plan = self._files.plan()
        except OSError:
            return False
        if plan.number > self.plan.number:
            self.plan = plan
        return self.plan.number > self.since

    def could_make_it(self, there: dict[str, Machine]) -> tuple[str, ...]:
        """The machines of an attempt that would begin now."""
        return self._chosen(linked(there, self.plan.machines), there, self.plan)

    def consider(self, idle_since: float) -> str | None:
        """Write down what is next, if that is this machine's to do.

        Args:
            idle_since: when the last attempt has ended here (monotonic).

        Returns:
            What is waited for; None: for nothing that lasts.
        """
        now, plan, me = time.monotonic(), self.plan, self._neighbors.me
        if self._neighbors.trouble:
            return self._neighbors.trouble if is_there(self._run) else gone_words(self._run)
        alive = self._neighbors.alive()
        there = {name: one for name, one in alive.items() if not one.leaves}
        if self._company[0] != tuple(there):
            self._company = tuple(there), now
        at_work = pending(plan, alive)
        if at_work and not self._is_passed_over(at_work, now - idle_since):
            return f"attempt {plan.number} is at work on {self.said(at_work)}{self._left_out(plan)}"
        group = linked(there, plan.machines)
        if group[:1] != (me,):
            return self._why_not(there, group, plan)
        is_new = plan.end is not None or not alive.keys() & set(plan.machines)
        verdict = self._new(plan) if is_new else self._verdict(plan, group)
        if verdict.end is not None:
            return self._agree(replace(verdict.counts, end=verdict.end, words=verdict.words))
        chosen = self._chosen(group, there, verdict.counts)
        if len(chosen) < self._terms.machines.least:
            return self._why_not(there, group, verdict.counts)
        full = len(group) >= self._terms.machines.most
        settled = full or now - self._company[1] >= self._terms.patience
        if (is_new and not settled) or now - idle_since < verdict.pause:
            return None
        lost = () if is_new else tuple(one for one in plan.machines if one not in group)
        return self._launch_on(chosen, there, verdict, lost)

    def _is_passed_over(self, at_work: list[str], idle: float) -> bool:
        """Whether an attempt that has ended here, and goes on where this machine does not reach, is
        waited for no longer: the ranks there have had the time to see that."""
        reaches = self._neighbors.alive()[self._neighbors.me].reaches
        mine = self._neighbors.me in self.plan.machines
        return mine and not reaches.keys() & set(at_work) and idle > ENDING_SECONDS

    def _chosen(
        self, group: tuple[str, ...], there: dict[str, Machine], plan: Plan
    ) -> tuple[str, ...]:
        if self._rows.rows is None and not self._terms.any_rows:
            newest = self._run.latest()
            dealt = Dealt.from_json(newest.manifest.dealt) if newest else None
            if newest and dealt:
                sharing = max(1, newest.manifest.world_size // dealt.batch.world_size)
                self._rows = Rows(dealt.batch.rows, sharing)
        return together(group, there, self._terms.machines.most, self._rows, plan)

    def _new(self, plan: Plan) -> Verdict:
        """Nobody is there who was in the attempt before."""
        counts = Plan(number=plan.number, token=plan.token)
        if self.is_stop_requested():
            return Verdict(STOPPED, "stopped on request", 0, counts)
        return Verdict(None, "", 0, counts)

    def _verdict(self, plan: Plan, group: tuple[str, ...]) -> Verdict:
        known = self._neighbors.known()
        try:
            said = read_object(self._run.status)
        except (*ABSENT, OddFileError):
            said = {}
        told = how_it_ended(said, plan.token, 70) if said.get("owner") == plan.token else None
        return after(
            plan,
            ended_of(plan, told, known),
            known,
            group,
            commits_of(self._run, plan.commits),
            self._terms.machines,
            self._terms.retries,
            self.is_stop_requested(),
        )

    def _launch_on(
        self,
        group: tuple[str, ...],
        there: dict[str, Machine],
        verdict: Verdict,
        lost: tuple[str, ...],
    ) -> str | None:
        attempts = newest_number(self._run.attempts())
        if verdict.words:
            count = verdict.counts.fruitless
            of = f"retry {count} of {self._terms.retries}, no new checkpoint: " if count else ""
            gone = f"without {self.said(lost)}: " if lost else ""
            say(f"launching again {from_where(self._run)}: {of}{gone}{verdict.words}")
        plan = replace(
            verdict.counts,
            token=f"{OURS}{secrets.token_hex(4)}",
            machines=group,
            address=meeting_address(group, there),
            port=free_port(),
            processes=processes_of_each(group, there),
            commits=commits_of(self._run, self.plan.commits),
            attempts=attempts,
        )
        return self._agree(plan, lost if attempts > self.plan.attempts else ())

    def _agree(self, plan: Plan, lost: tuple[str, ...] = ()) -> str | None:
        over = self.plan
        numbered = replace(plan, number=over.number + 1)
        try:
            if not self._files.agree(numbered, over):
                return None  # somebody was faster: his is seen in a moment
            if lost:
                moment = datetime.now(UTC).isoformat(timespec="milliseconds")
                self._files.record_lost(plan.attempts, moment, self.names(lost))
            known, alive = self._neighbors.known(), self._neighbors.alive()
            self._files.forget([n for n in known if n not in alive and n not in over.machines])
        except AtWorkError as error:
            return (
                f"{error}\n    Hint: `keepstep stop {quoted(self._run.path)}` ends that with a save"
            )
        except OSError as error:
            return str(error)
        if numbered.end == STOPPED and self.is_stop_requested():
            self._run.request("stop").unlink(missing_ok=True)
        return None

    # --- what people read

    def names(self, ids: Iterable[str]) -> list[str]:
        """Of machines, as people know them."""
        known = self._neighbors.known()
        return [known[one].host if one in known else one for one in ids]

    def said(self, ids: Iterable[str]) -> str:
        return ", ".join(self.names(ids)) or "nobody"

    def _left_out(self, plan: Plan) -> str:
        if self._neighbors.me not in suspects(plan):
            return ""
        return (
            ", without this machine: with it an attempt was refused, the others say why\n"
            "    Hint: end this command; with the recipe, data and keepstep of the others, give it "
            "again"
        )

    def _why_not(self, there: dict[str, Machine], group: tuple[str, ...], plan: Plan) -> str:
        least, me = self._terms.machines.least, self._neighbors.me
        if len(there) < least:
            return f"{len(there)} of {least} machines are there ({self.said(there)})"
        if me not in group and len(there) > 1:
            return f"{self.said(group)} make the next attempt; this machine is not in it"
        if len(group) < least:
            return (
                f"of {len(there)} machines {len(group)} reach each other ({self.said(group)}), "
                f"{least} are needed"
            )
        if group[0] == me and plan.refusals:
            return (
                f"{self.said(plan.refusals[-1])} were refused together, see above; others may come"
            )
        if group[0] == me:
            return f"the rows of a step cannot be shared out among {len(group)} machines"
        return f"{self.said(group[:1])} begins the next attempt"

    # --- a stop that somebody asks for while no attempt is at work

    def _stop_file(self) -> tuple[int, int] | None:
        try:
            facts = os.lstat(self._run.request("stop"))
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns

    def is_stop_requested(self) -> bool:
        """One that was there before this command is of nobody who knows of it."""
        there = self._stop_file()
        return there is not None and there != self._stop_before

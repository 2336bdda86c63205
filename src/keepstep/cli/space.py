"""What a command that gives disk space back tells: sizes before and after, what stays, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from keepstep.cli.common import console, fail
from keepstep.cli.rows import JsonObject
from keepstep.output.printable import first_few, quoted
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import folder_name
from keepstep.run_folder.by_hand import AtWorkError, may_be_at_work, stop_if_at_work
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.usage import (
    Portion,
    bytes_freed,
    bytes_under,
    leftovers_of,
    quarantine_of,
)

AFTERWARDS = (
    "a file system that shares blocks (reflinks, snapshots) or compresses may give back less"
)


@dataclass(frozen=True)
class Freed(JsonObject):
    """What `keepstep prune`, `keepstep rm` or `keepstep export --drop_run` has removed, or would.

    Sizes are what the disk holds (blocks, not lengths); a file with several names counts once.

    Attributes:
        dry_run: nothing was removed: `removed` and `freed` are what would be.
        removed: step → why it was removed.
        held: step → why it stays, of those that the limit alone would remove.
        failed: steps that could not be removed; the log of the command says why.
        before: bytes that the run folder took.
        after: bytes that it takes now, or would.
        freed: bytes of what has no other name elsewhere (hard links).
        disk_free: bytes free on its disk now.
        quarantine: what damaged checkpoints take that are still there.
        leftovers: what killed attempts left that is still there.
        mirror: where copies of removed checkpoints stay, as far as the log tells; null: nowhere.
        on_mirror: their steps.
    """

    dry_run: bool
    removed: dict[str, str]
    held: dict[str, str]
    failed: tuple[int, ...]
    before: int
    after: int
    freed: int
    disk_free: int
    quarantine: int
    leftovers: int
    mirror: str | None
    on_mirror: tuple[int, ...]


class Work:
    """One command: what the run folder took before, and what goes.

    Attributes:
        run: the folder.
        paths: all that goes.
        reasons: step → why it goes.
        held: step → why it stays.
        at_work: somebody may work for the run.
    """

    def __init__(self, run: RunFolder, dry_run: bool, as_json: bool) -> None:
        self.run, self.dry_run, self.as_json = run, dry_run, as_json
        self.at_work = may_be_at_work(run)
        self.before = bytes_under([run.path])
        self.copies = {step: url for step, (_, url) in run.mirrored().items()}
        self.paths: list[Path] = []
        self.reasons: dict[int, str] = {}
        self.held: dict[int, str] = {}
        self.freed = self.shared = 0

    def goes(self, reasons: Mapping[int, str]) -> None:
        """These checkpoints go; said line by line."""
        self.reasons = dict(sorted(reasons.items()))
        self.paths += [self.run.path / folder_name(step) for step in self.reasons]
        for step, reason in self.reasons.items():
            self._tell(f"{self.verb} {folder_name(step)}: {reason}")

    def goes_too(self, what: str, portion: Portion) -> None:
        """And these files and folders."""
        self.paths += [self.run.path / name for name in portion.names]
        if portion.names:
            self._tell(f"{self.verb} {what}: {first_few(portion.names)}")

    @property
    def verb(self) -> str:
        return "would remove" if self.dry_run else "removing"

    def measure(self) -> None:
        """What the disk is to have back."""
        self.freed = bytes_freed(self.paths)
        self.shared = bytes_under(self.paths) - self.freed

    def end(self) -> None:
        """Say what has become of it.

        Raises:
            typer.Exit: something could not be removed.
        """
        left = [s for s in self.reasons if (self.run.path / folder_name(s)).exists()]
        failed = () if self.dry_run else tuple(left)
        copied = [step for step in self.reasons if step in self.copies]
        after = self.before - bytes_under(self.paths) if self.dry_run else None
        quarantine, leftovers = waste = waste_of(self.run, self.at_work)
        found = Freed(
            dry_run=self.dry_run,
            removed={str(s): why for s, why in self.reasons.items() if s not in failed},
            held={str(step): why for step, why in self.held.items()},
            failed=failed,
            before=self.before,
            after=bytes_under([self.run.path]) if after is None else after,
            freed=self.freed,
            disk_free=Storage().free(self.run.path),
            quarantine=quarantine.bytes,
            leftovers=leftovers.bytes,
            mirror=self.copies[copied[-1]] if copied else None,
            on_mirror=tuple(copied),
        )
        if self.as_json:
            typer.echo(json.dumps(found.as_dict(), indent=1))
        else:
            self._sum_up(found)
            tell_waste(self.run, waste)
        if failed:
            raise typer.Exit(1)

    def _sum_up(self, found: Freed) -> None:
        for step, why in self.held.items():
            console.tell(f"{folder_name(step)} stays: {why}")
        if self.paths:
            is_now = "would take" if found.dry_run else "takes"
            console.tell(
                f"the run folder took {human_bytes(found.before)} and {is_now} "
                f"{human_bytes(found.after)}; {human_bytes(found.disk_free)} are free on its disk"
            )
            if self.shared:
                told = "have another name elsewhere, and give nothing back"
                console.tell(f"{human_bytes(self.shared)} of it {told}")
            if found.dry_run:
                console.tell(f"({AFTERWARDS})")
        for step in found.failed:
            console.tell(f"{folder_name(step)} could not be removed")
        if found.mirror is not None:
            names = first_few([folder_name(step) for step in found.on_mirror])
            console.tell(f"not touched on the mirror {found.mirror}: {names}")
        if found.removed and not found.dry_run and not self.run.checkpoints():
            console.tell(f"no checkpoint is left: launched again, {self.run.path} begins at step 0")

    def _tell(self, text: str) -> None:
        if not self.as_json:
            console.tell(text)


def waste_of(run: RunFolder, at_work: bool) -> tuple[Portion, Portion]:
    """What takes room and is of no use: damaged checkpoints, and what killed attempts left."""
    return quarantine_of(run), leftovers_of(run, at_work)


def tell_waste(run: RunFolder, waste: tuple[Portion, Portion]) -> None:
    """That, and what removes it."""
    quarantine, left = waste
    if quarantine.names:
        size = human_bytes(quarantine.bytes)
        console.tell(
            f"damaged checkpoints: {size} (keepstep prune {quoted(run.path)} --quarantine)"
        )
    if left.names:
        size = human_bytes(left.bytes)
        console.tell(
            f"left by killed attempts: {size} (the next launch removes it, or keepstep prune "
            f"{quoted(run.path)} --leftovers)"
        )


@contextmanager
def refusals(run: RunFolder) -> Iterator[None]:
    """That somebody works for the run is told with what to do."""
    try:
        yield
    except AtWorkError as error:
        fail(
            f"{error}",
            f"    Hint: `keepstep stop {quoted(run.path)}` ends it with a save",
            status=1,
        )


def refuse_at_work(run: RunFolder) -> None:
    """
    Raises:
        typer.Exit: somebody works for the run.
    """
    with refusals(run):
        stop_if_at_work(run)

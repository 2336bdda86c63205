"""`keepstep export … --drop_run`: the best in a folder of its own, the run's checkpoints gone.

The export is written beside its place, read back and compared, and noted in the run's log with the
digests of its files; then it gets its name, and only then checkpoints go, what was exported last.
So at each moment the weights are in the run, or verified in their place; and the same command goes
on from whatever it finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keepstep.cli.common import console, ended_by_signals, fail, used_run, verify_with_bar
from keepstep.cli.space import Work, refusals, refuse_at_work
from keepstep.cli.status import status_of
from keepstep.output.loading import loading
from keepstep.output.terminal import progress_bar
from keepstep.output.units import counted
from keepstep.policy.manifest import folder_name, step_of
from keepstep.run_folder.by_hand import ByHand, runs_beside
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.usage import leftovers_of, quarantine_of

WORDS = ("best", "latest")


def export_and_drop(asked: Path, to: Path, options: dict[str, Any], as_json: bool) -> None:
    """Raises: typer.Exit, ExportError: it cannot be done; what had to stay is there."""
    named = asked.name in WORDS or step_of(asked.name) is not None
    run = used_run(asked.parent if named else asked)
    refuse_at_work(run)
    _refuse_what_is_needed(run)
    found = _checkpoint(run, asked.name if named else "best")
    with ended_by_signals():
        if found is not None and not to.exists():
            _export(run, found, to, options, quiet=as_json)
        step = _exported(run, to)
    if step is None:
        if found is None:
            fail(f"{run.path} has no such checkpoint, and {to} is no export of this run")
        fail(f"{to} exists, and is not what was exported of this run: name a new folder")
    if found is not None and found.step != step:
        fail(f"{to} is the export of step {step}, not of {found.path.name}: name a new folder")
    _drop(run, step, to, as_json)


def _checkpoint(run: RunFolder, word: str) -> Checkpoint | None:
    if word in WORDS:
        return run.best() if word == "best" else run.latest()
    return {folder_name(c.step): c for c in run.checkpoints()}.get(word)


def _refuse_what_is_needed(run: RunFolder) -> None:
    status = status_of(run)
    if run.checkpoints() and status.outcome != "finished":
        fail(
            f"{run.path} has not finished: its checkpoints are what it goes on from",
            "    Hint: export without --drop_run, then `keepstep rm RUN STEP… --force`",
            status=1,
        )
    there = {c.step for c in run.checkpoints()}
    begun = {step: other for step, other in runs_beside(run).items() if step in there}
    if begun:
        lines = [f"    {folder_name(s)}: the run {other} began there" for s, other in begun.items()]
        fail("nothing is exported or removed: it is needed", *lines, status=1)


def _export(
    run: RunFolder, found: Checkpoint, to: Path, options: dict[str, Any], quiet: bool
) -> None:
    with loading(console):
        from keepstep.convert.api import export_intact
        from keepstep.convert.export import check_request
        from keepstep.convert.verify import digests_under, verify_export, verify_merged

    check_request(to, options["dtype"], options["max_shard_size"])
    verify_with_bar(found, deep=True)
    storage, aside = Storage(), to.with_name(f".{to.name}.exported")
    storage.remove(aside)  # of a command that was killed
    asked = {**options}
    merge = asked.pop("merge_adapter")
    with progress_bar(console, f"exporting {found.path.name}") as progress:
        made = export_intact(found, aside, merge, **asked, progress=progress)
    with progress_bar(console, f"reading {to.name} back") as progress:
        if merge:
            verify_merged(aside, progress)
        else:
            verify_export(found, aside, options["dtype"], progress)
        digests = digests_under(aside)
    for name in made.files:
        storage.sync(aside / name)
    for folder in {aside, *(path.parent for path in map(aside.joinpath, made.files))}:
        storage.sync_folder(folder)
    hand = ByHand(run, "keepstep export --drop_run")
    hand.keeper.record("export", step=found.step, folder=to.name, files=digests, by=hand.by)
    storage.rename(aside, to)
    if not quiet:
        console.tell(
            f"{to}: {counted(len(made.files), 'file')}, {made.dtype}, read back and compared"
        )


def _exported(run: RunFolder, to: Path) -> int | None:
    """The step whose export lies there, whole, by the log's digests; None: it is something else."""
    from keepstep.convert.verify import digests_under

    if not to.is_dir():
        return None
    digests = digests_under(to)
    steps = [
        event["step"]
        for event in run.events_read()[0]
        if event["event"] == "export" and event.get("files") == digests
    ]
    return steps[-1] if steps else None


def _drop(run: RunFolder, exported: int, to: Path, as_json: bool) -> None:
    hand = ByHand(run, "keepstep export --drop_run")
    work = Work(run, dry_run=False, as_json=as_json)
    pinned = run.pinned()
    steps = [c.step for c in run.checkpoints() if c.step not in pinned and c.step != exported]
    steps += [exported] if exported in {c.step for c in run.checkpoints()} - pinned else []
    work.held = {c.step: "it is pinned" for c in run.checkpoints() if c.step in pinned}
    reasons = dict.fromkeys(steps, f"step {exported} is exported to {to.name}")
    work.goes(reasons)
    damaged, left = quarantine_of(run), leftovers_of(run)
    work.goes_too("damaged checkpoints", damaged)
    work.goes_too("what killed attempts left", left)
    work.measure()
    with refusals(run):
        if steps:
            hand.remove(reasons, first=steps)
        if damaged.names:
            hand.discard_quarantine()
        if left.names:
            hand.discard_leftovers()
    work.end()

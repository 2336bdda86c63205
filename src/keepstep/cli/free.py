"""`keepstep prune | rm`: disk space of a run, given back; what is needed is not removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from keepstep.cli import completers
from keepstep.cli.common import (
    JsonOption,
    RunArgument,
    app,
    console,
    examples,
    fail,
    step_in,
    used_run,
)
from keepstep.cli.space import Work, refusals, refuse_at_work
from keepstep.policy.manifest import folder_name
from keepstep.policy.removal import needed, plan_by_hand
from keepstep.policy.retention import plan_retention
from keepstep.run_folder.by_hand import ByHand, published_by, runs_beside
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.usage import Portion, leftovers_of, quarantine_of

DryRun = Annotated[bool, typer.Option("--dry_run", help="Only say what would be removed.")]


@app.command(
    epilog=examples(
        "keepstep prune runs/mine --dry_run",
        "keepstep prune runs/mine --save_total_limit 2",
        "keepstep prune runs/mine --quarantine --leftovers",
    )
)
def prune(
    run: RunArgument,
    save_total_limit: Annotated[
        int | None,
        typer.Option(
            "--save_total_limit",
            min=1,
            help="Keep so many, ranked as the run ranks them, in the place of its own limit; the "
            "best and what is needed stay beside them. Of a run that nobody works for.",
        ),
    ] = None,
    quarantine: Annotated[
        bool,
        typer.Option(
            "--quarantine",
            help="Remove checkpoints that were set aside as damaged, and those that have lost "
            "their manifest. As the limit.",
        ),
    ] = False,
    leftovers: Annotated[
        bool,
        typer.Option(
            "--leftovers", help="Remove what killed attempts left, as the next launch would."
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
) -> None:
    """Remove the checkpoints that the retention policy does not keep, and abandoned branches."""
    folder = used_run(run)
    apart = save_total_limit is not None or quarantine or leftovers
    if apart:
        refuse_at_work(folder)
    work = Work(folder, dry_run, as_json)
    if save_total_limit is not None:
        gone, work.held = _plan_by_hand(folder, save_total_limit)
        _no_parts(folder, gone)
    else:
        gone = {} if apart else _by_policy(folder)
    damaged = quarantine_of(folder) if quarantine else Portion((), 0)
    left = leftovers_of(folder) if leftovers else Portion((), 0)
    if gone or damaged.names:
        _newest_is_whole(folder)
    work.goes(gone)
    work.goes_too("damaged checkpoints", damaged)
    work.goes_too("what killed attempts left", left)
    work.measure()
    if not work.paths and not as_json:
        console.tell("nothing to prune")
    if not dry_run:
        hand = ByHand(folder, "keepstep prune")
        with refusals(folder):
            if apart and gone:
                hand.remove(gone)
            elif gone:
                _as_an_attempt(folder, hand.by)
            if damaged.names:
                hand.discard_quarantine()
            if left.names:
                hand.discard_leftovers()
    work.end()


def _by_policy(folder: RunFolder) -> dict[int, str]:
    policy = folder.policy()
    plan = plan_retention(folder.records(policy.metric), policy, keep_abandoned=False)
    return {decision.step: decision.reason for decision in plan if not decision.keep}


def _as_an_attempt(folder: RunFolder, by: str) -> None:
    """By the run's own policy, which goes while it is at work, too."""
    keeper = Keeper(folder, folder.policy(), Storage())
    keeper.by = by
    keeper.prune(keep_abandoned=False)
    keeper.point()


def _plan_by_hand(folder: RunFolder, limit: int) -> tuple[dict[int, str], dict[int, str]]:
    policy = folder.policy()
    records = folder.records(policy.metric)
    held = needed(records, policy, published_by(folder), runs_beside(folder))
    return plan_by_hand(records, policy, limit, held)


def _no_parts(folder: RunFolder, steps: Iterable[int]) -> None:
    """Where each machine has its own disk, the main process alone knows what is needed."""
    for step in steps:
        if folder.checkpoint(step).manifest.is_part:
            fail(
                f"{folder_name(step)} here is one machine's part (node_local); the others' would "
                "stay, and it could not be gone on from",
                "    Hint: save_total_limit of the recipe: the run removes what it does not keep, "
                "on every machine",
            )


def _newest_is_whole(folder: RunFolder) -> None:
    """Or nothing is removed: an older one may be needed, and a damaged one be all there is."""
    there = folder.checkpoints()
    if not there:
        fail("no checkpoint is whole: nothing is pruned")
    faults = folder.faults(there[-1], deep=None)
    if faults:
        fail(f"{there[-1].path.name} is damaged, nothing is pruned: {faults[0]}")


@app.command(
    epilog=examples("keepstep rm runs/mine 500 1000 --dry_run", "keepstep rm runs/mine 500 --force")
)
def rm(
    run: RunArgument,
    steps: Annotated[
        list[int],
        typer.Argument(
            parser=step_in,
            metavar="STEP…",
            help="Steps of checkpoints, as `keepstep ls` has them.",
            autocompletion=completers.steps,
        ),
    ],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also one that is needed: the best, the newest, a pinned one, the only copy of "
            "what was published, or one that another run beside this one began at.",
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: JsonOption = False,
) -> None:
    """Remove checkpoints of a run that nobody works for; none that is needed without --force."""
    folder = used_run(run)
    refuse_at_work(folder)
    there = {checkpoint.step for checkpoint in folder.checkpoints()}
    unknown = [str(step) for step in steps if step not in there]
    if unknown:
        known = ", ".join(map(str, sorted(there))) or "none"
        fail(f"{run} has no checkpoint of step {', '.join(unknown)}; there: {known}")
    if not force:
        _no_parts(folder, steps)
    policy = folder.policy()
    records = folder.records(policy.metric)
    held = needed(records, policy, published_by(folder), runs_beside(folder))
    refused = {step: held[step] for step in sorted(set(steps)) if step in held}
    if refused and not force:
        lines = [f"    {folder_name(s)}: {' and '.join(why)}" for s, why in refused.items()]
        hint = "    Hint: --force removes it all the same"
        fail("nothing is removed: it is needed", *lines, hint, status=1)
    whys = {step: " and ".join(["by hand", *held.get(step, [])]) for step in steps}
    work = Work(folder, dry_run, as_json)
    work.goes(whys)
    work.measure()
    if not dry_run:
        with refusals(folder):
            gone = ByHand(folder, "keepstep rm").remove(whys)
        _unpin(folder, gone)
    work.end()


def _unpin(folder: RunFolder, steps: list[int]) -> None:
    keeper = Keeper(folder, folder.policy(), Storage())
    for step in folder.pinned() & set(steps):
        keeper.unpin(step)

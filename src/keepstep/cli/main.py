"""`keepstep`: look into a run folder. No torch is imported: every command answers at once."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from keepstep import __version__
from keepstep.cli import (  # noqa: F401  # these register their commands
    check,
    convert,
    evaluate,
    goodput,
    history,
    mirror,
    preview,
    samples,
    start,
    status,
)
from keepstep.cli.common import (
    JsonOption,
    RunArgument,
    StepArgument,
    above_zero,
    app,
    checkpoints_at,
    console,
    examples,
    fail,
    run_folder,
    used_run,
)
from keepstep.cli.rows import VerifyReport, checkpoint_rows, resume_answer
from keepstep.cli.status import job_of, tell_without_checkpoints
from keepstep.cli.tables import (
    attempt_table,
    checkpoint_table,
    pace_hint,
    save_hint,
    save_table,
    tell_answer,
)
from keepstep.output.environment import without_secrets
from keepstep.output.printable import printable
from keepstep.output.terminal import show_as_data
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import step_of
from keepstep.policy.retention import plan_retention
from keepstep.policy.selection import WORDS
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage

UNPICKLING = ("export", "reshard", "adopt")  # DeepSpeed's shards; push has a process for that
EXIT_STATUSES = (
    "Exit statuses:",
    "0: it is done.",
    "1: what was looked at is not as it should be, or the disk answered with an error.",
    "2: the command, its arguments or the recipe are wrong.",
    "75: `push` has got no answer from the Hub, and may later.",
    "130: it was interrupted.",
    "`launch` and `submit` end with the exit status of what they start.",
)
LAUNCHING = ("launch", "submit", "evaluate")  # what they start has the environment as it is
WITHOUT_DIGEST = "its manifest has no digest of its own (an older keepstep)"


@app.callback(invoke_without_command=True, epilog="\n\n".join(EXIT_STATUSES))
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version of keepstep.")] = False,
) -> None:
    """Launch fine-tuning runs that carry on after any end, and look into what they have saved."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    "ls",
    epilog=examples("keepstep ls runs/mine", "keepstep ls runs/mine --verbose --mtbf_hours 12"),
)
def list_checkpoints(
    run: RunArgument,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show also what each save cost.")
    ] = False,
    mtbf_hours: Annotated[
        float,
        typer.Option(
            "--mtbf_hours",
            help="The hours between two failures that the hint of --verbose reckons with.",
            callback=above_zero,
        ),
    ] = 24.0,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a run: step, metric, size, state, and why each is kept."""
    folder = used_run(run)
    with folder.held():
        if as_json:
            typer.echo(json.dumps([row.as_dict() for row in checkpoint_rows(folder)], indent=1))
        else:
            _tell_checkpoints(folder, run, verbose, mtbf_hours)


def _tell_checkpoints(folder: RunFolder, run: Path, verbose: bool, mtbf_hours: float) -> None:
    checkpoints = folder.checkpoints()
    for name, fault in (folder.odd() | notes_on(folder)).items():
        console.tell(f"{name}: {fault}")
    for path in sorted(folder.pinned_aside.glob("*/*")):
        console.tell(f"{path}: pinned; a branch has saved its step again")
    if not checkpoints:
        tell_without_checkpoints(folder, run)
        return
    console.table_that_fits(partial(checkpoint_table, folder))
    if verbose:
        console.tell_lines("\nsaves, in seconds:")
        console.table_that_fits(partial(save_table, folder))
        console.tell(save_hint(folder, mtbf_hours))
        pace = pace_hint(folder, mtbf_hours)
        if pace is not None:
            console.tell(pace)
    total = sum(c.manifest.total_bytes for c in checkpoints)
    plural = "" if len(checkpoints) == 1 else "s"
    console.tell(f"{len(checkpoints)} checkpoint{plural}, {human_bytes(total)}")
    goodput.tell_short(folder)
    if verbose or any(attempt.job for attempt in folder.attempts()):
        console.table_that_fits(partial(attempt_table, folder))


@app.command(epilog=examples("keepstep verify runs/mine --deep"))
def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or one checkpoint-N of it."),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte and compare digests.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the files of checkpoints with their manifests; exit status 1 says they differ."""
    folder, checkpoints = checkpoints_at(path)
    if step_of(path.resolve().name) is None:
        used_run(path)
    faults = {c.path.name: folder.state_of(c, deep) for c in checkpoints}
    odd = folder.odd()
    if step_of(path.resolve().name) is not None:
        odd = {name: fault for name, fault in odd.items() if name == path.resolve().name}
    faults.update({name: [fault] for name, fault in odd.items()})
    if as_json:
        typer.echo(
            json.dumps(
                VerifyReport({n: tuple(found) for n, found in faults.items()}).as_dict(), indent=1
            )
        )
    for checkpoint in [] if as_json else checkpoints:
        if not faults[checkpoint.path.name]:
            how = "every byte" if deep else "sizes"
            manifest = checkpoint.manifest
            console.tell(
                f"{checkpoint.path.name}: valid ({len(manifest.files)} files, "
                f"{human_bytes(manifest.total_bytes)}, {how} compared)"
                + ("" if manifest.has_digest else f"; {WITHOUT_DIGEST}"),
            )
    for name, found in {} if as_json else faults.items():
        for fault in found:
            console.tell(f"{name}: {fault}")
    for name, note in {} if as_json else notes_on(folder).items():
        console.tell(f"{name}: {note}")
    if any(faults.values()) or not faults:
        if not faults:
            tell_without_checkpoints(folder, path)
        raise typer.Exit(1)


@app.command(
    epilog=examples("keepstep which runs/mine", "keepstep which runs/mine best --num_processes 4")
)
def which(
    run: RunArgument,
    request: Annotated[
        str,
        typer.Argument(
            metavar="auto|latest|best|STEP", help="What to resume from; without it all three words."
        ),
    ] = "",
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num_processes",
            min=1,
            help="Tell also how so many processes share out the rows of a step.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what a resume would take, what that loses, and why it takes no other checkpoint."""
    folder = used_run(run)
    if request not in ("", *WORDS) and not request.isdecimal():
        fail(f"{request!r} is none of {', '.join(WORDS)}, and no step")
    requests = [request] if request else WORDS[:3]
    answers = [resume_answer(folder, asked, num_processes) for asked in requests]
    if as_json:
        typer.echo(json.dumps([answer.as_dict() for answer in answers], indent=1))
    else:
        for answer in answers:
            console.tell_lines(tell_answer(answer))
    if any(answer.error or answer.refused for answer in answers):
        raise typer.Exit(1)


@app.command("save-now", epilog=examples("keepstep save-now runs/mine"))
def save_now(run: RunArgument) -> None:
    """Ask the attempt that is at work to save after the step that it is at."""
    _ask(run, "save-now")


@app.command(epilog=examples("keepstep stop runs/mine"))
def stop(run: RunArgument) -> None:
    """Ask the attempt that is at work to save and end, to be carried on; a queued job ends."""
    _ask(run, "stop")


def _ask(run: Path, request: str) -> None:
    folder = run_folder(run)
    job, begun = job_of(folder), bool(folder.attempts())
    if not begun and job is None:
        fail(f"{run} is no run")
    if folder.status.is_file() and job is None:  # a job comes back by itself
        fail(f"{run}: its last attempt has ended, nobody is at work")
    at_work = begun and not folder.status.is_file()
    if request != "stop" and not at_work:
        fail(f"{run}: job {job} is not at work now, there is nothing to save")
    Storage().write(folder.request(request), b"")
    console.tell(
        f"asked for: it is done after the step that {run} is at"
        if at_work
        else f"asked for: job {job} ends before its next attempt; scancel {job} ends it now"
    )


@app.command(epilog=examples("keepstep prune runs/mine --dry_run"))
def prune(
    run: RunArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Only say what would be removed.")
    ] = False,
) -> None:
    """Remove the checkpoints that the retention policy does not keep, and abandoned branches."""
    folder = run_folder(run)
    policy = folder.policy()
    plan = plan_retention(folder.records(policy.metric), policy, keep_abandoned=False)
    gone = [decision for decision in plan if not decision.keep]
    for decision in gone:
        verb = "would remove" if dry_run else "removing"
        console.tell(f"{verb} checkpoint-{decision.step}: {decision.reason}")
    if gone and not dry_run:
        newest = folder.checkpoints()[-1]
        faults = folder.faults(newest, deep=None)
        if faults:
            fail(f"{newest.path.name} is damaged, nothing is pruned: {faults[0]}")
        keeper = Keeper(folder, policy, Storage())
        keeper.prune(keep_abandoned=False)
        keeper.point()
    if not gone:
        console.tell("nothing to prune")


@app.command(epilog=examples("keepstep pin runs/mine 500"))
def pin(run: RunArgument, step: StepArgument) -> None:
    """Keep a checkpoint whatever the retention policy says."""
    folder = run_folder(run)
    if step not in {c.step for c in folder.checkpoints()}:
        fail(f"{run} has no checkpoint-{step}")
    Keeper(folder, folder.policy(), Storage()).pin(step)
    console.tell(f"checkpoint-{step} is pinned: nothing prunes it before `keepstep unpin`")


@app.command(epilog=examples("keepstep unpin runs/mine 500"))
def unpin(run: RunArgument, step: StepArgument) -> None:
    """Leave a checkpoint that was pinned to the retention policy again."""
    folder = run_folder(run)
    if step not in folder.pinned():
        fail(f"checkpoint-{step} is not pinned")
    Keeper(folder, folder.policy(), Storage()).unpin(step)
    console.tell(f"checkpoint-{step} is pinned no more: the next save may prune it")


def leave_secrets() -> None:
    """Begin anew without what must not be known to a pickle, before one is read.

    (Of a variable that is unset the kernel goes on telling, in /proc/self/environ.) It stays for
    `--merge_adapter`, which may need the token to load the base model from the Hub.
    """
    harmless = without_secrets(os.environ)
    if harmless != dict(os.environ) and "--merge_adapter" not in sys.argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], harmless)


def main() -> None:
    """What the console script does."""
    if sys.argv[1:2] and sys.argv[1] in UNPICKLING:
        leave_secrets()
    if sys.argv[1:2] and sys.argv[1] not in LAUNCHING:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed only unpickles its classes here
    show_as_data()
    if all(printable(argument) == argument for argument in sys.argv):
        app()
    try:  # errors of usage quote arguments
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        told = getattr(error, "format_message", None)
        if told is None:
            raise
        console.tell(f"keepstep: {told()}")
        sys.exit(2)

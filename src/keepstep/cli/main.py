"""`keepstep`: look into a run folder. No torch is imported: every command answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from keepstep import __version__
from keepstep.cli import (  # noqa: F401  # these register their commands
    check,
    completers,
    completion,
    convert,
    evaluate,
    free,
    goodput,
    history,
    log,
    look,
    mirror,
    preview,
    report,
    samples,
    start,
    status,
)
from keepstep.cli.again import waits
from keepstep.cli.common import (
    JsonOption,
    RunArgument,
    StepArgument,
    app,
    console,
    examples,
    fail,
    tell_part,
    used_run,
)
from keepstep.cli.groups import group
from keepstep.cli.on_mirror import is_address
from keepstep.cli.rows import resume_answer
from keepstep.cli.status import job_of
from keepstep.cli.tables import tell_answer
from keepstep.output.environment import without_secrets
from keepstep.output.printable import printable
from keepstep.output.terminal import is_plain, show_as_data
from keepstep.policy.selection import WORDS
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.machines import someone_waits
from keepstep.run_folder.storage import Storage

NO_STYLES = "_TYPER_FORCE_DISABLE_TERMINAL"  # of typer 0.20 to 0.29, not documented
# DeepSpeed's shards; push, and an export from a mirror, have a process for that.
UNPICKLING = ("export", "reshard", "adopt")
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


@app.callback(invoke_without_command=True, epilog="\n\n".join(EXIT_STATUSES))
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version of keepstep.")] = False,
) -> None:
    """Launch fine-tuning runs that carry on after any end, and look into what they have saved."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command(
    epilog=examples("keepstep which runs/mine", "keepstep which runs/mine best --num_processes 4")
)
def which(
    run: RunArgument,
    request: Annotated[
        str,
        typer.Argument(
            metavar="auto|latest|best|STEP",
            help="What to resume from; without it all three words.",
            autocompletion=completers.requests,
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
        tell_part(folder, folder.checkpoints())
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
    folder = used_run(run)
    if request == "stop" and (waits(folder) or someone_waits(folder)):
        Storage().write(folder.request(request), b"")
        console.tell("asked for: it was waiting before its next attempt, and ends now")
        return
    job, begun = job_of(folder), bool(folder.attempts())
    if not begun and job is None:
        fail(f"{run}: no attempt has begun, there is nobody to ask")
    if folder.status.is_file() and job is None:  # a job comes back by itself
        fail(f"{run}: its last attempt has ended, nobody is at work")
    at_work = begun and not folder.status.is_file()
    if request != "stop" and not at_work:
        fail(f"{run}: job {job} is not at work now, there is nothing to save")
    does = {"stop": "saves, and ends,", "save-now": "saves"}
    Storage().write(folder.request(request), b"")
    console.tell(
        f"asked for: it {does[request]} after the step under way"
        if at_work
        else f"asked for: job {job} ends before its next attempt; scancel {job} ends it now"
    )


@app.command(epilog=examples("keepstep pin runs/mine 500"))
def pin(run: RunArgument, step: StepArgument) -> None:
    """Keep a checkpoint whatever the retention policy says."""
    folder = used_run(run)
    if step not in {c.step for c in folder.checkpoints()}:
        fail(f"{run} has no checkpoint-{step}")
    Keeper(folder, folder.policy(), Storage()).pin(step)
    console.tell(f"checkpoint-{step} is pinned: nothing prunes it before `keepstep unpin`")


@app.command(epilog=examples("keepstep unpin runs/mine 500"))
def unpin(run: RunArgument, step: StepArgument) -> None:
    """Leave a checkpoint that was pinned to the retention policy again."""
    folder = used_run(run)
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


group(app)


def main() -> None:
    """What the console script does."""
    if sys.argv[1:2] and sys.argv[1] in UNPICKLING and not any(map(is_address, sys.argv)):
        leave_secrets()
    if sys.argv[1:2] and sys.argv[1] not in LAUNCHING:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed only unpickles its classes here
    show_as_data()
    completion.prepare_if_asked()
    if is_plain() or not sys.stdout.isatty():  # of the help, which typer prints
        os.environ[NO_STYLES] = "1"
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

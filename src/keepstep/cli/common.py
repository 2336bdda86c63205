"""What the commands have in common: the application, the console, arguments, a clear end."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from keepstep.cli import INTERRUPTED, completers
from keepstep.output.printable import first_few, printable, quoted
from keepstep.output.progress import added_up
from keepstep.output.terminal import Terminal, progress_bar
from keepstep.policy.manifest import MANIFEST_NAME, step_of
from keepstep.policy.selection import SelectionError
from keepstep.run_folder.checkpoint import DamagedError, Unfit, look_at
from keepstep.run_folder.kinds import OF_TRAINER, adopting, why_no_run
from keepstep.run_folder.place import tell_place
from keepstep.run_folder.reader import Checkpoint, RunFolder

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
FETCH_HINT = "    Hint: `keepstep ls`, `verify`, `export` and `fetch` take a mirror's address"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPELLING = {"token_normalize_func": lambda name: name.replace("-", "_")}


class Commands(TyperGroup):
    """What no command can go on without is told in a sentence, not in a traceback."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """With dashes or underscores, as the options."""
        return super().get_command(ctx, cmd_name.replace("_", "-"))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted", status=INTERRUPTED)
        except BrokenPipeError:  # nobody reads on: click knows
            raise
        except (SelectionError, DamagedError) as error:
            fail(str(error))
        except OSError as error:
            _tell_of_disk(_of_disk(error))
            raise typer.Exit(1) from error


def _of_disk(error: OSError) -> list[str]:
    """What a disk, or the kernel, has answered, in words."""
    if error.filename is None or error.strerror is None:
        return str(error).split("\n")
    lines = [f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"]
    if isinstance(error, PermissionError):
        lines.append("    Hint: whose is it (ls -ld), and may you read, or write, there?")
    return lines


def _tell_of_disk(lines: list[str]) -> None:
    """Where stdout is what takes nothing (a file on a full disk), stderr is told."""
    lines = [f"keepstep: {lines[0]}", *lines[1:]]
    try:
        for line in lines:
            console.tell(line)
    except OSError:
        errors = console.beside()
        for line in lines:
            errors.tell(line)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stdout = os.fdopen(nowhere, "w")  # at its end Python would write the rest, and fail


app = typer.Typer(
    cls=Commands,
    context_settings=SPELLING,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Terminal()
console.folds = True


@contextmanager
def errors_apart() -> Iterator[None]:
    """What is told within goes to stderr: stdout is for a value that a shell takes."""
    before, console.stderr = console.stderr, True
    try:
        yield
    finally:
        console.stderr = before


def lines_apart(ctx: typer.Context, asked: bool) -> bool:
    """The same for as long as the command goes on, if it was asked for JSON."""
    if asked:
        ctx.with_resource(errors_apart())
    return asked


NAME_A_RUN = "    Hint: a run's folder (output_dir), or a checkpoint-N of it"
HINT = "    Hint: move it away; what is written there must lie beside the checkpoints."
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="The run folder (output_dir) of a run.",
        autocompletion=completers.runs,
    ),
]


def step_in(word: str) -> int:
    """The step that an argument names: `60`, or its folder's name, as a shell completes it."""
    step = int(word) if word.isdecimal() else step_of(word.rstrip("/"))
    if step is None:
        raise typer.BadParameter(
            f"{quoted(word)} is no step: 60, say, or checkpoint-60, as `keepstep ls` has it"
        )
    return step


StepArgument = Annotated[
    int,
    typer.Argument(
        parser=step_in,
        metavar="STEP",
        help="The step of the checkpoint, as `keepstep ls` has it.",
        autocompletion=completers.steps,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print JSON for programs, as docs/json.md describes it.",
        callback=lines_apart,
    ),
]


def examples(*commands: str) -> str:
    """The end of a command's help; a paragraph for each: a line end alone would be dropped."""
    return "\n\n".join(["Example:" if len(commands) == 1 else "Examples:", *commands])


def verify_with_bar(checkpoint: Checkpoint, deep: bool | None) -> None:
    """Compare its files with the manifest. Raises as `Checkpoint.verify`."""
    with progress_bar(console, f"verifying {checkpoint.path.name}") as tell:
        checkpoint.verify(deep, added_up(tell, checkpoint.manifest.total_bytes))


@contextmanager
def ended_by_signals(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within, what ends a command leaves its blocks: what they have begun is put away.

    Args:
        first: is called before that.
    """

    def end(number: int, frame: object) -> NoReturn:
        first()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def above_zero(value: float | None) -> float | None:
    """For options that are a length of time.

    Raises:
        typer.BadParameter: there is no such length.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def fail(message: str, *more: str, status: int = 2) -> NoReturn:
    """End with this exit status, and these lines."""
    for line in (f"keepstep: {message}", *more):
        console.tell(line)
    raise typer.Exit(status)


def one_answer(**asked: bool) -> None:
    """Of options that each print an answer of their own no more than one may be given."""
    names = [f"--{name}" for name, is_given in asked.items() if is_given]
    if len(names) > 1:
        fail(f"{' and '.join(names)} do not go together: each is an answer of its own")


def run_folder(path: Path) -> RunFolder:
    """A folder that may be a run's, and is no checkpoint; a probe asks ahead of a run's begin."""
    resolved = path.resolve()
    if step_of(resolved.name) is not None and (resolved / MANIFEST_NAME).is_file():
        fail(f"{path} is a checkpoint: name its run, {quoted(resolved.parent)}")
    return folder_at(path)


def used_run(path: Path) -> RunFolder:
    """A folder that a run has used; what else it is, is told."""
    folder = run_folder(path)
    why = why_no_run(folder)
    if why is not None:
        fail(f"{printable(str(path))} {why.what}", f"    Hint: {why.hint}")
    return folder


def is_address(text: str) -> bool:
    """Whether that is an address, not a path, be it wrong."""
    return ADDRESS.match(text) is not None


def folder_at(path: Path) -> RunFolder:
    """The folder that is there, whichever it is."""
    if is_address(str(path)) and not path.is_dir():
        address = str(path).replace(":/", "://", 1)  # a path has one slash
        fail(f"{address}: this command looks at folders, not at a mirror", FETCH_HINT)
    if path.exists() and not path.is_dir():
        fail(f"{path} is a file, not a folder", NAME_A_RUN)
    if not path.is_dir():
        fail(f"there is no folder {path}", *_where_else(path))
    return without_links(RunFolder(path))


def _where_else(path: Path) -> list[str]:
    """A hint where a folder is not: the checkpoints of the run that it would be of."""
    run = RunFolder(path.parent)
    if run.private.is_dir():
        there = first_few([checkpoint.path.name for checkpoint in run.checkpoints()])
        return [f"    Hint: {run.path} has {there or 'no checkpoint'}"]
    return [] if path.is_absolute() else [f"    Hint: the path is relative to {os.getcwd()}"]


def without_links(folder: RunFolder) -> RunFolder:
    """The same, unless what is the run's own lies elsewhere: nothing there is written, or told."""
    if folder.private.is_symlink():
        fail(f"{folder.private} is a link, which is not followed", HINT)
    return folder


def tell_part(run: RunFolder, checkpoints: Sequence[Checkpoint]) -> None:
    """Where the rest is, of a folder that has one machine's parts."""
    if any(checkpoint.manifest.is_part for checkpoint in checkpoints):
        console.tell(tell_place(run))


def fetched_at(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder of any name, as `keepstep fetch` makes one; None: it is none."""
    resolved = path.resolve()
    if step_of(resolved.name) is not None or not (resolved / MANIFEST_NAME).is_file():
        return None
    found = look_at(resolved, any_name=True)
    if isinstance(found, Unfit):
        fail(f"{path}: {found.reason}", status=1)
    return found


def one_checkpoint(path: Path) -> Checkpoint:
    """The committed checkpoint at `path`; whether it is intact has not been looked at."""
    fetched = fetched_at(path)
    if fetched is not None:
        return fetched
    folder, found = checkpoints_at(path)
    if step_of(path.resolve().name) is None:
        there = first_few([checkpoint.path.name for checkpoint in found])
        hint = f"it has {there}" if there else f"it has none: keepstep show {quoted(path)}"
        fail(f"{path} is a run: name a checkpoint of it", f"    Hint: {hint}")
    if not found:
        no_checkpoint(path, folder)
    return found[0]


def no_checkpoint(path: Path, folder: RunFolder) -> NoReturn:
    """End: what is named like a checkpoint of this folder is none."""
    name, none = path.resolve().name, why_no_run(folder)
    why = folder.odd().get(name, "")
    there = first_few([checkpoint.path.name for checkpoint in folder.checkpoints()])
    hint = f"{folder.path} has {there or 'none'}" if none is None else none.hint
    if none is not None and (path / OF_TRAINER).is_file():
        hint = adopting(path)
    told = f"{path} is no committed checkpoint" + (f": {why}" if why else "")
    fail(told, f"    Hint: {hint}")


def checkpoints_at(path: Path) -> tuple[RunFolder, list[Checkpoint]]:
    """The checkpoint at `path`, or all those of the run at `path`; what is neither, is told."""
    folder_at(path)
    resolved = path.resolve()
    if step_of(resolved.name) is None:
        folder = used_run(path)
        return folder, folder.checkpoints()
    folder = without_links(RunFolder(resolved.parent))
    if why_no_run(folder) is not None:
        no_checkpoint(path, folder)
    return folder, [c for c in folder.checkpoints(any_run=True) if c.path == resolved]

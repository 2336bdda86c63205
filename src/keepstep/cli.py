"""`keepstep`: look into a run folder. No torch is imported: every command answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import __version__
from .checkpoint.manifest import step_of
from .checkpoint.runfolder import Committed, RunFolder
from .report import checkpoint_rows, checkpoint_table, human_bytes

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no right margin

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (output_dir).")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Checkpoints of fine-tuning runs: which exist, which is best, are they intact."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command("ls")
def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """The run's checkpoints: step, metric, size, state, and why each is kept."""
    folder = _run_folder(run)
    if as_json:
        typer.echo(json.dumps(checkpoint_rows(folder), indent=1))
        return
    checkpoints = folder.checkpoints()
    if not checkpoints:
        console.print(f"{run}: no committed checkpoint yet", highlight=False)
        return
    console.print(checkpoint_table(folder), highlight=False)
    total = sum(c.manifest.total_bytes for c in checkpoints)
    console.print(f"{len(checkpoints)} checkpoints, {human_bytes(total)}", highlight=False)
    for name, fault in folder.unreadable().items():
        console.print(f"{name}: {fault}", highlight=False)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT")],
    deep: Annotated[bool, typer.Option(help="Read every byte and compare digests.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare files with the manifests; exit status 1 when anything is wrong."""
    folder, checkpoints = _checkpoints_at(path)
    faults = {c.path.name: folder.faults(c, deep) for c in checkpoints}
    unreadable = folder.unreadable()
    if step_of(path.resolve().name) is not None:
        unreadable = {n: f for n, f in unreadable.items() if n == path.resolve().name}
    faults.update({name: [fault] for name, fault in unreadable.items()})
    if as_json:
        typer.echo(json.dumps(faults, indent=1))
    for checkpoint in [] if as_json else checkpoints:
        if not faults[checkpoint.path.name]:
            how = "every byte" if deep else "sizes"
            manifest = checkpoint.manifest
            console.print(
                f"{checkpoint.path.name}: valid ({len(manifest.files)} files, "
                f"{human_bytes(manifest.total_bytes)}, {how} compared)",
                highlight=False,
            )
    for name, found in {} if as_json else faults.items():
        for fault in found:
            console.print(f"{name}: {fault}", highlight=False)
    if any(faults.values()) or not faults:
        if not faults:
            console.print(f"{path}: no committed checkpoint", highlight=False)
        raise typer.Exit(1)


def _run_folder(path: Path) -> RunFolder:
    if not path.is_dir():
        console.print(f"keepstep: there is no folder {path}", highlight=False)
        raise typer.Exit(2)
    return RunFolder(path)


def _checkpoints_at(path: Path) -> tuple[RunFolder, list[Committed]]:
    """The checkpoint at `path`, or all those of the run at `path`."""
    _run_folder(path)
    resolved = path.resolve()
    if step_of(resolved.name) is None:
        folder = RunFolder(path)
        return folder, folder.checkpoints()
    folder = RunFolder(resolved.parent)
    return folder, [c for c in folder.checkpoints(any_run=True) if c.path == resolved]


def main() -> None:
    """The console script."""
    app()

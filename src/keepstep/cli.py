"""`keepstep`: look into a run folder. No torch is imported: every command answers at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from . import __version__
from .checkpoint.manifest import step_of
from .checkpoint.retention import plan_retention
from .checkpoint.runfolder import Committed, RunFolder
from .checkpoint.runwriter import RunWriter
from .checkpoint.selection import WORDS
from .checkpoint.storage import Storage
from .report import (
    checkpoint_rows,
    checkpoint_table,
    human_bytes,
    progress_bar,
    resume_answer,
    save_hint,
    save_table,
    tell_answer,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no right margin

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (output_dir).")]
StepArgument = Annotated[int, typer.Argument(metavar="STEP", help="The checkpoint's step.")]
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
def list_checkpoints(
    run: RunArgument,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="What each save cost.")] = False,
    mtbf_hours: Annotated[
        float, typer.Option("--mtbf_hours", help="Between failures; for the hint of --verbose.")
    ] = 24.0,
    as_json: JsonOption = False,
) -> None:
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
    if verbose:
        console.print("\nsaves, in seconds:")
        console.print(save_table(folder), highlight=False)
        console.print(save_hint(folder, mtbf_hours), highlight=False)
    total = sum(c.manifest.total_bytes for c in checkpoints)
    console.print(f"{len(checkpoints)} checkpoints, {human_bytes(total)}", highlight=False)
    for name, fault in (folder.unreadable() | folder.strangers()).items():
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


@app.command()
def which(
    run: RunArgument,
    request: Annotated[str, typer.Argument(metavar="[auto|latest|best|STEP]")] = "",
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", help="Of the launch to come.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a resume would take, what that choice loses, and why not the other checkpoints; with
    --num_processes, how so many would share out the rows of a step."""
    folder = _run_folder(run)
    if request not in ("", *WORDS) and not request.isdecimal():
        _fail(f"{request!r} is none of {', '.join(WORDS)}, and no step")
    requests = [request] if request else WORDS[:3]
    answers = [resume_answer(folder, asked, num_processes) for asked in requests]
    if as_json:
        typer.echo(json.dumps(answers, indent=1))
    else:
        for answer in answers:
            console.print(tell_answer(answer), highlight=False, markup=False)
    if any(answer["error"] or answer["refused"] for answer in answers):
        raise typer.Exit(1)


@app.command()
def reshard(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint-N.")],
    into: Annotated[Path, typer.Option("--to", metavar="DIR", help="Another run folder.")],
    num_processes: Annotated[int, typer.Option("--num_processes", min=1, help="To write for.")],
) -> None:
    """Write a checkpoint's shards anew for another number of processes. (A resume needs no such
    step: it reshards by itself.)"""
    from .checkpoint.batch import BatchError
    from .checkpoint.offline import reshard as write_for  # torch: seconds to import
    from .checkpoint.sources import ReshardError

    source = _one_checkpoint(checkpoint)
    try:
        made = write_for(source, RunFolder(into), num_processes)
    except (BatchError, ReshardError) as error:
        _fail(str(error))
    console.print(
        f"{into / made.path.name}: {human_bytes(made.manifest.total_bytes)}, for {num_processes} "
        f"processes (it was written by {source.manifest.world_size})",
        highlight=False,
    )


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint-N, RUN/best, or RUN/latest.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; else as the weights are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Of one file.")] = "5GB",
    merge_adapter: Annotated[
        bool, typer.Option("--merge_adapter", help="The base model with the adapter in it.")
    ] = False,
) -> None:
    """Write a checkpoint's weights for inference: what `from_pretrained` reads, and no more."""
    from .checkpoint.export import PRECISIONS, ExportError  # torch: seconds to import
    from .checkpoint.export import export as write_out
    from .checkpoint.merge import export_merged

    if dtype not in (None, *PRECISIONS):
        _fail(f"--dtype {dtype} is none of {', '.join(PRECISIONS)}")
    source = _one_checkpoint(checkpoint)
    work = export_merged if merge_adapter else write_out
    try:
        with progress_bar(console, f"exporting {source.path.name}") as progress:
            made = work(source, to, dtype=dtype, max_shard_size=max_shard_size, progress=progress)
    except ExportError as error:
        _fail(str(error))
    console.print(
        f"{to}: {len(made.files)} files, {human_bytes(sum(made.files.values()))}, {made.dtype}",
        highlight=False,
    )


@app.command()
def push(
    run: RunArgument,
    repo_id: Annotated[
        str | None, typer.Option("--repo_id", help="owner/name; else the recipe's hub_model_id.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Of a new repository.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Over a model whose metric is another one.")
    ] = False,
    card: Annotated[
        str | None, typer.Option("--card", help="Metadata of the card, as JSON, over the recipe's.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds.")] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
) -> None:
    """Publish the run's best checkpoint on the Hub, unless it, or a better one, is there."""
    from .publish.by_hand import PushFailedError, push_best

    folder = _run_folder(run)
    try:
        answer = push_best(
            folder,
            repo_id,
            public=public,
            force=force,
            timeout=timeout,
            dry_run=dry_run,
            card=json.loads(card or "{}"),
        )
    except (PushFailedError, OSError, KeyError) as error:
        _fail(str(error))
    except ValueError as error:
        _fail(f"--card is no JSON: {error}")
    for line in answer:
        console.print(line, highlight=False, markup=False)


@app.command("save-now")
def save_now(run: RunArgument) -> None:
    """Have the attempt that is at work save after the step that it is at."""
    _ask(run, "save-now")


@app.command()
def stop(run: RunArgument) -> None:
    """Have the attempt that is at work save, and end as preempted."""
    _ask(run, "stop")


def _ask(run: Path, request: str) -> None:
    folder = _run_folder(run)
    if not folder.attempts():
        _fail(f"{run} is no run")
    if folder.status.is_file():
        _fail(f"{run}: its last attempt has ended, nobody is at work")
    Storage().write(folder.request(request), b"")
    console.print(f"asked for: it is done after the step that {run} is at", highlight=False)


@app.command()
def adopt(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A stock Trainer's checkpoint-N, or a universal checkpoint."
        ),
    ],
    into: Annotated[Path, typer.Option("--into", metavar="RUN", help="The run folder.")],
) -> None:
    """Copy a checkpoint that keepstep did not write into a run, verify it, and commit it."""
    from .checkpoint.adopt import AdoptError
    from .checkpoint.adopt import adopt as take_in  # torch: seconds to import

    _run_folder(path)
    try:
        adopted = take_in(path, RunFolder(into))
    except AdoptError as error:
        _fail(str(error))
    manifest = adopted.checkpoint.manifest
    console.print(
        f"{into / adopted.checkpoint.path.name}: {manifest.origin}, {len(manifest.files)} files, "
        f"{human_bytes(manifest.total_bytes)}, committed.\nNot checked:",
        highlight=False,
    )
    for sentence in adopted.unchecked:
        console.print(f"  - {sentence}", highlight=False)


@app.command()
def prune(
    run: RunArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Apply the run's retention policy now; abandoned branches go as well."""
    folder = _run_folder(run)
    policy = folder.policy()
    plan = plan_retention(folder.records(policy.metric), policy, keep_abandoned=False)
    gone = [decision for decision in plan if not decision.keep]
    for decision in gone:
        verb = "would remove" if dry_run else "removing"
        console.print(f"{verb} checkpoint-{decision.step}: {decision.reason}", highlight=False)
    if gone and not dry_run:
        newest = folder.checkpoints()[-1]
        faults = folder.faults(newest, deep=None)
        if faults:
            _fail(f"{newest.path.name} is damaged, nothing is pruned: {faults[0]}")
        writer = RunWriter(folder, policy, Storage())
        writer.prune(keep_abandoned=False)
        writer.point()
    if not gone:
        console.print("nothing to prune", highlight=False)


@app.command()
def pin(run: RunArgument, step: StepArgument) -> None:
    """Keep this checkpoint whatever the policy says."""
    folder = _run_folder(run)
    if step not in {c.step for c in folder.checkpoints()}:
        _fail(f"{run} has no checkpoint-{step}")
    RunWriter(folder, folder.policy(), Storage()).pin(step)


@app.command()
def unpin(run: RunArgument, step: StepArgument) -> None:
    """Leave this checkpoint to the policy again."""
    folder = _run_folder(run)
    if step not in folder.pinned():
        _fail(f"checkpoint-{step} is not pinned")
    RunWriter(folder, folder.policy(), Storage()).unpin(step)


def _fail(message: str) -> NoReturn:
    console.print(f"keepstep: {message}", highlight=False, markup=False)
    raise typer.Exit(2)


def _run_folder(path: Path) -> RunFolder:
    if not path.is_dir():
        _fail(f"there is no folder {path}")
    return RunFolder(path)


def _one_checkpoint(path: Path) -> Committed:
    """The checkpoint at `path`, which is intact."""
    folder, found = _checkpoints_at(path)
    if len(found) != 1 or found[0].path != path.resolve():
        _fail(f"{path} is no committed checkpoint")
    faults = folder.faults(found[0], deep=None)
    if faults:
        _fail(f"{path} is damaged: {faults[0]}")
    return found[0]


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
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed only unpickles its classes here
    app()

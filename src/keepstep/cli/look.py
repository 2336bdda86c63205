"""`keepstep ls | verify`: the checkpoints of a run folder, or of a mirror."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import completers, goodput, on_mirror
from keepstep.cli.common import (
    JsonOption,
    above_zero,
    app,
    checkpoints_at,
    console,
    examples,
    fail,
    fetched_at,
    one_answer,
    tell_part,
    used_run,
)
from keepstep.cli.rows import VerifyReport, checkpoint_rows
from keepstep.cli.space import tell_waste, waste_of
from keepstep.cli.status import none_can_be_taken, tell_status, tell_without_checkpoints
from keepstep.cli.tables import (
    attempt_table,
    checkpoint_table,
    mirrored_run_table,
    pace_hint,
    save_hint,
    save_table,
)
from keepstep.cli.watch import LOOK_SECONDS, STORE_SECONDS, again_and_again
from keepstep.output.printable import quoted
from keepstep.output.units import counted, human_bytes
from keepstep.policy.manifest import folder_name, step_of
from keepstep.run_folder.by_hand import may_be_at_work
from keepstep.run_folder.checkpoint import GONE
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.reader import Checkpoint, RunFolder

MTBF_HOURS = 24.0  # between two failures, where nobody tells
WITHOUT_DIGEST = "its manifest has no digest of its own (an older keepstep)"


@app.command(
    "ls",
    epilog=examples(
        "keepstep ls runs/mine",
        "keepstep ls runs/mine --verbose --mtbf_hours 12",
        "keepstep ls s3://my-bucket/runs/mine",
        "keepstep ls s3://my-bucket/runs",
    ),
)
def list_checkpoints(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|URL",
            help="The run folder (output_dir) of a run; or a mirror's address: of a run, of one "
            "checkpoint of it, or one below which there are runs.",
            autocompletion=completers.runs,
        ),
    ],
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show also what each save cost.")
    ] = False,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(
            "--mtbf_hours",
            help="The hours between two failures that the hint of --verbose reckons with; without "
            "it 24.",
            callback=above_zero,
        ),
    ] = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            "-w",
            help="Look again every two seconds, at a mirror every half a minute, until Ctrl-C.",
        ),
    ] = False,
) -> None:
    """List the checkpoints of a run: step, metric, size, state, and why each is kept."""
    one_answer(verbose=verbose, json=as_json)
    if mtbf_hours is not None and not verbose:
        fail("--mtbf_hours goes with --verbose, which tells how often to save")
    hours = mtbf_hours or MTBF_HOURS
    if not watch:
        _list(run, verbose, hours, as_json)
        return

    def look() -> None:
        if not (as_json or on_mirror.is_address(run)):
            tell_status(Path(run), used_run(Path(run)))
        _list(run, verbose, hours, as_json)

    again_and_again(look, STORE_SECONDS if on_mirror.is_address(run) else LOOK_SECONDS)


def _list(run: str, verbose: bool, mtbf_hours: float, as_json: bool) -> None:
    if not on_mirror.is_address(run):
        folder = used_run(Path(run))
        with folder.held():
            _tell(folder, run, verbose, mtbf_hours, as_json)
        return
    with on_mirror.looking(run) as found:
        if found.run is not None:
            _tell(found.run, run, verbose, mtbf_hours, as_json, found)
            if not as_json:
                on_mirror.tell_unfinished(found.run)
            return
        if verbose:
            fail("--verbose tells of one run: name the address of one")
        rows = found.rows()
        if as_json:
            typer.echo(json.dumps([row.as_dict() for row in rows], indent=1))
        else:
            console.table_that_fits(partial(mirrored_run_table, rows))


def _tell(
    folder: RunFolder,
    name: str,
    verbose: bool,
    mtbf_hours: float,
    as_json: bool,
    found: on_mirror.Found | None = None,
) -> None:
    """
    Args:
        found: what was asked for, where that is on a mirror.
    """
    step = None if found is None else found.step
    if as_json:
        rows = [row for row in checkpoint_rows(folder) if step in (None, row.step)]
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=1))
        return
    checkpoints = folder.checkpoints()
    for odd, fault in (folder.odd() | notes_on(folder)).items():
        console.tell(f"{odd}: {fault}")
    for path in sorted(folder.pinned_aside.glob("*/*")):
        console.tell(f"{path}: pinned; a branch has saved its step again")
    if not checkpoints:
        _tell_none(folder, name, found)
        return
    console.table_that_fits(partial(checkpoint_table, folder, step=step, copies=found is None))
    if verbose:
        console.tell_lines("\nsaves, in seconds:")
        console.table_that_fits(partial(save_table, folder))
        console.tell(save_hint(folder, mtbf_hours))
        pace = pace_hint(folder, mtbf_hours)
        if pace is not None:
            console.tell(pace)
    told = [c for c in checkpoints if step in (None, c.step)]
    total = sum(c.manifest.total_bytes for c in told)
    console.tell(f"{counted(len(told), 'checkpoint')}, {human_bytes(total)}")
    if found is None:
        _tell_elsewhere(folder)
        tell_part(folder, checkpoints)
        tell_waste(folder, waste_of(folder, may_be_at_work(folder)))
    goodput.tell_short(folder)
    if verbose or any(attempt.job for attempt in folder.attempts()):
        console.table_that_fits(partial(attempt_table, folder))


def _tell_none(folder: RunFolder, name: str, found: on_mirror.Found | None) -> None:
    """Why no checkpoint is listed.

    Raises:
        typer.Exit: there are some, and none can be taken.
    """
    if found is None:
        tell_without_checkpoints(folder, Path(name))
        return
    odd = folder.odd()
    if odd:
        console.tell(f"{name}: {none_can_be_taken(len(odd))}")
        raise typer.Exit(1)
    console.tell(f"{name}: no checkpoint is committed there yet")


def _tell_elsewhere(folder: RunFolder) -> None:
    """What is on a mirror alone, as far as the log tells."""
    here = {checkpoint.step for checkpoint in folder.checkpoints()}
    elsewhere: dict[str, list[str]] = {}
    for step, (_, url) in sorted(folder.mirrored().items()):
        if step not in here:
            elsewhere.setdefault(url, []).append(folder_name(step))
    for url, names in elsewhere.items():
        console.tell(
            f"on the mirror alone, by the log: {', '.join(names)} (keepstep ls {quoted(url)})"
        )


@app.command(
    epilog=examples(
        "keepstep verify runs/mine --deep", "keepstep verify s3://my-bucket/runs/mine --deep"
    )
)
def verify(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT|URL",
            help="A run folder, or one checkpoint-N of it; or either of them on a mirror.",
            autocompletion=completers.runs_or_checkpoints,
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte and compare digests.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the files of checkpoints with their manifests; exit status 1 says they differ."""
    if on_mirror.is_address(path):
        with on_mirror.looking(path) as found:
            run = found.one_run()
            asked = run.checkpoints(any_run=found.step is not None)
            asked = [c for c in asked if found.step in (None, c.step)]
            if not as_json:
                on_mirror.tell_unfinished(run)
            _verify(run, asked, path, found.name, deep, as_json, found)
        return
    fetched = fetched_at(Path(path))
    if fetched is not None:
        _verify(RunFolder(path), [fetched], path, fetched.path.name, deep, as_json)
        return
    folder, checkpoints = checkpoints_at(Path(path))
    name = Path(path).resolve().name
    _verify(folder, checkpoints, path, None if step_of(name) is None else name, deep, as_json)


def _verify(
    folder: RunFolder,
    checkpoints: Sequence[Checkpoint],
    path: str,
    name: str | None,
    deep: bool,
    as_json: bool,
    found: on_mirror.Found | None = None,
) -> None:
    """
    Args:
        name: of the one checkpoint that was asked for; None: the run was.
    """
    total = sum(c.manifest.total_bytes for c in checkpoints)
    with on_mirror.reading(folder, total, "reading") if deep else nullcontext():
        faults = {c.path.name: folder.state_of(c, deep) for c in checkpoints}
    if name is None:  # of a run at work: one that it has pruned meanwhile is no fault of it
        faults = {other: found for other, found in faults.items() if found != [GONE]}
    odd = folder.odd()
    if name is not None:
        odd = {other: fault for other, fault in odd.items() if other == name}
    faults.update({other: [fault] for other, fault in odd.items()})
    if as_json:
        report = VerifyReport({n: tuple(found) for n, found in faults.items()})
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        _tell_faults(folder, checkpoints, faults, deep)
    if any(faults.values()) or not faults:
        if not faults:
            _tell_none(folder, path, found)
        raise typer.Exit(1)


def _tell_faults(
    folder: RunFolder,
    checkpoints: Sequence[Checkpoint],
    faults: dict[str, list[str]],
    deep: bool,
) -> None:
    for checkpoint in checkpoints:
        if faults.get(checkpoint.path.name) == []:
            how = "every byte" if deep else "sizes"
            manifest = checkpoint.manifest
            valid = "valid part" if manifest.is_part else "valid"
            console.tell(
                f"{checkpoint.path.name}: {valid} ({counted(len(manifest.files), 'file')}, "
                f"{human_bytes(manifest.total_bytes)}, {how} compared)"
                + ("" if manifest.has_digest else f"; {WITHOUT_DIGEST}"),
            )
    for name, found in faults.items():
        for fault in found:
            console.tell(f"{name}: {fault}")
    for name, note in notes_on(folder).items():
        console.tell(f"{name}: {note}")
    tell_part(folder, checkpoints)

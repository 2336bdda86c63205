"""`keepstep fetch | sync`: a checkpoint of a mirror on this disk; a mirror up to date by hand."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepstep.cli import on_mirror
from keepstep.cli.common import (
    RunArgument,
    app,
    console,
    ended_by_signals,
    examples,
    fail,
    used_run,
)
from keepstep.cli.status import status_of
from keepstep.output.printable import quoted
from keepstep.output.progress import Tell
from keepstep.output.terminal import progress_bar
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import folder_name
from keepstep.policy.mirror import VARIABLE, address_fault, url_of
from keepstep.policy.mirrored import runs_in
from keepstep.run_folder.place import read_place
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage

PART = "this machine has a part of it alone; launched again, the run sends it"

if TYPE_CHECKING:
    from keepstep.mirror.interruptible import Interruptible
    from keepstep.mirror.sync import Sync


@app.command(
    epilog=examples(
        "keepstep fetch s3://my-bucket/runs/mine/checkpoint-500 --to weights",
        "keepstep fetch s3://my-bucket/runs/mine --to newest",
    )
)
def fetch(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="One checkpoint on a mirror (s3://bucket/prefix/NAME/checkpoint-500, …/best); "
            "of a run (s3://bucket/prefix/NAME) the newest. `keepstep ls` lists what is there.",
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="A folder that does not exist yet.")
    ],
) -> None:
    """Bring a checkpoint of a mirror to this disk: every byte is compared with its digest."""
    from keepstep.mirror.fetching import fetch_whole, room_for, scratch_folder

    if to.exists():
        fail(f"{to} exists", "    Hint: name a folder that does not")
    with ended_by_signals(), on_mirror.looking(url) as found:
        run = found.one_run()
        source = found.checkpoint()
        size, storage = source.manifest.total_bytes, Storage()
        with (
            room_for(size, to),
            scratch_folder(to.with_name(f".{to.name}.fetched"), storage) as scratch,
            on_mirror.reading(run, size, "fetching"),
        ):
            brought = fetch_whole(run, source.step, scratch / source.path.name, storage)
            storage.rename(brought.path, to)
    console.tell(f"{to}: step {source.step}, {human_bytes(size)}, every byte compared")


@app.command(
    epilog=examples(
        "keepstep sync runs/mine", "keepstep sync runs/mine --mirror s3://my-bucket/runs"
    )
)
def sync(
    run: RunArgument,
    mirror: Annotated[
        str | None,
        typer.Option(
            "--mirror",
            metavar="URL",
            help="The recipe's `mirror`, or the run's own address there; without it the one that "
            "the run was copied to, or KEEPSTEP_MIRROR.",
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take_over",
            help="Send also what only the run's owner there may, though another machine's attempt "
            "was the last: if that is at work, it ends.",
        ),
    ] = False,
) -> None:
    """Bring a run's mirror up to date by hand: checkpoints, and metrics that came later."""
    from keepstep.mirror.owners import DeposedError
    from keepstep.mirror.store import StoreError
    from keepstep.mirror.sync import Sync

    folder = used_run(run)
    if not folder.checkpoints():
        fail(f"{run}: no committed checkpoint")
    try:
        store = _mirror_of(folder, mirror)
        with ended_by_signals(store.give_up):
            with console.waiting(f"looking at {store.url} …"):
                work = Sync(folder, store)
                measured = work.send_metrics()
            for step in measured:
                console.tell(f"{folder_name(step)}: its newer metrics are on the mirror now")
            for step in work.parts:
                console.tell(f"{folder_name(step)}: not sent: {PART}")
            refused = _why_not(folder, work, store.url, take_over)
            owed = bool(work.lacking or work.superfluous)
            if owed and refused:
                fail(*refused, status=1)
            if owed or (work.leftovers and not refused):
                _send(work)
            if work.parts:
                raise typer.Exit(1)
            if not owed:
                console.tell(f"{store.url} is up to date")
    except DeposedError as error:
        fail(str(error), status=1)
    except StoreError as error:
        fail(*str(error).split("\n"), status=2 if error.fatal else 1)


def _mirror_of(folder: RunFolder, mirror: str | None) -> Interruptible:
    """The run's own address there."""
    from keepstep.mirror.interruptible import Interruptible
    from keepstep.mirror.stores import open_store

    known = _known_mirror(folder) if mirror is None else None
    asked = mirror or known or os.environ.get(VARIABLE)
    if not asked:
        fail("no mirror is known", "    Hint: --mirror s3://bucket/prefix, as the recipe has it")
    fault = address_fault(asked)
    if fault is not None:
        fail(fault)
    own = url_of(asked, str(folder.path))
    if known is not None or asked.rstrip("/").rpartition("/")[2] == own.rpartition("/")[2]:
        store = Interruptible(open_store(asked, person_waits=True))
        if known is not None or "" in runs_in(store.names()):
            return store
    return Interruptible(open_store(own, person_waits=True))


def _known_mirror(folder: RunFolder) -> str | None:
    """By the log, which not every machine's own folder has."""
    place = read_place(folder)
    return folder.mirror() or (place.mirror if place else None)


def _why_not(folder: RunFolder, work: Sync, url: str, take_over: bool) -> list[str]:
    """Why no checkpoint may be sent, in lines: only the owner writes them, and who is at work is
    not deposed without a word."""
    state = status_of(folder).state
    if work.is_this_folders and state == "running":
        told = f"{folder.path} is at work, and copies its checkpoints itself"
        return [told, f"    Hint: keepstep save-now {quoted(folder.path)}"]
    if work.is_another_machines:
        told = f"{url}: the run was last carried on by another machine (owner {work.owner[0]})"
    elif work.is_this_folders and state == "unknown":
        told = f"{folder.path} may be at work on another machine, which copies its checkpoints"
    else:
        return []
    if take_over:
        return []
    names = ", ".join(checkpoint.path.name for checkpoint in work.lacking) or "nothing is lacking"
    hint = "    Hint: if it is not at work any more, --take_over"
    return [told, f"    Not sent: {names}", hint]


def _send(work: Sync) -> None:
    failed = False

    def sending(checkpoint: Checkpoint) -> AbstractContextManager[Tell]:
        return progress_bar(console, f"sending {checkpoint.path.name}")

    for news in work.send(sending):
        if "pruned" in news and "step" not in news:
            for step in news["pruned"]:
                console.tell(f"{folder_name(step)}: removed from the mirror")
            continue
        name = folder_name(news["step"])
        if "error" in news:
            failed = True
            console.tell(f"{name}: not sent: {news['error']}")
            continue
        there = news["copied"] + news["found"]
        known = f", {human_bytes(there)} were there" if there else ""
        console.tell(f"{name}: {human_bytes(news['bytes'])} sent in {news['seconds']:g} s{known}")
    if failed:
        raise typer.Exit(1)

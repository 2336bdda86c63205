"""`keepstep fetch`: what a mirror holds, and one checkpoint of it on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepstep.cli.common import app, console, examples, fail
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import ManifestError, step_of
from keepstep.policy.mirror import Copied
from keepstep.policy.strict import TextError
from keepstep.run_folder.storage import Storage

if TYPE_CHECKING:
    from keepstep.mirror.store import Store
    from keepstep.run_folder.checkpoint import Checkpoint


@app.command(
    epilog=examples(
        "keepstep fetch s3://my-bucket/runs/mine",
        "keepstep fetch s3://my-bucket/runs/mine/checkpoint-500 --to weights",
    )
)
def fetch(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="A run on a mirror (s3://bucket/prefix/NAME), or one checkpoint of it "
            "(…/checkpoint-500).",
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="A new folder for it. Without this option the checkpoints are listed."),
    ] = None,
) -> None:
    """List the checkpoints of a mirror, or bring one: every byte is compared with its digest."""
    from keepstep.mirror.owners import there as there_on
    from keepstep.mirror.store import StoreError
    from keepstep.mirror.stores import open_store

    address, _, last = url.rstrip("/").rpartition("/")
    step = step_of(last)
    try:
        store = open_store(url if step is None else address)
        there = {one.step: one for one in there_on(store, store.names())}
        if not there or (step is not None and step not in there):
            fail(f"{store.url}: no such checkpoint; there: {', '.join(map(str, there)) or 'none'}")
        if to is None:
            _list(store, step)
        else:
            _bring(store, there[max(there) if step is None else step], to)
    except StoreError as error:
        fail(str(error), status=2 if error.fatal else 1)
    except (ManifestError, TextError) as error:
        fail(f"{url}: {error}", status=1)


def _list(store: Store, step: int | None) -> None:
    from keepstep.mirror.listing import checkpoints_on

    found, unreadable = checkpoints_on(store, store.names())
    for number in [n for n in sorted(found) if step in (None, n)]:
        manifest = found[number].manifest
        losses = [f", {k} {v:.4f}" for k, v in sorted(manifest.metrics.items()) if "loss" in k]
        size, saved = human_bytes(manifest.total_bytes), manifest.saved_at[:16].replace("T", " ")
        console.tell(f"checkpoint-{number}: {size}, saved {saved} UTC{''.join(losses)}")
    for folder, why in unreadable.items():
        console.tell(f"{folder}: {why}")
    if unreadable:
        raise typer.Exit(1)


def _bring(store: Store, wanted: Copied, to: Path) -> None:
    from keepstep.mirror.download import fetch as fetch_one

    if to.exists():
        fail(f"{to} exists\n    Hint: name a folder that does not")
    storage, partial = Storage(), to.with_name(f"{to.name}.partial")
    found: Checkpoint = fetch_one(store, wanted, partial, storage)
    storage.rename(partial, to)
    size = human_bytes(found.manifest.total_bytes)
    console.tell(f"{to}: step {wanted.step}, {size}, every byte compared")

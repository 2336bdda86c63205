"""Brings a checkpoint from a mirror: every byte is compared with its digest before it is there."""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from keepstep.mirror.history import take_history
from keepstep.mirror.listing import Listed, later_evaluations, look, manifest_of, receipts_of
from keepstep.mirror.owners import there
from keepstep.mirror.reading import checked
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.upload import AT_ONCE
from keepstep.output.progress import Tell, nobody
from keepstep.policy.manifest import (
    MANIFEST_NAME,
    WHOLE_NAME,
    FileEntry,
    Manifest,
    folder_name,
)
from keepstep.policy.mirror import Copied, Part, what_is_missing
from keepstep.policy.strict import TextError
from keepstep.run_folder.checkpoint import Checkpoint, faults_of
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, read_evaluations
from keepstep.run_folder.parts import part_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter


class OtherRunError(StoreError):
    """The mirror holds another run than the folder."""


@dataclass(frozen=True)
class Brought:
    """What came from a mirror.

    Attributes:
        checkpoint: in the run folder now; None: nothing newer is there.
        passed_by: newer ones that are not what was written: name → why.
        listed: what was there.
    """

    checkpoint: Checkpoint | None
    passed_by: dict[str, str]
    listed: Listed


def bring(
    run: RunFolder,
    storage: Storage,
    store: Store,
    staging: Path,
    together: Collection[int] | None = None,
    tell: Tell = nobody,
) -> Brought:
    """The newest checkpoint of a mirror into the run folder, if it is newer than what is there; and
    the run's history, into an unused one.

    Args:
        staging: a folder of the run that a later attempt sweeps.
        together: the steps that the machines of the run have together, each a part; None: they see
            one folder.
        tell: how far it is.

    Raises:
        StoreError: the mirror cannot be read, or what it holds is nothing to go on from.
        OSError: of the disk.
    """
    listed = look(store)
    copies = listed.copies
    if not copies:
        return Brought(None, {}, listed)
    take_history(run, storage, store, listed.names)
    records = run.records_of(list(listed.found.values()), (), None)
    here = {c.step: c for c in run.checkpoints()}
    whole = {step for step in here if not here[step].manifest.is_part}
    if together is not None:  # other machines have to get it from there
        # What only others have, the main process, which has lost its disk, cannot choose.
        whole = (whole & copies.keys()) | (here.keys() & set(together))
    local = max(whole, default=-1)
    newer = sorted((r.step for r in records if not r.abandoned and r.step > local), reverse=True)
    passed_by = dict(listed.unreadable)
    spoilt = run.damaged() | run.lost_manifests()
    for step in newer:
        target = run.path / folder_name(step)
        if step not in here and target.name not in spoilt and os.path.lexists(target):
            passed_by[copies[step].folder] = f"{target.name} here is somebody else's"
            continue
        try:
            place = staging / folder_name(step)
            fetched = fetch(store, copies[step], place, storage, here.get(step), tell=tell)
        except (StoreError, TextError) as error:
            if isinstance(error, StoreError) and error.fatal:
                raise
            passed_by[copies[step].folder] = str(error)
            continue
        if os.path.lexists(target):  # this machine's part of it, or what damage has left of it
            storage.rename(target, staging / f"part-of-{target.name}")
        storage.rename(fetched.path, target)
        return Brought(replace(fetched, path=target), passed_by, listed)
    if local < 0:
        told = "; ".join(f"{name}: {why}" for name, why in passed_by.items())
        raise StoreError(f"{store.url}: none of its checkpoints can be had: {told}", fatal=False)
    return Brought(None, passed_by, listed)


def complete(
    chosen: Checkpoint,
    wanted: Collection[str],
    writer: RunWriter,
    store: Store,
    tell: Tell = nobody,
) -> None:
    """These files of a checkpoint into a folder that lacks some, or where some are damaged: what is
    there of them already is not fetched.

    Raises:
        StoreError, TextError: it is not what was written there, or not the one that was chosen.
        OSError: of the disk.
    """
    here = {c.step: c for c in writer.run.checkpoints()}.get(chosen.step)
    if here and here.manifest.files.keys() >= set(wanted) and not here.faults(deep=True):
        return
    counted = {one.step: one for one in there(store, store.names())}
    if chosen.step not in counted:
        raise StoreError(f"{store.url}: {chosen.path.name} is there no more", fatal=False)
    one = counted[chosen.step]
    if manifest_of(store, one)[0].to_json() != chosen.manifest.to_json():
        raise StoreError(f"{store.url}: {chosen.path.name} is another one there", fatal=False)
    staged = writer.staging / chosen.path.name
    only = None if chosen.manifest.files.keys() <= set(wanted) else wanted
    writer.put_in_place(fetch(store, one, staged, writer.storage, here, only, tell))


def fetch(
    store: Store,
    one: Copied,
    folder: Path,
    storage: Storage,
    here: Checkpoint | None = None,
    only: Collection[str] | None = None,
    tell: Tell = nobody,
) -> Checkpoint:
    """One checkpoint into a new folder, where it is durable then.

    Args:
        here: what this machine has of it: its files are not fetched, if no byte of them differs.
        only: these of its files, as a part of it; None: all.
        tell: how far it is.

    Raises:
        StoreError, TextError: it is not what was written there.
        OSError: of the disk.
    """
    if folder.exists():
        storage.remove(folder)
    manifest, text = manifest_of(store, one)
    names = store.names(one.folder)
    parts = _parts(store, one, names, manifest)
    storage.make_folder(folder)
    if only is not None:
        manifest, content = part_of(manifest, only)
        storage.write(folder / WHOLE_NAME, content)
        text = manifest.to_json().encode()
    lacking = set()
    for name, entry in manifest.files.items():
        if name == WHOLE_NAME:
            continue
        storage.make_folder((folder / name).parent)
        if here is not None and _has(here, name, entry):
            storage.link(here.path / name, folder / name, or_copy=True)
            continue
        lacking.add(name)
        with storage.create(folder / name, sync=False):
            pass
        os.truncate(folder / name, entry.bytes)
    wanted = [part for part in parts if part.file in lacking]
    done, total = 0, sum(part.bytes for part in wanted)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(_fetch_part, store, one, part, folder) for part in wanted]
        for part, future in zip(wanted, futures, strict=True):
            future.result()
            done += part.bytes
            tell(done, total)
    for name in manifest.files:
        storage.sync(folder / name)
    measured = later_evaluations(store, one.folder, names, manifest)
    if measured is not None:
        storage.write(folder / EVALUATIONS_NAME, measured)
    storage.write(folder / MANIFEST_NAME, text)
    found = Checkpoint(folder, manifest, read_evaluations(folder, manifest))
    faults = faults_of(found, deep=True)
    if faults:
        raise StoreError(f"{one.folder}: {faults[0]}", fatal=False)
    return found


def _parts(store: Store, one: Copied, names: Collection[str], manifest: Manifest) -> list[Part]:
    """The objects of a checkpoint.

    Raises:
        StoreError, TextError: they are not the files that its manifest lists.
    """
    parts = receipts_of(store, one.folder, names)
    missing = what_is_missing(manifest, parts)
    odd = [
        p.file for p in parts if p.file not in manifest.files or ".." in PurePosixPath(p.name).parts
    ]
    if missing or odd:
        raise StoreError(f"{one.folder}: its receipt and its manifest differ", fatal=False)
    return parts


def _has(here: Checkpoint, name: str, entry: FileEntry) -> bool:
    """Whether this machine has a file of a checkpoint, every byte of it."""
    if here.manifest.files.get(name) != entry:
        return False
    try:
        return digest_of(here.path / name) == entry.xxh3_128
    except OSError:
        return False


def _fetch_part(store: Store, one: Copied, part: Part, folder: Path) -> None:
    found: bytes | FileNotFoundError
    try:
        found = store.get(f"{one.folder}/{part.name}")
    except FileNotFoundError as error:
        found = error
    content = checked(part, found, f"{one.folder}: ")
    with open(folder / part.file, "r+b") as file:
        os.pwrite(file.fileno(), content, part.begin)


def check_run(run: RunFolder, store: Store) -> None:
    """Before anybody takes a mirror from its run's owner.

    Raises:
        OtherRunError: the folder is another run's.
        StoreError: the mirror cannot be read.
    """
    own = run.run_id()
    if own is None:
        return
    others = {c.manifest.run_id for c in look(store).found.values()} - {own}
    if others:
        raise OtherRunError(
            f"{store.url} holds run {', '.join(sorted(others))}, {run.path} is run {own}\n"
            "    Hint: another output_dir or another mirror; or move the folder away, to carry on "
            "from the mirror",
            fatal=True,
        )

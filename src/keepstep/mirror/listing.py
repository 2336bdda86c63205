"""What a run's mirror holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from keepstep.mirror.store import Entry, Store
from keepstep.policy.manifest import MANIFEST_NAME, Manifest, ManifestError
from keepstep.policy.mirror import RECEIPT, Copied, Part, copied, read_receipt
from keepstep.run_folder.checkpoint import Checkpoint


def checkpoints_on(
    store: Store, names: Mapping[str, Entry]
) -> tuple[dict[int, Checkpoint], dict[str, str]]:
    """By step, with their manifests; and those whose manifest cannot be taken: folder → why.

    Raises:
        StoreError: of the store.
    """
    found: dict[int, Checkpoint] = {}
    unreadable: dict[str, str] = {}
    for one in copied(names):
        try:
            manifest, _ = manifest_of(store, one)
        except (ManifestError, FileNotFoundError) as error:  # the newest owner takes it away
            unreadable[one.folder] = str(error)
        else:
            found[one.step] = Checkpoint(Path(one.folder), manifest)
    return found, unreadable


def manifest_of(store: Store, one: Copied) -> tuple[Manifest, bytes]:
    """It, and its text.

    Raises:
        ManifestError: it is not what was written.
    """
    text = store.get(f"{one.folder}/{MANIFEST_NAME}")
    manifest = Manifest.from_json(text.decode(errors="replace"))
    if manifest.global_step != one.step:
        raise ManifestError(f"{one.folder} is of step {manifest.global_step}")
    return manifest, text


def receipts_of(store: Store, folder: str, names: Iterable[str]) -> list[Part]:
    """The objects of a checkpoint, as all its receipts tell: each machine that uploaded has one.

    Args:
        folder: of the checkpoint, below the run's prefix.
        names: of all objects there, or more; the folder's own are looked for.

    Raises:
        TextError: a receipt is none.
        FileNotFoundError, StoreError: of the store.
    """
    prefix = f"{folder}/"
    own = sorted(n for n in names if n.startswith(prefix) and RECEIPT.fullmatch(n[len(prefix) :]))
    return [part for name in own for part in read_receipt(store.get(name))]

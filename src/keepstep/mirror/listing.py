"""What a run's mirror holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keepstep.mirror.owners import there
from keepstep.mirror.store import Entry, Store
from keepstep.policy.completeness import differences
from keepstep.policy.manifest import MANIFEST_NAME, Manifest, ManifestError, finite_metrics
from keepstep.policy.mirror import RECEIPT, Copied, Part, distinct, evaluations_of, read_receipt
from keepstep.policy.mirrored import listed_sizes
from keepstep.policy.strict import TextError
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import evaluations_in, first_believed


@dataclass(frozen=True)
class Listed:
    """What was there at one look.

    Attributes:
        names: of all objects.
        copies: the checkpoints that count: step → where its objects are.
        found: by step, with their manifests, and what was measured later.
        unreadable: those whose manifest cannot be taken: folder → why.
    """

    names: Mapping[str, Entry]
    copies: Mapping[int, Copied]
    found: Mapping[int, Checkpoint]
    unreadable: Mapping[str, str]

    def objects(self) -> dict[int, int]:
        """Of each checkpoint that counts, how many objects it has."""
        sizes = Counter("/".join(name.split("/")[:2]) for name in self.names)
        return {step: sizes[one.folder] for step, one in self.copies.items()}


def look(store: Store) -> Listed:
    """What a run's mirror holds.

    Raises:
        StoreError: of the store.
    """
    names = store.names()
    copies = {one.step: one for one in there(store, names)}
    found: dict[int, Checkpoint] = {}
    unreadable: dict[str, str] = {}
    for one in copies.values():
        try:
            manifest, _ = manifest_of(store, one)
        except (ManifestError, FileNotFoundError) as error:  # the newest owner takes it away
            unreadable[one.folder] = str(error)
        else:
            later = later_metrics(store, one.folder, names, manifest)
            found[one.step] = Checkpoint(Path(one.folder), manifest, later)
    return Listed(names, copies, found, unreadable)


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
    return distinct(part for name in own for part in read_receipt(store.get(name)))


def is_whole(store: Store, folder: str, manifest: Manifest, names: Mapping[str, Entry]) -> bool:
    """Whether all objects of a checkpoint are listed, in their sizes. A manifest alone does not
    tell: a rule of the bucket, or somebody, may have removed what it names.

    Args:
        folder, names: as for `receipts_of`.

    Raises:
        StoreError: of the store.
    """
    try:
        parts = receipts_of(store, folder, names)
    except (FileNotFoundError, TextError):
        return False
    sizes = listed_sizes(manifest, parts, folder, {n: e.bytes for n, e in names.items()})
    return bool(parts) and not differences(manifest, sizes)


def later_metrics(
    store: Store, folder: str, names: Iterable[str], manifest: Manifest
) -> dict[str, float]:
    """What was measured of a checkpoint after it had been copied; empty: nothing."""
    text = later_evaluations(store, folder, names, manifest)
    return {} if text is None else finite_metrics(evaluations_in(text.decode(), manifest)[0])


def later_evaluations(
    store: Store, folder: str, names: Iterable[str], manifest: Manifest
) -> bytes | None:
    """The newest object of that kind that can be believed: it is no part of the checkpoint, which
    is none the worse without. None: there is none.

    Args:
        folder, names: as for `receipts_of`.

    Raises:
        StoreError: of the store.
    """

    def texts() -> Iterator[bytes]:
        for name in evaluations_of(folder, names):
            with suppress(FileNotFoundError):
                yield store.get(name)

    return first_believed(texts(), manifest)

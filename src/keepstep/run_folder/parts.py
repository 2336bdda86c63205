"""One machine's part of a checkpoint, where the run folder is each machine's own (`node_local`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from xxhash import xxh3_128_hexdigest

from keepstep.policy.manifest import LONGEST_MANIFEST, WHOLE_NAME, FileEntry, Manifest
from keepstep.policy.node_parts import Held
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import read_text


def part_of(whole: Manifest, names: Collection[str]) -> tuple[Manifest, bytes]:
    """The manifest of a part: these files of a checkpoint, and the whole manifest as another one.

    Returns:
        It, and the content of that file (`WHOLE_NAME`).
    """
    content = whole.to_json().encode()
    files = {name: entry for name, entry in whole.files.items() if name in names}
    rank = min((entry.rank for entry in files.values()), default=0)
    files[WHOLE_NAME] = FileEntry(rank, len(content), xxh3_128_hexdigest(content))
    return replace(whole, files=files), content


def whole_of(checkpoint: Checkpoint) -> Checkpoint:
    """The same with the manifest of the whole, though not all of its files are here.

    Raises:
        ManifestError, OddFileError: it is not what was written.
        OSError: it cannot be read.
    """
    if not checkpoint.manifest.is_part:
        return checkpoint
    text = read_text(checkpoint.path / WHOLE_NAME, LONGEST_MANIFEST)
    return replace(checkpoint, manifest=Manifest.from_json(text))


def held_in(run: RunFolder) -> dict[int, Held]:
    """What a machine's folder has of each checkpoint. One that is damaged is not held."""
    found = {}
    for checkpoint in run.checkpoints(any_run=True):
        try:
            whole = whole_of(checkpoint).manifest
        except (ValueError, OSError):
            continue  # verifying it tells why
        digest = xxh3_128_hexdigest(whole.to_json().encode())
        names = frozenset(checkpoint.manifest.files) - {WHOLE_NAME}
        found[checkpoint.step] = Held(digest, len(whole.files), names, whole.run_id, whole.attempt)
    return found

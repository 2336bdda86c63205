"""Evaluations that were made of a checkpoint after it was committed, in a file beside its manifest.

The manifest stays as it is. The file goes with its folder, and of a value that the manifest has
that one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from keepstep.policy.manifest import Manifest, finite_metrics
from keepstep.policy.strict import TextError, build, checked, with_check
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_text
from keepstep.run_folder.storage import Storage

EVALUATIONS_NAME = "evaluations.json"


def read_evaluations(folder: Path, manifest: Manifest) -> dict[str, float]:
    """What was measured of the checkpoint in `folder` afterwards; empty: nothing that can be
    believed (it is no part of the checkpoint, which is none the worse)."""
    try:
        return finite_metrics(evaluations_in(_read(folder), manifest)[0])
    except (OSError, OddFileError, TextError):
        return {}


def rows_evaluated(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Digests of the rows that it was measured on, by the names of their sets; a single one has
    the name "". Empty where the file cannot be believed, or does not say."""
    try:
        return evaluations_in(_read(folder), manifest)[1]
    except (OSError, OddFileError, TextError):
        return {}


def evaluations_in(text: str, manifest: Manifest) -> tuple[dict[str, float], dict[str, str]]:
    """What such a file says of the checkpoint with this manifest: metrics, and digests of the rows
    they are of.

    Raises:
        TextError: it is not what was written, or of another checkpoint.
    """
    values = checked(text.strip())[0]
    metrics = build(dict[str, float], values.pop("metrics", None), "metrics")
    rows = build(dict[str, str], values.pop("rows", {}), "rows")
    if values != _whose(manifest):
        raise TextError("it is of another checkpoint")
    return metrics, rows


def first_believed(texts: Iterable[bytes], manifest: Manifest) -> bytes | None:
    """The first of these contents of such a file that is one of this checkpoint."""
    for text in texts:
        try:
            evaluations_in(text.decode(errors="replace"), manifest)
        except TextError:
            continue
        return text
    return None


def evaluations_text(
    manifest: Manifest, metrics: Mapping[str, float], rows: Mapping[str, str]
) -> bytes:
    """The content of such a file."""
    told = {**_whose(manifest), "metrics": dict(metrics), "rows": dict(rows)}
    return with_check(json.dumps(told)).encode() + b"\n"


def is_same_checkpoint(one: Manifest, other: Manifest) -> bool:
    """Whether both are of one checkpoint, whatever has been measured of it since."""
    return _whose(one) == _whose(other) and one.files == other.files


def _read(folder: Path) -> str:
    return read_text(folder / EVALUATIONS_NAME)


def fault_of_evaluations(folder: Path, manifest: Manifest) -> str | None:
    """Why the file is passed by; None: it is not, or is not there."""
    try:
        evaluations_in(_read(folder), manifest)
    except ABSENT:
        return None
    except (OSError, OddFileError, TextError) as error:
        return str(error)
    return None


def add_evaluation(
    storage: Storage,
    folder: Path,
    manifest: Manifest,
    metrics: Mapping[str, float],
    rows: Mapping[str, str],
) -> dict[str, float]:
    """Write down what was measured, beside what was before; of one name the newer value.

    A reader sees the old file or the new one, also when this process is killed.

    Args:
        rows: digests of what it was measured on, by the names of the sets ("" for a single one).

    Returns:
        All that the file says now.

    Raises:
        OSError: of the disk; FileNotFoundError: the checkpoint was pruned meanwhile.
    """
    known = read_evaluations(folder, manifest) | finite_metrics(metrics)
    digests = rows_evaluated(folder, manifest) | dict(rows)
    storage.replace(folder / EVALUATIONS_NAME, evaluations_text(manifest, known, digests))
    return known


def _whose(manifest: Manifest) -> dict[str, object]:
    """A checkpoint that a branch has saved again, or a copy in another run, is another one."""
    names = ("run_id", "attempt", "global_step", "saved_at")
    return {name: getattr(manifest, name) for name in names}

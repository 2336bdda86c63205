"""Evaluations that were made of a checkpoint after it was committed, in a file beside its manifest.

The manifest stays as it is. The file goes with its folder, and of a value that the manifest has
that one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from keepstep.policy.manifest import Manifest, finite_metrics
from keepstep.policy.strict import TextError, build, with_check
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object
from keepstep.run_folder.storage import Storage

EVALUATIONS_NAME = "evaluations.json"


def read_evaluations(folder: Path, manifest: Manifest) -> dict[str, float]:
    """What was measured of the checkpoint in `folder` afterwards; empty: nothing that can be
    believed (it is no part of the checkpoint, which is none the worse)."""
    try:
        values, metrics, _ = _read(folder)
    except (OSError, OddFileError, TextError):
        return {}
    return finite_metrics(metrics) if values == _whose(manifest) else {}


def rows_evaluated(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Digests of the rows that it was measured on, by the names of their sets; a single one has
    the name "". Empty where the file cannot be believed, or does not say."""
    try:
        values, _, rows = _read(folder)
    except (OSError, OddFileError, TextError):
        return {}
    return rows if values == _whose(manifest) else {}


def _read(folder: Path) -> tuple[dict[str, object], dict[str, float], dict[str, str]]:
    """Whose the file is, its metrics, and digests of the rows they are of."""
    values = read_object(folder / EVALUATIONS_NAME)
    metrics = build(dict[str, float], values.pop("metrics", None), "metrics")
    return values, metrics, build(dict[str, str], values.pop("rows", {}), "rows")


def fault_of_evaluations(folder: Path, manifest: Manifest) -> str | None:
    """Why the file is passed by; None: it is not, or is not there."""
    try:
        values = _read(folder)[0]
    except ABSENT:
        return None
    except (OSError, OddFileError, TextError) as error:
        return str(error)
    return None if values == _whose(manifest) else "it is of another checkpoint"


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
    text = with_check(json.dumps({**_whose(manifest), "metrics": known, "rows": digests}))
    storage.replace(folder / EVALUATIONS_NAME, text.encode() + b"\n")
    return known


def _whose(manifest: Manifest) -> dict[str, object]:
    """A checkpoint that a branch has saved again, or a copy in another run, is another one."""
    names = ("run_id", "attempt", "global_step", "saved_at")
    return {name: getattr(manifest, name) for name in names}

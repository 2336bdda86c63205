"""Whether what `keepstep evaluate` would measure can be ranked with what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keepstep.policy.completeness import missing_state
from keepstep.policy.drift import drift
from keepstep.recipe.config import Problem, Recipe
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import rows_evaluated
from keepstep.save.resume_checks import ROWS

EVALUATION = ("eval_dataset", "eval_stream")


def other_settings(
    checkpoints: Sequence[Checkpoint], settings: Mapping[str, Any], recipe: Recipe
) -> list[Problem]:
    """What would make values that cannot be ranked with the run's own."""
    changed = []
    for checkpoint in checkpoints:
        stored, planned = checkpoint.manifest.settings, checkpoint.manifest.planned_steps
        allowed = (*EVALUATION, ROWS, *recipe.training.allow_drift)
        changed.append((checkpoint, "; ".join(drift(stored, settings, allowed, planned))))
    return [
        Problem(
            f"settings are not those that {names} was made with: {what}",
            "set them back, or accept by name: --allow_drift …",
            "drift",
        )
        for what, names in _by_text(changed).items()
    ]


def other_rows(
    there: Sequence[Checkpoint], compared: Sequence[Checkpoint], rows: Mapping[str, str]
) -> list[Problem]:
    """Rows that others have their name from: in the run (of those that are compared), or in an
    evaluation afterwards (of any: they are ranked together)."""
    changed = []
    for checkpoint in there:
        before = rows_evaluated(checkpoint.path, checkpoint.manifest)
        if checkpoint in compared:
            before |= digests(checkpoint.manifest.settings)
        others = [name for name in sorted(rows) if before.get(name, rows[name]) != rows[name]]
        changed.append((checkpoint, ", ".join(name or "eval_dataset" for name in others)))
    return [
        Problem(
            f"these are other rows than {names} was evaluated on ({what})",
            'give them a name of their own: --eval_datasets \'{"other": "…"}\'',
            "drift",
        )
        for what, names in _by_text(changed).items()
    ]


def _by_text(texts: Iterable[tuple[Checkpoint, str]]) -> dict[str, str]:
    """Each text that is not empty, once, with the names of all that it is said of."""
    names: dict[str, list[str]] = {}
    for checkpoint, text in texts:
        if text:
            names.setdefault(text, []).append(checkpoint.path.name)
    return {text: ", ".join(of) for text, of in names.items()}


def weights_only(wanted: Sequence[Checkpoint], recipe: Recipe) -> list[Problem]:
    """Those that hold no state that DeepSpeed's engine could be given."""
    if not recipe.training.parallel_layout.deepspeed:
        return []
    names = ", ".join(c.path.name for c in wanted if missing_state(c.manifest))
    if not names:
        return []
    told = f"{names}: weights alone (save_only_model), and DeepSpeed takes a whole state"
    return [Problem(told, "KEEPSTEP_CONFIG=ddp evaluates them without DeepSpeed", "resume")]


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """Of the evaluation rows, by the names of their sets; a single one has the name ""."""
    found: dict[str, str] = {}
    for name in EVALUATION:
        each = _sets(settings.get(name)).items()
        found |= {key: digest for key, digest in each if digest is not None}
    return found


def _sets(stored: Any) -> dict[str, Any]:
    """Digests of rows, by the names of their sets; a single one has none."""
    if isinstance(stored, Mapping):
        return dict(stored)
    return {} if stored is None else {"": stored}

"""What a report has no curve of, though it was logged: values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepstep.report.charts import OF_STEPS, metrics_of, points_of
from keepstep.report.facts import RunFacts


def undrawn(run: RunFacts) -> list[str]:
    """A sentence for each curve that lacks all of its points, or some."""
    titles = {**OF_STEPS, **{name: f"Evaluation: {name}" for name in metrics_of([run])}}
    found = [_told(title, run.history, name) for name, title in titles.items()]
    return [sentence for sentence in found if sentence]


def _told(title: str, history: Sequence[Mapping[str, Any]], name: str) -> str:
    logged = [row for row in history if isinstance(row.get(name), float) and "step" in row]
    lacking = [row["step"] for row in logged if not points_of([row], name)]
    if not lacking:
        return ""
    if len(lacking) == len(logged):
        return f"{title}: no curve, since none of {len(logged)} logged values is finite."
    first = f"the first at step {lacking[0]}"
    return f"{title}: {len(lacking)} of {len(logged)} values are not finite, {first}."

"""`.keepstep/metrics.prom`: how an attempt stands, in Prometheus' text format, as node_exporter's
textfile collector reads it. Pure but for one write, of which nobody waits for the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from math import isfinite

from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage

# What an attempt shows of itself: also in its heartbeat. (A figure that is not finite is left out.)
FIGURES: Mapping[str, str] = {
    "planned_steps": "Optimizer steps that the run is to have.",
    "loss": "The training loss that was logged last.",
    "learning_rate": "The learning rate that was logged last.",
    "grad_norm": "The gradient norm that was logged last.",
    "steps_per_second": "Of the time of steps alone, since the log line before.",
    "samples_per_second": "Likewise, rows on all processes.",
    "tokens_per_second": "Likewise, tokens on all processes.",
    "seconds_left": "Until the last planned step, as fast as this attempt has been so far.",
    "checkpoint_step": "The step of the newest checkpoint of this attempt.",
    "checkpoint_bytes": "Its size.",
    "checkpoint_timestamp_seconds": "When it was committed.",
    "checkpoint_write_seconds": "How long it took to write.",
    "checkpoint_stall_seconds": "How long training stood still for it.",
    "best_step": "The step of the best checkpoint.",
    "disk_free_bytes": "Bytes left on the run folder's disk after the newest save.",
}


AT_WORK = ("steps_per_second", "samples_per_second", "tokens_per_second", "seconds_left")


def metrics_of(
    reached: Reached, run: str, run_id: str, outcome: str | None = None, exit_status: int = 0
) -> str:
    """The text.

    Args:
        run: the run's folder, its name alone.
        outcome, exit_status: how the attempt has ended; None: it is at work.
    """
    labels = f'run="{_quoted(run)}",run_id="{_quoted(run_id)}"'
    lines = [
        *_metric("up", "gauge", "Whether the attempt is at work.", {labels: outcome is None}),
        *_metric("attempt", "gauge", "Which launch of the run it is.", {labels: reached.attempt}),
        *_metric("step", "gauge", "Optimizer steps completed.", {labels: reached.step}),
        *_metric(
            "progress_timestamp_seconds",
            "gauge",
            "When the attempt got on last.",
            {labels: datetime.fromisoformat(reached.time).timestamp()},
        ),
        *_metric(
            "attempt_seconds_total",
            "counter",
            "What the attempt has spent, by what it went into.",
            {f'{labels},kind="{_quoted(k)}"': s for k, s in sorted(reached.spent.items())},
        ),
    ]
    for name, told in FIGURES.items():
        if outcome is not None and name in AT_WORK:
            continue
        if isfinite(reached.figures.get(name, float("nan"))):
            lines += _metric(name, "gauge", told, {labels: reached.figures[name]})
    if outcome is not None:
        ended = f'{labels},outcome="{_quoted(outcome)}"'
        told = "The exit status of an attempt that has told how it ended."
        lines += _metric("exit_status", "gauge", told, {ended: exit_status})
    return "\n".join(lines) + "\n"


def show_metrics(run: RunFolder, storage: Storage, text: str) -> None:
    """Put it in the place of what was there, in one step."""
    storage.show(run.metrics, text)


def _metric(name: str, kind: str, told: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP keepstep_{name} {told}"
    yield f"# TYPE keepstep_{name} {kind}"
    for labels, value in values.items():
        yield f"keepstep_{name}{{{labels}}} {float(value)!r}"


def _quoted(text: str) -> str:
    printable = text.encode(errors="backslashreplace").decode()
    return printable.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

"""Tables for people. No torch: the commands import this."""

from __future__ import annotations

from rich.table import Table

from .checkpoint.runfolder import RunFolder, retention_of


def human_bytes(count: float) -> str:
    """A size as people read it: powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def checkpoint_table(run: RunFolder) -> Table:
    """One row per committed checkpoint: step, metric, size, when, state, why it is kept."""
    policy = run.policy()
    metric = policy.metric or "metric"
    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("step", "right"),
        (metric, "right"),
        ("size", "right"),
        ("processes", "right"),
        ("saved (UTC)", "left"),
        ("attempt", "right"),
        ("state", "left"),
        ("kept because", "left"),
    ):
        table.add_column(title, justify="right" if justify == "right" else "left", no_wrap=True)
    reasons = {decision.step: decision for decision in retention_of(run)}
    for checkpoint in run.checkpoints():
        manifest, decision = checkpoint.manifest, reasons[checkpoint.step]
        value = manifest.metrics.get(metric)
        faults = run.faults(checkpoint)
        stage = f"ZeRO-{manifest.zero_stage}" if manifest.zero_stage else "DDP"
        table.add_row(
            str(checkpoint.step),
            "" if value is None else f"{value:.4f}",
            human_bytes(manifest.total_bytes),
            f"{manifest.world_size} {stage}",
            manifest.saved_at[:19].replace("T", " "),
            str(manifest.attempt),
            "; ".join(faults) or "valid",
            decision.reason if decision.keep else f"to be pruned: {decision.reason}",
        )
    return table

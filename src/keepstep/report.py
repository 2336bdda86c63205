"""Tables for people, rows for programs. No torch: the commands import this."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .checkpoint.runfolder import RunFolder, retention_of


def human_bytes(count: float) -> str:
    """A size as people read it: powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def strategy_name(zero_stage: int) -> str:
    return f"ZeRO-{zero_stage}" if zero_stage else "DDP"


def checkpoint_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per committed checkpoint, oldest step first; sizes in bytes."""
    decisions = {decision.step: decision for decision in retention_of(run)}
    metric = run.policy().metric
    return [
        {
            "step": c.step,
            "metric": metric,
            "value": c.manifest.metrics.get(metric or ""),
            "bytes": c.manifest.total_bytes,
            "world_size": c.manifest.world_size,
            "zero_stage": c.manifest.zero_stage,
            "saved_at": c.manifest.saved_at,
            "attempt": c.manifest.attempt,
            "faults": run.faults(c),
            "keep": decisions[c.step].keep,
            "reason": decisions[c.step].reason,
        }
        for c in run.checkpoints()
    ]


def checkpoint_table(run: RunFolder) -> Table:
    """The same rows, to be read."""
    table = Table(box=None, pad_edge=False)
    for title in ("step", run.policy().metric or "metric", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("written by", "saved (UTC)", "attempt"):
        table.add_column(title, no_wrap=True)
    for title in ("state", "kept because"):
        table.add_column(title, overflow="fold")
    for row in checkpoint_rows(run):
        table.add_row(
            str(row["step"]),
            "" if row["value"] is None else f"{row['value']:.4f}",
            human_bytes(row["bytes"]),
            f"{row['world_size']} x {strategy_name(row['zero_stage'])}",
            row["saved_at"][:19].replace("T", " "),
            str(row["attempt"]),
            "; ".join(row["faults"]) or "valid",
            row["reason"] if row["keep"] else f"to be pruned: {row['reason']}",
        )
    return table

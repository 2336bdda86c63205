"""Tables for people, rows for programs. No torch: the commands import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table

from .checkpoint.batch import BatchError, Dealt, agree
from .checkpoint.manifest import Manifest, not_reshardable, strategy_name
from .checkpoint.printable import printable
from .checkpoint.retention import Record, best_step
from .checkpoint.runfolder import RunFolder
from .checkpoint.schedule import best_interval
from .checkpoint.selection import PATIENCE, SelectionError, UnreadableError, choose

SAVE_FACTS = (
    *("stall", "wait", "copy", "write", "digest", "read_back", "commit"),
    *("gb_per_s", "slowest_rank"),
)


def human_bytes(count: float) -> str:
    """A size as people read it: powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def checkpoint_rows(run: RunFolder) -> list[dict[str, Any]]:
    """One row per committed checkpoint, oldest step first; sizes in bytes."""
    decisions = {decision.step: decision for decision in run.retention()}
    saves = run.saves()
    metric = run.policy().metric
    abandoned = {record.step for record in run.records(metric) if record.abandoned}
    attempts = {attempt.number: attempt for attempt in run.attempts()}
    return [
        {
            "step": c.step,
            "metric": metric,
            "value": c.manifest.metrics.get(metric or ""),
            "bytes": c.manifest.total_bytes,
            "world_size": c.manifest.world_size,
            "zero_stage": c.manifest.zero_stage,
            "deepspeed": c.manifest.deepspeed,
            "saved_at": c.manifest.saved_at,
            "attempt": c.manifest.attempt,
            "parent": c.manifest.parent,
            "job": dict(attempts[c.manifest.attempt].job),
            "resharded_from": attempts[c.manifest.attempt].resharded,
            "origin": c.manifest.origin,
            "abandoned": c.step in abandoned,
            "finite": c.manifest.health.get("finite", True),
            "faults": run.state_of(c),
            "keep": decisions[c.step].keep,
            "reason": decisions[c.step].reason,
            "save": {n: v for n, v in saves.get(c.step, {}).items() if n in SAVE_FACTS},
        }
        for c in run.checkpoints()
    ]


def checkpoint_table(run: RunFolder) -> Table:
    """The same rows, to be read."""
    table = Table(box=None, pad_edge=False)
    for title in ("step", run.policy().metric or "metric", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("written by", "saved (UTC)", "lineage"):
        table.add_column(title, no_wrap=True)
    for title in ("state", "kept because"):
        table.add_column(title, overflow="fold")
    for row in checkpoint_rows(run):
        state = "; ".join(row["faults"]) or ("valid" if row["finite"] else "valid, loss not finite")
        table.add_row(
            str(row["step"]),
            "" if row["value"] is None else f"{row['value']:.4f}",
            human_bytes(row["bytes"]),
            f"{row['world_size']} x {strategy_name(row['zero_stage'], row['deepspeed'])}",
            row["saved_at"][:19].replace("T", " "),
            _lineage(row),
            state,
            row["reason"] if row["keep"] else f"to be pruned: {row['reason']}",
        )
    return table


def attempt_table(run: RunFolder) -> Table:
    """Every attempt: when, as which batch job and where, from what, and how it ended."""
    table = Table(box=None, pad_edge=False)
    for title in ("attempt", "began (UTC)", "job", "restarts", "nodes", "from", "commits"):
        table.add_column(title, no_wrap=True)
    table.add_column("ended", overflow="fold")
    for attempt in run.attempts():
        job = [str(attempt.job.get(name, "")) for name in ("job", "restarts", "nodes")]
        began = (attempt.began or "")[:19].replace("T", " ")
        begun_at = "" if attempt.request is None else f"step {attempt.resumed_from}"
        ended = attempt.outcome or "no word of it: killed, or at work"
        ended += "" if attempt.reached is None else f" at step {attempt.reached}"
        table.add_row(str(attempt.number), began, *job, begun_at, str(attempt.commits), ended)
    return table


def _lineage(row: dict[str, Any]) -> str:
    text = "adopted" if row["origin"] else f"attempt {row['attempt']}"
    if row["parent"]:
        text += f" from {row['parent']}"
    if row["resharded_from"]:
        processes, stage = row["resharded_from"]
        text += f", resharded ({processes} x {strategy_name(stage)})"
    return text


def save_table(run: RunFolder) -> Table:
    """What each save has cost: seconds of the slowest rank, and how fast all of them wrote."""
    table = Table(box=None, pad_edge=False)
    *seconds, rate, slowest = SAVE_FACTS
    for title in ("step", "size", *seconds, "GB/s", "slowest rank"):
        table.add_column(title, justify="right", no_wrap=True)
    for step, save in sorted(run.saves().items()):
        figures = [f"{save[name]:.3f}" if name in save else "" for name in (*seconds, rate)]
        size = human_bytes(save["bytes"])
        table.add_row(str(step), size, *figures, str(save.get(slowest, "")))
    return table


def step_seconds(run: RunFolder) -> float | None:
    """How long a step has taken, saves and evaluations included; None: too few saves to tell."""
    steps = [
        (moment(b["time"]) - moment(a["time"])) / (later - earlier)
        for (earlier, a), (later, b) in pairwise(sorted(run.saves().items()))
        if a["attempt"] == b["attempt"]
    ]
    return median(steps) if steps else None


def save_hint(run: RunFolder, mtbf_hours: float) -> str:
    """What this run's saves cost and a failure loses, and the interval that loses least."""
    saves, step = run.saves(), step_seconds(run)
    if step is None:
        return "too few saves to say how often to save"
    stall = median(float(save.get("stall", 0.0)) for save in saves.values())
    apart = max(later - earlier for earlier, later in pairwise(sorted(saves)))
    best = best_interval(stall, mtbf_hours * 3600)
    return (
        f"a save stops training for {stall:.3f} s, a step takes {step:.2f} s, and a failure loses "
        f"up to {apart} steps ({apart * step:.0f} s). With one failure in {mtbf_hours:g} hours a "
        f"save every {best:.0f} s ({max(1, round(best / step))} steps) loses least."
    )


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def resume_answer(run: RunFolder, request: str, num_processes: int | None = None) -> dict[str, Any]:
    """What `resume_from_checkpoint: request` would take, compared with the newest and the best.

    `loses_steps`: to be trained again, against the newest checkpoint; `loses_metric`: how much
    worse than the best one, in the metric's own unit. `batch`: how `num_processes` would share out
    the rows of a step; `refused`: why they cannot.
    """
    policy = run.policy()
    records = {record.step: record for record in run.records(policy.metric)}
    alive = [record for record in records.values() if not record.abandoned]
    answer: dict[str, Any] = {"request": request, "step": None, "world_size": None, "error": None}
    answer |= {"metric": policy.metric, "value": None, "loses_steps": None, "loses_metric": None}
    answer |= {"num_processes": num_processes, "batch": None, "refused": None}
    situation = run.situation(
        request, policy, lambda step: run.faults(run.checkpoint(step), deep=None), PATIENCE
    )
    try:
        choice = choose(request, situation)
    except (SelectionError, UnreadableError) as error:
        return answer | {"error": str(error), "others": {}}
    newest, best = max((r.step for r in alive), default=0), best_step(alive, policy)
    if choice.step is not None:
        chosen = records[choice.step]
        manifest = run.checkpoint(choice.step).manifest
        answer["world_size"] = manifest.world_size
        if num_processes is not None:
            answer |= _shared_out(manifest, num_processes)
        answer["value"] = chosen.value
        if best is not None and chosen.value is not None:
            answer["loses_metric"] = round(abs(chosen.value - (records[best].value or 0.0)), 6)
    taken = choice.step or 0
    others = {
        c.step: _why_not(c.step, taken, choice.passed_by, records)
        for c in situation.candidates
        if c.step != choice.step
    }
    return answer | {
        "step": choice.step,
        "loses_steps": max(0, newest - taken),
        "under_way": choice.under_way,
        "others": dict(sorted(others.items())),
    }


def _shared_out(manifest: Manifest, num_processes: int) -> dict[str, str | None]:
    """What becomes of the rows of a step on so many processes, if the recipe stays as it is."""
    reason = not_reshardable(manifest.files)
    if reason and num_processes != manifest.world_size:
        return {"refused": f"it was written by {manifest.world_size} processes, and {reason}"}
    before = Dealt.from_json(manifest.dealt)
    if before is None:
        return {"batch": "the recipe's batch (what it was is not known)"}
    try:
        return {"batch": str(agree(before, replace(before.asked, world_size=num_processes)))}
    except BatchError as error:
        return {"refused": str(error)}


def tell_answer(answer: dict[str, Any]) -> str:
    """A resume's answer in words."""
    if answer["error"]:
        return f"{answer['request']}: {answer['error']}"
    target = "the beginning" if answer["step"] is None else f"checkpoint-{answer['step']}"
    parts = [f"{answer['request']} takes {target}"]
    if answer["value"] is not None:
        parts.append(f"{answer['metric']} {answer['value']:.4f}")
    steps = answer["loses_steps"]
    parts.append(f"{steps} steps to repeat" if steps else "no step to repeat")
    if answer["loses_metric"] is not None:
        worse = answer["loses_metric"]
        parts.append(f"{worse:.4f} worse than the best" if worse else "the best there is")
    lines = [": ".join([parts[0], ", ".join(parts[1:])])]
    lines += ["  (an earlier attempt has gone back already)"] if answer["under_way"] else []
    if answer["num_processes"] is not None and answer["step"] is not None:
        told = answer["batch"] or f"not possible: {answer['refused']}"
        lines.append(f"  on {answer['num_processes']} processes: {told}")
    others = answer["others"].items()
    lines += [f"  not checkpoint-{step}: {printable(why)}" for step, why in others]
    return "\n".join(lines)


def _why_not(
    step: int, taken: int, passed_by: Mapping[int, str], records: Mapping[int, Record]
) -> str:
    if step in passed_by:
        return passed_by[step]
    if step in records and records[step].abandoned:
        return "on an abandoned branch"
    return "older" if step < taken else "newer, but not what was asked for"

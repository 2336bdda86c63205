"""Tables for people, rows for programs. No torch: the commands import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table

from keepstep.output.printable import printable
from keepstep.output.units import human_bytes
from keepstep.policy.batch import BatchError, Dealt, agree
from keepstep.policy.manifest import Manifest, not_reshardable, strategy_name
from keepstep.policy.retention import Record, best_step
from keepstep.policy.schedule import best_interval
from keepstep.policy.selection import PATIENCE, SelectionError, UnreadableError, choose
from keepstep.run_folder.reader import RunFolder

LONGEST = 12  # characters of a number in a table
CUT = 60  # characters of a text in a table that anybody may have written
SAVE_FACTS = (
    *("stall", "wait", "copy", "write", "digest", "read_back", "commit"),
    *("gb_per_s", "slowest_rank"),
)


def figure(value: float, places: int = 4) -> str:
    """A number as a table holds it: one that nobody can have measured costs no other its place."""
    text = f"{value:.{places}f}"
    return text if len(text) <= LONGEST else f"{value:.3g}"


def short_figure(value: float) -> str:
    """Three digits, in five characters: of seconds, or GB/s."""
    size = abs(value)
    if size >= 1e5:
        return f"{value:.0e}"
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def cell(value: object) -> str:
    """What anybody may have written into events.jsonl, as a table holds it."""
    if isinstance(value, int):
        return figure(value, 0)
    text = str(value)
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"


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


def checkpoint_table(run: RunFolder, narrow: bool = False) -> Table:
    """The same rows, to be read; `narrow`: the columns that 80 characters hold."""
    table = Table(box=None, pad_edge=False)
    metric = run.policy().metric or "metric"
    for title in ("step", "metric" if narrow and len(metric) > LONGEST else metric, "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("saved (UTC)",) if narrow else ("written by", "saved (UTC)", "lineage"):
        table.add_column(title, no_wrap=True)
    for title in ("state", "kept because"):
        table.add_column(title, overflow="fold")
    for row in checkpoint_rows(run):
        state = "; ".join(row["faults"]) or ("valid" if row["finite"] else "valid, loss not finite")
        strategy = strategy_name(row["zero_stage"], row["deepspeed"])
        saved = row["saved_at"][: 16 if narrow else 19].replace("T", " ")
        written = [f"{row['world_size']} x {strategy}", saved, _lineage(row)]
        table.add_row(
            str(row["step"]),
            "" if row["value"] is None else figure(row["value"]),
            human_bytes(row["bytes"]),
            *([saved] if narrow else written),
            state,
            row["reason"] if row["keep"] else f"to be pruned: {row['reason']}",
        )
    return table


def attempt_table(run: RunFolder, narrow: bool = False) -> Table:
    """Every attempt: when, as which batch job and where, from what, and how it ended; `narrow`: in
    80 characters."""
    table, attempts = Table(box=None, pad_edge=False), run.attempts()
    of_jobs = ["job", "restarts", "nodes"]
    if narrow:
        of_jobs = ["job", "nodes"] if any(attempt.job for attempt in attempts) else []
    for title in ("attempt", "began (UTC)"):
        table.add_column(title, no_wrap=True)
    for title in of_jobs:
        table.add_column(title, overflow="fold" if narrow else "ellipsis", no_wrap=not narrow)
    for title in ("from", "commits"):
        table.add_column(title, no_wrap=True)
    table.add_column("ended", overflow="fold")
    for attempt in attempts:
        job = [cell(attempt.job.get(name, "")) for name in of_jobs]
        began = (attempt.began or "")[5 if narrow else 0 : 16 if narrow else 19].replace("T", " ")
        begun_at = "" if attempt.request is None else f"step {attempt.resumed_from}"
        ended = cell(attempt.outcome or "no word of it: killed, or at work")
        ended += "" if attempt.reached is None else f" at step {cell(attempt.reached)}"
        table.add_row(str(attempt.number), began, *job, begun_at, str(attempt.commits), ended)
    return table


def _lineage(row: dict[str, Any]) -> str:
    text = "adopted" if row["origin"] else f"attempt {row['attempt']}"
    if row["parent"]:
        text += f" from {row['parent']}"
    if row["resharded_from"]:
        processes, stage = row["resharded_from"]
        text += f", resharded ({cell(processes)} x {strategy_name(stage)})"
    return text


def save_table(run: RunFolder, narrow: bool = False) -> Table:
    """What each save has cost: seconds of the slowest rank, and how fast all of them wrote;
    `narrow`: in 80 characters."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    *seconds, rate, slowest = SAVE_FACTS
    for title in ("step", "size", *seconds, "GB/s", "rank" if narrow else "slowest rank"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = short_figure if narrow else partial(figure, places=3)
    for step, save in sorted(run.saves().items()):
        figures = [shown(save[name]) if name in save else "" for name in (*seconds, rate)]
        size = human_bytes(save.get("bytes", 0))
        table.add_row(str(step), size, *figures, cell(save.get(slowest, "")))
    return table


def intervals(run: RunFolder) -> list[tuple[int, int, float]]:
    """Attempt, steps and seconds between each two saves in a row of one attempt, oldest first.
    Saves whose checkpoints are gone count, too: what is left does not tell how often it saved."""
    of_attempts: dict[int, list[dict[str, Any]]] = {}
    for commit in run.commits():
        of_attempts.setdefault(commit["attempt"], []).append(commit)
    return [
        (number, later["step"] - earlier["step"], moment(later["time"]) - moment(earlier["time"]))
        for number, commits in sorted(of_attempts.items())
        for earlier, later in pairwise(commits)
        if later["step"] > earlier["step"]  # else it was saved again, with its metric
    ]


def step_seconds(run: RunFolder) -> float | None:
    """How long a step has taken, saves and evaluations included; None: too few saves to tell."""
    steps = [seconds / count for _, count, seconds in intervals(run)]
    return median(steps) if steps else None


def save_hint(run: RunFolder, mtbf_hours: float) -> str:
    """What this run's saves cost and a failure loses, and the interval that loses least."""
    found, step = intervals(run), step_seconds(run)
    if step is None or step <= 0:  # or a clock was set meanwhile
        return "too few saves to say how often to save"
    stall = median(max(0.0, float(save.get("stall", 0.0))) for save in run.commits())
    newest = found[-1][0]  # whose recipe holds
    apart = max(count for number, count, _ in found if number == newest)
    best = best_interval(stall, mtbf_hours * 3600)
    return (
        f"a save stops training for {figure(stall, 3)} s, a step takes {figure(step, 2)} s, and a "
        f"failure loses up to {apart} steps ({figure(apart * step, 0)} s). With one failure in "
        f"{mtbf_hours:g} hours a save every {figure(best, 0)} s "
        f"({max(1, round(best / step))} steps) loses least."
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
        parts.append(f"{answer['metric']} {figure(answer['value'])}")
    steps = answer["loses_steps"]
    parts.append(f"{steps} steps to repeat" if steps else "no step to repeat")
    if answer["loses_metric"] is not None:
        worse = answer["loses_metric"]
        parts.append(f"{figure(worse)} worse than the best" if worse else "the best there is")
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

"""Tables for people. No torch: the commands import this."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from keepstep.cli.rows import (
    SAVE_FACTS,
    CheckpointRow,
    MirroredRunRow,
    ResumeAnswer,
    checkpoint_rows,
)
from keepstep.output.printable import first_few, printable
from keepstep.output.table import Column, Table
from keepstep.output.units import counted, human_bytes
from keepstep.policy.auto_interval import (
    LOOK_BACK,
    AutoInterval,
    costs_of,
    seconds_apart,
    typical,
)
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.schedule import best_interval
from keepstep.run_folder.reader import RunFolder

OF_AUTO = ("interval", "overhead")  # what a commit tells under `save_interval_seconds: auto`
LONGEST = 12  # characters of a number in a table
SECONDS_WORTH = {"stall": 8, "write": 7, "wait": 3}  # of a table's columns; others: 1
CUT = 60  # characters of a text in a table that anybody may have written


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


def checkpoint_table(
    run: RunFolder, narrow: bool = False, step: int | None = None, copies: bool = True
) -> Table:
    """The same rows, to be read; `narrow`: in shorter words; `step`: this one's alone;
    `copies`: say of which there is a copy on a mirror."""
    metric = run.policy().metric or "metric"
    title = "metric" if narrow and len(metric) > LONGEST else metric
    table = Table(
        Column("step", "right"),
        Column(title, "right", worth=6),
        Column("size", "right", worth=3),
        Column("written by", worth=2),
        Column("saved (UTC)", worth=4),
        Column("lineage", worth=1),
        Column("state", least=20),
        Column("kept because", worth=5, least=24),
    )
    for row in [row for row in checkpoint_rows(run) if step in (None, row.step)]:
        valid = "valid part" if row.part else "valid"
        state = "; ".join(row.faults) or (valid if row.finite else f"{valid}, not finite")
        state += ", mirrored" if copies and row.mirror is not None else ""
        layout = ParallelLayout(row.world_size, row.zero_stage, row.deepspeed)
        saved = row.saved_at[: 16 if narrow else 19].replace("T", " ")
        table.add_row(
            str(row.step),
            "" if row.value is None else figure(row.value),
            human_bytes(row.bytes),
            str(layout),
            saved,
            _lineage(row),
            state,
            row.reason if row.keep else f"to be pruned: {row.reason}",
        )
    return table


def mirrored_run_table(rows: Sequence[MirroredRunRow], narrow: bool = False) -> Table:
    """Runs on a mirror; `narrow`: what follows the last slash of their addresses."""
    table = Table(
        Column("run", least=20, elide="middle"),
        Column("checkpoints", "right", worth=2),
        Column("newest", "right", worth=4),
        Column("size", "right", worth=3),
        Column("saved (UTC)", worth=1),
    )
    for row in rows:
        saved = "not known" if row.saved_at is None else row.saved_at[:16].replace("T", " ")
        table.add_row(
            row.run.rpartition("/")[2] if narrow else row.run,
            str(len(row.checkpoints)),
            str(row.checkpoints[-1]),
            human_bytes(row.bytes),
            saved,
        )
    return table


def attempt_table(run: RunFolder, narrow: bool = False) -> Table:
    """Every attempt: when, as which batch job and where, from what, and how it ended; `narrow`: in
    80 characters."""
    attempts = [attempt for attempt in run.attempts() if attempt.number]  # 0: what was adopted
    of_jobs = {"job": 3, "restarts": 1, "nodes": 2}
    if narrow and not any(attempt.job for attempt in attempts):
        of_jobs = {}
    table = Table(
        Column("attempt"),
        Column("began (UTC)", worth=4),
        *(Column(name, worth=worth, least=12, elide="middle") for name, worth in of_jobs.items()),
        Column("from", worth=6),
        Column("commits", worth=5),
        Column("ended", least=24, elide="middle"),
    )
    for attempt in attempts:
        job = [cell(attempt.job.get(name, "")) for name in of_jobs]
        began = (attempt.began or "")[5 if narrow else 0 : 16 if narrow else 19].replace("T", " ")
        begun_at = "" if attempt.request is None else f"step {attempt.resumed_from}"
        no_word = "killed" if attempt is not attempts[-1] else "no word of it: killed, or at work"
        ended = cell(attempt.outcome or no_word)
        ended += "" if attempt.reached is None else f" at step {cell(attempt.reached)}"
        table.add_row(str(attempt.number), began, *job, begun_at, str(attempt.commits), ended)
    return table


def _lineage(row: CheckpointRow) -> str:
    text = "adopted" if row.origin else f"attempt {row.attempt}"
    if row.parent:
        text += f" from {row.parent}"
    if row.resharded_from:
        text += f", resharded ({ParallelLayout(*row.resharded_from)})"
    return text


def save_table(run: RunFolder, narrow: bool = False) -> Table:
    """What each save has cost: seconds of the slowest rank, and how fast all of them wrote;
    `narrow`: in 80 characters."""
    *seconds, rate, slowest = SAVE_FACTS
    table = Table(
        Column("step", "right"),
        Column("size", "right", worth=4),
        *(Column(name, "right", worth=SECONDS_WORTH.get(name, 1)) for name in seconds),
        Column("GB/s", "right", worth=5),
        Column("rank" if narrow else "slowest rank", "right", worth=2),
        Column("why", worth=6, least=8),
        gap=1 if narrow else 2,
    )
    shown = short_figure if narrow else partial(figure, places=3)
    for step, save in sorted(run.saves().items()):
        figures = [shown(save[name]) if name in save else "" for name in (*seconds, rate)]
        size = human_bytes(save.get("bytes", 0))
        table.add_row(
            str(step), size, *figures, cell(save.get(slowest, "")), cell(save.get("why", ""))
        )
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
        f"failure loses up to {counted(apart, 'step')} ({figure(apart * step, 0)} s). "
        f"With one failure in {mtbf_hours:g} hours a save every {figure(best, 0)} s "
        f"({counted(max(1, round(best / step)), 'step')}) loses least."
    )


def pace_hint(run: RunFolder, mtbf_hours: float) -> str | None:
    """How `save_interval_seconds: auto` saves at last; None: the newest save was not under it."""
    commits = run.commits()
    interval, share = (commits[-1].get(name) if commits else None for name in OF_AUTO)
    if interval is None or share is None:
        return None
    text = (
        f"save_interval_seconds: auto: at last {figure(interval, 1)} s from one save to the next, "
        "where nothing else asks for one; until then training had stood still for saves for "
        f"{figure(100 * share, 2)} % of the attempt's time."
    )
    costs = costs_of(commits[-LOOK_BACK:])
    of_disk = seconds_apart(AutoInterval(overhead=1, least=0), costs)  # no field shortens that
    best = best_interval(max(0.0, typical(costs.stalls)), mtbf_hours * 3600)
    if interval > 2 * max(best, of_disk):
        text += "\nHint: a higher max_save_overhead, or a lower save_min_seconds, loses less."
    return text


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def tell_answer(answer: ResumeAnswer) -> str:
    """A resume's answer in words."""
    if answer.error:
        return f"{answer.request}: {answer.error}"
    target = "the beginning" if answer.step is None else f"checkpoint-{answer.step}"
    parts = [f"{answer.request} takes {target}"]
    if answer.value is not None:
        parts.append(f"{answer.metric} {figure(answer.value)}")
    steps = answer.loses_steps
    parts.append(f"{counted(steps, 'step')} to repeat" if steps else "no step to repeat")
    if answer.loses_metric is not None:
        worse = answer.loses_metric
        parts.append(f"{figure(worse)} worse than the best" if worse else "the best there is")
    lines = [": ".join([parts[0], ", ".join(parts[1:])])]
    lines += ["  (an earlier attempt has gone back already)"] if answer.under_way else []
    if answer.num_processes is not None and answer.step is not None:
        told = answer.batch or f"not possible: {answer.refused}"
        lines.append(f"  on {counted(answer.num_processes, 'process')}: {told}")
    for why in dict.fromkeys(answer.others.values()):
        of_it = [step for step, reason in answer.others.items() if reason == why]
        lines.append(f"  not checkpoint-{first_few(of_it)}: {printable(why)}")
    return "\n".join(lines)

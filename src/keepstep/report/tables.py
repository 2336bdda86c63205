"""The tables of a report. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keepstep.output.printable import first_few
from keepstep.output.units import counted, human_bytes
from keepstep.policy.sentences import sentence
from keepstep.report.charts import Chart, points_of
from keepstep.report.drawing import thinned
from keepstep.report.facts import AttemptFacts, RunFacts, wall

MOST_ROWS = 200
MOST_SAMPLES = 60
CUT = 400  # characters of a value, or of a reason


@dataclass(frozen=True)
class Table:
    """The first cell of each row names it.

    Attributes:
        caption: what it is.
        head: the columns' names.
        rows: texts.
        left_out: a sentence about rows that are not shown; empty: all are.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: str = ""


def tables_of(run: RunFacts) -> list[Table]:
    """All that have a row."""
    found = [
        _attempts(run),
        _events(run, "Reshards", ("reshard",)),
        _events(run, "Rewinds, spikes and what was not finite", ("rewind", "spike", "nonfinite")),
        _events(run, "Pushes", ("publish",)),
        _events(run, "Saves that failed, what was set aside, ranks that were stuck", TROUBLE),
        _changes(run),
        Table(
            "Where it came from",
            ("what", "is"),
            [(name, text) for name, text in run.about.items() if text],
        ),
        Table("Versions", ("library", "version"), sorted(run.versions.items())),
    ]
    return [_without_empty(table) for table in found if table.rows]


def _without_empty(table: Table) -> Table:
    """Without the columns in which no row has anything."""
    kept = [n for n in range(len(table.head)) if any(row[n] for row in table.rows)]
    rows = [[row[n] for n in kept] for row in table.rows]
    return Table(table.caption, [table.head[n] for n in kept], rows, table.left_out)


TROUBLE = ("save_failed", "quarantine", "hang")


def _attempts(run: RunFacts) -> Table:
    head = ("attempt", "began (UTC)", "from step", "to step", "ended", "saves", "on", "reason")
    return Table("Attempts", head, [_attempt(attempt) for attempt in run.attempts])


def _attempt(of: AttemptFacts) -> list[str]:
    status = "" if of.exit in (None, 0) else f" (exit status {of.exit})"
    hosts = [f"{host}, {counted(n, 'process')}" for host, n in of.hosts.items()]
    reason = " ".join((of.reason or "").split())
    return [
        str(of.number),
        (of.began or "")[:19].replace("T", " "),
        _number(of.resumed_from),
        _number(of.reached),
        of.end + status,
        _number(of.commits),
        first_few(hosts),
        cut(reason),
    ]


def _events(run: RunFacts, caption: str, kinds: Sequence[str]) -> Table:
    events = [event for event in run.events if event["event"] in kinds]
    rows = [
        [str(e["time"])[:19].replace("T", " "), str(e.get("attempt", "")), cut(sentence(e))]
        for e in events[-MOST_ROWS:]
    ]
    return Table(caption, ("time (UTC)", "attempt", "what"), rows, _left_out(events, rows))


def _changes(run: RunFacts) -> Table:
    rows = [
        [f"attempt {attempt.number}", name, cut(json.dumps(before)), cut(json.dumps(now))]
        for attempt in run.attempts
        for name, (before, now) in attempt.changed.items()
    ]
    head = ("since", "field of the recipe", "before", "now")
    return Table("What changed between attempts", head, rows)


def samples_of(run: RunFacts) -> Table | None:
    """Completions of the newest evaluations, the newest first; None: there are none."""
    newest = sorted(run.samples, key=lambda of: (-of.step, of.number))[:MOST_SAMPLES]
    compared = any(sample.reference is not None for sample in newest)
    head = ("step", "prompt", "completion", *(("reference",) if compared else ()))
    rows = [
        [
            str(of.step),
            of.prompt,
            of.completion or "(nothing)",
            *((of.reference or "",) if compared else ()),
        ]
        for of in newest
    ]
    return Table("Samples", head, rows, _left_out(run.samples, rows)) if rows else None


def numbers_of(chart: Chart) -> Table:
    """What a chart shows, for who does not see it."""
    rows = [
        [f"{x:,.6g}", one.label, "" if one.shape == "rug" else f"{y:.6g}"]
        for one in chart.series
        for x, y in thinned(one.points, MOST_ROWS)
    ]
    short = any(len(of.points) > MOST_ROWS for of in chart.series)
    left = "Of many points the lowest and the highest of each stretch." if short else ""
    return Table(f"{chart.title}, in numbers", (chart.along, "what", "value"), rows, left)


def goodput_table(run: RunFacts, titles: Iterable[tuple[str, str]]) -> Table:
    """Parts of the wall time, in percent; together 100."""
    shares = run.goodput.shares()
    rows = [[title, f"{shares[name]:.1f} %"] for name, title in titles]
    together = ["together", f"{sum(shares.values()):.1f} %"]
    return Table("What the time went into", ("part", "share"), [*rows, together])


def comparison(runs: Sequence[RunFacts]) -> Table:
    """The headline figures of several runs, a row each."""
    head = ("run", "stands", "step", "best step", "best metric", "training loss", "attempts")
    more = ("kills", "productive", "lost", "wall time", "checkpoints")
    rows = [_figures(run) for run in runs]
    return _without_empty(Table("Side by side", (*head, *more), rows))


def _figures(run: RunFacts) -> list[str]:
    best, lost, losses = run.best, run.lost(), points_of(run.history, "loss")
    value = "" if best is None or best[1] is None else f"{run.metric} {best[1]:.4g}"
    sizes = {(e["attempt"], e["step"]): e.get("bytes") for e in run.of_kind("commit")}
    total = sum(size for at, size in sizes.items() if at in run.fates and isinstance(size, int))
    productive = run.goodput.shares()["productive"]
    return [
        run.name,
        run.stands,
        _number(run.reached),
        _number(None if best is None else best[0]),
        value,
        f"{losses[-1][1]:.4f}" if losses else "",
        _number(len(run.attempts)),
        _number(run.kills),
        f"{productive:.1f} %" if run.goodput.is_known else "",
        "" if lost is None else f"{lost:.1f} %",
        wall(run),
        f"{len(run.fates)}, {human_bytes(total)}" if run.fates else "",
    ]


def _left_out(all_of: Sequence[object], shown: Sequence[object]) -> str:
    if len(shown) == len(all_of):
        return ""
    return f"The newest {len(shown):,} of {len(all_of):,}."


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def cut(text: str) -> str:
    """Its beginning, where it is long."""
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"

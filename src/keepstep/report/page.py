"""The report as one HTML page. Everything that a run has said is escaped by the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from keepstep.output.printable import printable
from keepstep.output.units import human_bytes
from keepstep.policy.goodput import TITLES
from keepstep.report.charts import MARKS, Chart, charts_of
from keepstep.report.drawing import ENDS, HAPPENED, OF_MARK, VARIABLES, draw, draw_lifeline
from keepstep.report.facts import RunFacts, headline, wall
from keepstep.report.lifeline import lifeline
from keepstep.report.tables import comparison, goodput_table, numbers_of, samples_of, tables_of
from keepstep.report.tree import lineage
from keepstep.report.undrawn import undrawn

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_SAVES = 200  # of a run; of more, pruned ones are only counted
GENERATOR = "keepstep report"  # what tells one of these files from a person's own
LETTERS = {  # a mark of a chart → the character that the legend has for it
    **{"line": "━", "stairs": "━", "dashed": "╌", "level": "╌", "rug": "|"},
    **{"kept": "●", "best": "★", "pruned": "○", "abandoned": "□"},
    **{"quarantined": "✖", "published": "◯"},
}
LETTERS_OF_TIME = {"push": "◇", "reshard": "△", "rewind": "◁", "set aside": "✖"}
assert LETTERS_OF_TIME.keys() == HAPPENED.keys()


def page(runs: Sequence[RunFacts], made: str, version: str) -> str:
    """
    Args:
        runs: one, or several to be compared.
        made: when the report is made.
        version: of keepstep.
    """
    here = files(__package__)
    charts = _charts(runs)
    template = _environment().from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        title=", ".join(run.name for run in runs),
        generator=GENERATOR,
        made=made,
        version=version,
        by_step=[drawn for chart, drawn in charts if chart.along == "step"],
        by_time=[*_lives(runs), *(drawn for chart, drawn in charts if chart.along != "step")],
        comparison=comparison(runs) if len(runs) > 1 else None,
        runs=[_run(run, f"run{number}") for number, run in enumerate(runs, start=1)],
    )


def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined  # no other command waits for it

    found = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined)
    found.trim_blocks = found.lstrip_blocks = True
    found.filters |= {"text": _lines, "pruned": lambda save, fate: fate(save) == "pruned"}
    return found


def _run(run: RunFacts, key: str) -> dict[str, Any]:
    shares = run.goodput.shares()
    return {
        "key": key,
        "name": run.name,
        "headline": headline(run),
        "reason": " ".join((run.reason or "").split()),
        "undrawn": undrawn(run),
        "faults": [f"{file}: {fault}" for file, fault in run.faults.items()],
        "wall": wall(run),
        "parts": [(name, TITLES[name], share) for name, share in shares.items() if share],
        "goodput": goodput_table(run, TITLES.items()) if run.goodput.is_known else None,
        "free": "" if run.disk_free is None else human_bytes(run.disk_free),
        "tree": lineage(run),
        "best": None if run.best is None else run.best[0],
        "fate": run.fate,
        "published": run.published(),
        "tables": tables_of(run),
        "samples": samples_of(run),
        "saves": (saves := len(run.of_kind("commit"))),
        "counts_pruned": saves > MOST_SAVES,
        "attempts": len(run.attempts),
    }


def _lives(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """When the attempts of each were at work. (Its numbers are the table of attempts.)"""
    found = []
    for number, run in enumerate(runs, start=1):
        life = lifeline(run)
        if life is not None:
            title = "Attempts" if len(runs) == 1 else f"Attempts of {run.name}"
            if len(life.bars) < len(run.attempts):
                title += f", the newest {len(life.bars)} of {len(run.attempts):,}"
            legend = _ends([how for *_, how in life.bars], life.marks)
            svg = Markup(draw_lifeline(life, f"life{number}"))
            found.append({"title": title, "svg": svg, "legend": legend, "numbers": None})
    return found


def _charts(runs: Sequence[RunFacts]) -> list[tuple[Chart, dict[str, Any]]]:
    charts = charts_of(runs)
    steps = [x for c in charts if c.along == "step" for s in c.series for x, _ in s.points]
    limits = (0.0, max(steps) * 1.03) if steps and max(steps) > 0 else None
    return [
        (
            chart,
            {
                "title": chart.title,
                "svg": Markup(draw(chart, f"chart{number}", limits)),
                "legend": _legend(chart),
                "numbers": numbers_of(chart),
            },
        )
        for number, chart in enumerate(charts)
    ]


def _legend(chart: Chart) -> list[tuple[str, str, str]]:
    """Letter, colour and words of each kind of points; each once."""
    found = {}
    for one in chart.series:
        colour = f"var(--c{one.colour % 6})"
        if one.shape in MARKS:
            colour = VARIABLES[OF_MARK[one.shape]] if one.shape in OF_MARK else "var(--c0)"
        found[one.label] = (LETTERS[one.shape], colour, one.label)
    return list(found.values())


def _ends(ends: Sequence[str], marks: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    bars = [
        ("■", f"var(--{ENDS.get(end, ENDS['unknown'])[1]})", end) for end in dict.fromkeys(ends)
    ]
    return bars + [(LETTERS_OF_TIME[what], "var(--ink)", what) for what in marks]


def _shown(value: object) -> object:
    """Whatever is put into the page, but what the page itself is made of."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lines(text: str) -> Markup:
    """A text of several lines as these, each escaped."""
    return Markup("<br>").join(printable(line) for line in text.split("\n"))

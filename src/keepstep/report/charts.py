"""What the charts of a report show: points, marks, words. Pure; `drawing.py` draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

from keepstep.report.facts import Fate, RunFacts, began_at, moment
from keepstep.report.tree import lineage

Point = tuple[float, float]
Shape = Literal["line", "dashed", "stairs", "level", "rug", Fate, "published"]
MARKS: dict[
    Shape, str
] = {  # the last one is drawn on top: what has become of a checkpoint → how the legend calls it
    "kept": "kept",
    "pruned": "pruned",
    "abandoned": "saved on it",
    "quarantined": "quarantined",
    "published": "published",
    "best": "best",
}
UNTOLD = ("_runtime", "_per_second", "_num_tokens", "_time")  # of evaluations: costs, no results
FIRST = ("loss", "accuracy", "perplexity", "match")
OF_STEPS = {"loss": "Training loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm"}
MOST = 1e300  # what is above that, and what is no number, cannot be drawn
MOST_PRUNED = 100  # marks of pruned checkpoints: more would be a band
MOST_MARKED = 12  # starts of attempts that are marked by lines: more would be a hatching


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        label: what the legend calls them.
        points: (x, y), finite.
        shape: how they are drawn. Of `rug` only x counts.
        colour: number of the colour, from 0.
        begin: of stairs: where the stretch begins that the first point is the end of; None: each
            point is the begin of one.
    """

    label: str
    points: Sequence[Point]
    shape: Shape = "line"
    colour: int = 0
    begin: float | None = None


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: a word, each chart's own.
        title: with the unit of its height.
        series: what is drawn; none is empty.
        about: what a person who does not see it should know: a sentence.
        along: what its width is.
        starts: where attempts began, marked by lines.
        from_zero: its height begins at 0.
    """

    key: str
    title: str
    series: Sequence[Series]
    about: str = ""
    along: str = "step"
    starts: Sequence[float] = ()
    from_zero: bool = False


def charts_of(runs: Sequence[RunFacts]) -> list[Chart]:
    """All that there is something to draw for; of several runs over each other."""
    found: list[Chart] = []
    for key, title in OF_STEPS.items():
        found += _chart(runs, key, title, _logged(key))
    for name in metrics_of(runs):
        found += _chart(runs, name, f"Evaluation: {name}", _evaluated(name))
    found += _chart(runs, "tokens", "Speed, tokens/s", _tokens, from_zero=True)
    found += _chart(runs, "steps", "Seconds a step", _step_seconds, from_zero=True)
    found += _chart(runs, "stall", "Stall of each save, s", _of_saves("stall"), from_zero=True)
    found += _chart(runs, "rate", "Written by each save, GB/s", _of_saves("gb_per_s"), True)
    found += _chart(runs, "disk", "Disk that checkpoints take, GB", _disk, True, "seconds")
    if not metrics_of(runs):  # their checkpoints have no other place
        found[:1] = [_with_marks(chart, runs) for chart in found[:1] if chart.key == "loss"]
    return found


def metrics_of(runs: Sequence[RunFacts]) -> list[str]:
    """Names of results of evaluations: what ranks first, then the usual ones."""
    names = {name for run in runs for commit in run.of_kind("commit") for name in _results(commit)}
    names |= {n for run in runs for row in run.history for n in row if _is_result(n)}
    names |= {n for run in runs for of in run.measured.values() for n in of if _is_result(n)}
    first = [run.metric for run in runs]

    def order(name: str) -> tuple[bool, int, str]:
        known = [place for place, word in enumerate(FIRST) if word in name]
        return name not in first, min(known, default=len(FIRST)), name

    return sorted(names, key=order)


def _results(commit: Mapping[str, Any]) -> list[str]:
    return [name for name in commit.get("metrics") or {} if _is_result(name)]


def _is_result(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(UNTOLD)


def _chart(
    runs: Sequence[RunFacts],
    key: str,
    title: str,
    series_of: Callable[[RunFacts], Iterable[Series]],
    from_zero: bool = False,
    along: str = "step",
) -> list[Chart]:
    """One chart, or none where there is nothing to draw."""
    alone, drawn = len(runs) == 1, []
    for number, run in enumerate(runs):
        for series in series_of(run):
            if not series.points or not (alone or series.shape in ("line", "stairs", "best")):
                continue
            label = series.label if alone or series.shape == "best" else run.name
            colour = series.colour if alone else number
            drawn.append(replace(series, label=label, colour=colour))
    if not any(series.shape in ("line", "stairs") for series in drawn):
        return []
    starts = _starts(runs[0]) if alone and along == "step" else []
    return [Chart(key, title, drawn, _about(drawn, along), along, starts, from_zero)]


def _about(series: Sequence[Series], along: str) -> str:
    told = []
    for one in series:
        if one.shape in ("line", "stairs"):
            (x0, first), (x1, last) = one.points[0], one.points[-1]
            low, high = min(y for _, y in one.points), max(y for _, y in one.points)
            told.append(
                f"{one.label}: from {first:.4g} at {along} {x0:,.6g} to {last:.4g} at {x1:,.6g}, "
                f"between {low:.4g} and {high:.4g}"
            )
        elif one.shape in MARKS:
            at = ", ".join(f"{x:,.6g}" for x, _ in one.points[:20])
            told.append(f"{one.label}: at {along} {at}{' …' if len(one.points) > 20 else ''}")
    return "; ".join(told) + "."


def _starts(run: RunFacts) -> list[float]:
    steps = {float(a.resumed_from) for a in run.attempts if a.resumed_from}
    return sorted(steps) if len(steps) <= MOST_MARKED else []


def _logged(name: str) -> Callable[[RunFacts], Iterator[Series]]:
    def series(run: RunFacts) -> Iterator[Series]:
        for branch in run.branches:
            yield Series("a branch that was left", points_of(branch, name), "dashed", 5)
        yield Series("each log line", points_of(run.history, name))

    return series


def points_of(rows: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) of the rows that have it, as far as they are finite numbers."""
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if name in row and "step" in row and _is_number(row[name]) and _is_number(row["step"])
    ]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST


def _evaluated(name: str) -> Callable[[RunFacts], Iterator[Series]]:
    def series(run: RunFacts) -> Iterator[Series]:
        living = {(c["attempt"], c["step"]) for one in lineage(run) for c in one.saves}
        known = dict(points_of(run.history, name))
        marked: list[tuple[Fate, float, float]] = []
        left: dict[int, list[Point]] = {}
        for commit in run.of_kind("commit"):
            at = commit["attempt"], commit["step"]
            value = run.measured.get(at, commit.get("metrics") or {}).get(name)
            if not _is_number(value):
                continue
            fate = run.fate(commit)
            if at in living:
                known[float(at[1])] = value
            else:
                left.setdefault(at[0], []).append((float(at[1]), value))
                fate = fate if fate == "quarantined" else "abandoned"
            marked.append((fate, float(at[1]), value))
        yield Series("each evaluation", sorted(known.items()))
        for points in left.values():
            yield Series("a branch that was left", sorted(points), "dashed", 5)
        yield from _marks(run, marked, known)

    return series


def _marks(
    run: RunFacts, marked: Sequence[tuple[Fate, float, float]], known: Mapping[float, float]
) -> Iterator[Series]:
    for shape, label in MARKS.items():
        points = [(x, y) for fate, x, y in marked if fate == shape]
        if shape == "published":
            steps = sorted(step for _, step in run.published())
            points = [(float(step), known[step]) for step in steps if step in known]
        if shape == "pruned" and len(points) > MOST_PRUNED:
            label += f" ({len(points):,}, not drawn)"
        yield Series(label, points, shape)


def _with_marks(chart: Chart, runs: Sequence[RunFacts]) -> Chart:
    if len(runs) > 1:
        return chart
    known = dict(points_of(runs[0].history, "loss"))
    commits = [c for c in runs[0].of_kind("commit") if c["step"] in known]
    marked = [(runs[0].fate(c), float(c["step"]), known[c["step"]]) for c in commits]
    marks = [series for series in _marks(runs[0], marked, known) if series.points]
    drawn = [*chart.series, *marks]
    return Chart(chart.key, chart.title, drawn, _about(drawn, "step"), "step", chart.starts)


def _stretches(run: RunFacts) -> Iterator[tuple[int, int, float]]:
    """Of each attempt, between two saves: first step, last step, seconds of steps alone."""
    for attempt in run.attempts:
        if attempt.resumed_from is None:
            continue
        step, seconds = attempt.resumed_from, 0.0
        for spent in sorted(attempt.spent, key=lambda of: of.step):
            made = spent.seconds.get("step", 0.0)
            if spent.step > step and made > seconds:
                yield step, spent.step, made - seconds
                step, seconds = spent.step, made


def _living(points: Iterable[Point]) -> list[Point]:
    """Of a step that was made again, the last time; in the order of steps."""
    return sorted(dict(points).items())


def _step_seconds(run: RunFacts) -> Iterator[Series]:
    found = [(float(b), seconds / (b - a)) for a, b, seconds in _stretches(run)]
    yield _means(run, found)
    commits = sorted({float(commit["step"]) for commit in run.of_kind("commit")})
    yield Series("a save", [(step, 0.0) for step in commits], "rug", 1)
    rows = [row for row in run.history if any(map(_is_result, row))]
    evaluated = sorted({x for row in rows for x, _ in points_of([{**row, "": 0}], "")})
    yield Series("an evaluation", [(x, 1.0) for x in evaluated], "rug", 2)


def _tokens(run: RunFacts) -> Iterator[Series]:
    """By the tokens that TRL counts, and the time of steps alone."""
    counted = dict(points_of(run.history, "num_tokens")) | {0.0: 0.0}
    found = [
        (float(b), (counted[b] - counted[a]) / seconds)
        for a, b, seconds in _stretches(run)
        if a in counted and b in counted and counted[b] > counted[a]
    ]
    yield _means(run, found)


def _means(run: RunFacts, found: Iterable[Point]) -> Series:
    begin = min((float(a) for a, _, _ in _stretches(run)), default=0.0)
    return Series("mean from save to save", _living(found), "stairs", begin=begin)


def _of_saves(name: str) -> Callable[[RunFacts], Iterator[Series]]:
    def series(run: RunFacts) -> Iterator[Series]:
        commits = run.of_kind("commit")
        found = [(float(c["step"]), c[name]) for c in commits if _is_number(c.get(name))]
        yield Series("each save", _living(found))

    return series


def _disk(run: RunFacts) -> Iterator[Series]:
    began = began_at(run)
    there: dict[int, int] = {}
    points: list[Point] = []
    for event in run.events:
        step, kind, at = event.get("step"), event["event"], moment(event["time"])
        if kind == "commit" and _is_number(event.get("bytes")):
            there[step or 0] = event["bytes"]
        elif kind in ("prune", "quarantine") and event.get("reason") != "replaced":
            there.pop(step or 0, None)
        else:
            continue
        if at is not None and began is not None:
            points.append((max(0.0, at - began), sum(there.values()) / 1e9))
    yield Series("all checkpoints", points, "stairs")
    if points and run.total_limit is not None:
        ends = (points[0][0], points[-1][0])
        yield Series("its limit", [(x, run.total_limit / 1e9) for x in ends], "level", 3)

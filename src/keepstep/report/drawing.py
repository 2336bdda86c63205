"""Charts as SVG, by matplotlib: text stays text, colours are the page's own (CSS variables)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from keepstep.output.printable import printable
from keepstep.report.charts import MOST_PRUNED, Chart, Point, Series
from keepstep.report.lifeline import Lifeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.2, 2.7  # inches of 72 points: as wide as a phone, so that letters stay readable
MOST_POINTS = 600
# A colour that nothing else has → the variable that takes its place (page.css).
PALETTE = ("#a10001", "#a10002", "#a10003", "#a10004", "#a10005", "#a10006")
INK, FAINT, PAPER, SOFT = "#a20001", "#a20002", "#a20003", "#a20004"
ENDS = {  # how an attempt ended → its colour and variable
    "finished": ("#a30001", "good"),
    "preempted": ("#a30002", "calm"),
    "rewound": ("#a30002", "calm"),
    "killed": ("#a30003", "bad"),
    "failed": ("#a30003", "bad"),
    "no_progress": ("#a30003", "bad"),
    "at work": ("#a30004", "busy"),
    "unknown": ("#a30005", "dim"),
}
VARIABLES = (
    {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)}
    | {INK: "var(--ink)", FAINT: "var(--line)", PAPER: "var(--paper)", SOFT: "var(--soft)"}
    | {colour: f"var(--{name})" for colour, name in ENDS.values()}
)
MARKERS: dict[str, dict[str, Any]] = {
    "kept": {"marker": "o", "markersize": 6},
    "best": {"marker": "*", "markersize": 13},
    "pruned": {"marker": "o", "markersize": 6, "markerfacecolor": PAPER},
    "abandoned": {"marker": "s", "markersize": 5, "markerfacecolor": PAPER},
    "quarantined": {"marker": "X", "markersize": 8},
    "published": {"marker": "o", "markersize": 12, "fillstyle": "none"},
}
OF_MARK = {"best": PALETTE[1], "abandoned": PALETTE[5], "quarantined": PALETTE[3]}
OF_MARK |= {"published": PALETTE[2]}
HAPPENED = {"push": "D", "reshard": "^", "rewind": "<", "set aside": "X"}
SECONDS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "path.simplify": True,
}


def draw(chart: Chart, name: str, limits: tuple[float, float] | None = None) -> str:
    """A chart as an SVG element.

    Args:
        name: a word, each chart's own in its page: its ids begin with it.
        limits: of the axis of steps, which all charts of a page have in common.
    """
    from matplotlib import style
    from matplotlib.ticker import MaxNLocator

    # Whatever a person has in a matplotlibrc.
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure, axes = _figure(HEIGHT)
        factor, unit = _unit(chart) if chart.along == "seconds" else (1.0, chart.along)
        for step in chart.starts:
            axes.axvline(step, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)), zorder=0)
        for series in chart.series:
            _add(axes, series, factor)
        _leave_room(axes, chart)
        if chart.along == "step":  # there are no halves of one
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if chart.along != "step":
            axes.set_xlim(left=0)
        elif limits is not None:
            axes.set_xlim(*limits)
        axes.set_xlabel(unit, loc="right")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        return _svg(figure, name, chart.title, chart.about)


def draw_lifeline(life: Lifeline, name: str) -> str:
    """When attempts were at work, one line each, the first on top."""
    from matplotlib import style

    # Whatever a person has in a matplotlibrc.
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure, axes = _figure(0.9 + 0.28 * len(life.bars))
        last = max(end for _, _, end, _ in life.bars)
        factor, unit = _unit_of(last)
        thinnest = 0.004 * max(last, 1e-3)
        for number, begin, end, how in life.bars:
            width = max(end - begin, thinnest) / factor
            colour = ENDS.get(how, ENDS["unknown"])[0]
            axes.barh(number, width, left=begin / factor, height=0.6, color=colour)
        for what, moments in life.marks.items():
            xs, ys = [at / factor for _, at in moments], [number for number, _ in moments]
            look: Any = {"markerfacecolor": PAPER, "markeredgecolor": INK, "linestyle": "none"}
            axes.plot(xs, ys, marker=HAPPENED[what], markersize=7, clip_on=False, **look)
        numbers = [number for number, *_ in life.bars]
        axes.set_yticks(numbers, [f"attempt {number}" for number in numbers])
        axes.set_ylim(max(numbers) + 0.6, min(numbers) - 0.6)
        axes.set_xlabel(unit, loc="right")
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        ends = ", ".join(f"attempt {number}: {how}" for number, _, _, how in life.bars)
        return _svg(figure, name, "Attempts, by time", ends)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """As many at most: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most // 2))
    kept = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="x", length=3, pad=7)  # "0" and "0.00" in the corner stay apart
    axes.tick_params(axis="y", length=3, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _add(axes: Axes, series: Series, factor: float) -> None:
    if series.shape == "pruned" and len(series.points) > MOST_PRUNED:
        return
    points = thinned(series.points)
    xs, ys = [x / factor for x, _ in points], [y for _, y in points]
    colour = PALETTE[series.colour % len(PALETTE)]
    if series.shape == "line":
        few: Any = {"marker": "o", "markersize": 3} if len(points) < 40 else {}
        axes.plot(xs, ys, color=colour, linewidth=1.8, **few)
    elif series.shape in ("dashed", "level"):
        axes.plot(xs, ys, color=colour, linewidth=1.6, linestyle=(0, (4, 2)))
    elif series.shape == "stairs":
        where: Any = "post" if series.begin is None else "pre"
        if series.begin is not None:
            xs, ys = [series.begin, *xs], [ys[0], *ys]
        axes.step(xs, ys, color=colour, linewidth=1.8, where=where)
        if len(points) < 40:
            axes.plot(
                [x / factor for x, _ in points],
                [y for _, y in points],
                color=colour,
                marker="o",
                markersize=3,
                linestyle="none",
            )
    elif series.shape == "rug":  # at the lower edge, each kind in a row of its own
        row = 0.02 + 0.045 * (series.colour - 1)
        place = axes.get_xaxis_transform()
        axes.plot(xs, [row] * len(xs), "|", color=colour, markersize=6, transform=place, zorder=4)
    else:
        colour = OF_MARK.get(series.shape, colour)
        style = MARKERS[series.shape]
        axes.plot(xs, ys, color=colour, linestyle="none", markeredgewidth=1.6, zorder=3, **style)


def _leave_room(axes: Axes, chart: Chart) -> None:
    """Above the highest point and below the lowest."""
    heights = [y for one in chart.series if one.shape != "rug" for _, y in one.points]
    low, high = min(heights), max(heights)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    if chart.from_zero:
        axes.set_ylim(0, (1.08 * high) or 1.0)
    else:
        axes.set_ylim(low - room, high + room)


def _unit(chart: Chart) -> tuple[float, str]:
    return _unit_of(max(x for series in chart.series for x, _ in series.points))


def _unit_of(longest: float) -> tuple[float, str]:
    for least, seconds, name in SECONDS:
        if longest >= least:
            return float(seconds), name
    return 1.0, "seconds"


def _svg(figure: Figure, name: str, title: str, about: str) -> str:
    """The element alone, with ids of its own and the page's colours and letters."""
    written = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r"#a[123]000\d", lambda found: VARIABLES[found.group()], text)
    said = (
        f'<title id="{name}-title">{escape(printable(title))}</title>'
        f'<desc id="{name}-about">{escape(printable(about))}</desc>'
    )
    labelled = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-about"'
    text = text.replace("<svg ", f"<svg {labelled} ", 1).strip()
    return re.sub(r"^<svg[^>]*>", lambda found: found.group() + said, text)

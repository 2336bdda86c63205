"""What a report shows, and that nothing a run says becomes a part of the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.goodput import Goodput
from keepstep.report.charts import charts_of
from keepstep.report.drawing import draw, thinned
from keepstep.report.facts import AttemptFacts, RunFacts, headline
from keepstep.report.lifeline import lifeline
from keepstep.report.page import page
from keepstep.report.tables import numbers_of
from keepstep.report.tree import Stretch, lineage
from tests.report.nights import HOSTILE, attempt, commit, event, hostile, night

VOID = ("meta", "link", "br")


class Read(HTMLParser):
    """Elements and texts of a page; raises, where they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def made(*runs: RunFacts) -> Read:
    return Read(page(runs, "2026-11-28 04:00 UTC", "0.2.0"))


@pytest.fixture(scope="module")
def read() -> Read:
    return made(night())


def test_what_a_person_reads_first() -> None:
    assert headline(night()) == (
        "finished at step 50; best at step 40 (eval_loss 2); 3 attempts, 2 kills; "
        "21.2 % of the time lost"
    )
    assert headline(RunFacts("new")) == "no attempt has begun"
    failed = RunFacts("f", stands="failed", attempts=(attempt(1, 0, 9, (0, 0), end="failed"),))
    assert headline(failed) == "failed; 1 attempt"


def test_the_page(read: Read) -> None:
    """Landmarks, headings, names of charts and tables; and no address is loaded."""
    assert read.of("html") == [{"lang": "en"}]
    for landmark in ("header", "main", "footer", "h1"):
        assert len(read.of(landmark)) == 1
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "aria-describedby"):
        assert {a[name] for _, a in read.elements if name in a} <= set(ids)
    charts = read.of("svg")
    assert len(charts) == 11
    assert all(chart["role"] == "img" for chart in charts)
    assert len(read.of("desc")) == len(charts)
    assert all(head["scope"] in ("col", "row") for head in read.of("th"))
    assert len(read.of("caption")) == len(read.of("table")) == len(read.of("thead"))
    assert all(a["tabindex"] == "0" for a in read.of("div") if a.get("class") == "scroll")
    loads = [a[n] for _, a in read.elements for n in ("src", "href", "xlink:href") if a.get(n)]
    assert all(address.startswith(("#", "data:")) for address in loads)
    assert not read.of("script")
    assert "@import" not in "".join(read.texts)
    assert not re.search(r"#a[123]000\d", "".join(read.texts) + str(read.elements))
    said = " ".join(read.texts)
    for text in ("step 40 to me/demo", "learning_rate", "goes back to checkpoint-30", "or so"):
        assert text in said


def test_time_is_all_accounted_for(read: Read) -> None:
    parts = [a["style"] for a in read.of("span") if str(a.get("style")).startswith("flex-grow")]
    assert sum(float(str(part).split(":")[1]) for part in parts) == pytest.approx(100)
    assert "100.0 %" in read.texts


def test_nothing_that_a_run_says_is_a_part_of_the_page() -> None:
    text = page([hostile()], "now", "0.2.0")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script" not in text
    read = Read(text)
    assert not read.of("script")
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert sum(shown in piece for piece in read.texts) > 10


@pytest.mark.parametrize(
    "run",
    [
        RunFacts("empty"),
        RunFacts("failed", stands="failed", reason="no such model", attempts=(AttemptFacts(1),)),
        night("attempts alone", history=(), events=(), fates={}, samples=()),
        night("a log line", history=({"step": 0, "loss": 1.0},), events=(), attempts=()),
        night("older", goodput=Goodput(10, unknown=10), history=(), events=(), attempts=()),
    ],
    ids=lambda run: run.name,
)
def test_only_what_the_run_has(run: RunFacts) -> None:
    read = made(run)
    assert run.history or "nothing to draw yet" in " ".join(read.texts)
    assert len(read.of("svg")) == bool(run.history) + bool(run.attempts and run.attempts[0].began)


def test_why_there_is_no_curve() -> None:
    """Of what was logged, and is not finite; of several runs with whose it is."""
    nan, rows = float("nan"), [{"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": 3.0}]
    bad = [{"step": 1, "loss": nan}, {"step": 2, "loss": float("inf")}, *rows]
    some = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": nan}, {"step": 3, "loss": 2.0}, *rows]
    read = made(night("bad", history=bad))
    why = "Training loss: no curve, since none of 2 logged values is finite."
    assert why in read.texts
    assert (
        "Training loss: 1 of 3 values are not finite, the first at step 2."
        in made(night("some", history=some)).texts
    )
    good = " ".join(made(night("good", history=rows)).texts)
    assert "no curve" not in good
    assert "not finite, the first" not in good
    assert f"bad: {why}" in " ".join(made(night("bad", history=bad), night("good")).texts)


def test_charts_of_one_run() -> None:
    charts = {chart.key: chart for chart in charts_of([night()])}
    shapes = {one.shape: one.points for one in charts["eval_loss"].series}
    assert shapes["best"] == [(40.0, 2.0)]
    assert shapes["published"] == [(40.0, 2.0)]
    assert shapes["pruned"] == [(10.0, 4.0)]
    assert shapes["kept"] == [(20.0, 3.0), (30.0, 2.5), (50.0, 2.2)]
    assert shapes["quarantined"] == [(40.0, 2.4)]
    assert "abandoned" not in shapes
    assert charts["eval_loss"].starts == [20.0, 30.0]
    assert {one.shape for one in charts["steps"].series} == {"stairs", "rug"}
    assert [y for _, y in charts["steps"].series[0].points] == [1.0, 1.0, 1.0]
    assert charts["tokens"].series[0].points == [(x, 100.0) for x in (25.0, 45.0, 50.0)]
    assert {one.shape for one in charts["disk"].series} == {"stairs", "level"}
    assert max(y for _, y in charts["disk"].series[0].points) == 10.0
    assert "eval_runtime" not in charts


def test_checkpoints_without_an_evaluation_are_marked_on_the_loss() -> None:
    bare = [{**e, "metrics": {}} if e["event"] == "commit" else e for e in night().events]
    history = [row for row in night().history if "loss" in row]
    (loss, *_) = charts_of([night(events=bare, history=history)])
    assert {"kept", "best", "published"} <= {one.shape for one in loss.series}


def test_several_runs_are_laid_over_each_other() -> None:
    charts = charts_of([night("a"), night("b")])
    loss = next(chart for chart in charts if chart.key == "loss")
    assert [(one.label, one.colour) for one in loss.series] == [
        ("a", 0),
        ("b", 1),
    ]
    best = [row for row in numbers_of(charts[3]).rows if row[1] == "best"]
    assert best == [["40", "best", "2"]] * 2
    read = made(night("a"), night("b"))
    assert "Side by side" in read.texts
    assert [a["href"] for a in read.of("a") if a["href"] not in ("#main",)] == ["#run1", "#run2"]


def test_attempts_in_time() -> None:
    life = lifeline(night())
    assert life is not None
    assert life.bars[1] == (2, 35.0, 65.0, "killed")
    assert life.marks == {
        "reshard": [(2, 40.0)],
        "set aside": [(3, 70.0)],
        "rewind": [(3, 75.0)],
        "push": [(3, 94.0)],
    }


def told(chain: list[Stretch]) -> list:
    return [
        (one.attempt, [save["step"] for save in one.saves], [told(b) for b in one.branches])
        for one in chain
    ]


def test_lineage() -> None:
    assert told(lineage(night())) == [
        (1, [10, 20], []),
        (2, [30], [[(2, [40], [])]]),
        (3, [40, 50], []),
    ]


def test_a_branch_from_the_beginning() -> None:
    events = [commit(1, 10, 1, None, 1.0), commit(2, 20, 2, 10, 1.0), commit(3, 5, 3, None, 1.0)]
    assert told(lineage(night(events=events))) == [
        (0, [], [[(1, [10], []), (2, [20], [])]]),
        (3, [5], []),
    ]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), max_size=12))
def test_every_save_has_one_place_in_the_tree(attempts: list[tuple[int, int]]) -> None:
    events, written = [], [0]
    for number, (choice, saves) in enumerate(attempts, start=1):
        start = written[choice % len(written)]
        for more in range(1, saves + 1):
            events.append(commit(number, start + more, number, start or None, 1.0))
            written.append(start + more)

    def places(chain: list[Stretch]) -> list[tuple[int, int]]:
        found = []
        for one in chain:
            found += [(save["attempt"], save["step"]) for save in one.saves]
            found += [place for branch in one.branches for place in places(branch)]
        return found

    found = places(lineage(RunFacts("x", events=events)))
    assert sorted(found) == sorted((e["attempt"], e["step"]) for e in events)


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(4, 50))
def test_no_spike_is_lost(values: list[float], most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    kept = thinned(points, most)
    assert len(kept) <= most
    assert kept == sorted(kept)
    if values:
        assert max(values) in [y for _, y in kept]
        assert min(values) in [y for _, y in kept]


def test_the_same_run_gives_the_same_bytes() -> None:
    chart = charts_of([night()])[0]
    assert draw(chart, "one") == draw(chart, "one")


def test_a_push_is_of_the_save_that_was_there() -> None:
    events = [commit(1, 10, 1, None, 1.0), event("publish", 2, 3, step=10, outcome="published")]
    assert night(events=[*events, commit(3, 10, 4, None, 1.0)]).published() == {(1, 10)}

"""Reports in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.report.page import page as page_of
from tests.helpers.browser import Page, browser
from tests.report.looks import look_at
from tests.report.nights import hostile, night, short

COLORS = """
[...document.querySelectorAll('a, svg *')].map(e => getComputedStyle(e)).map(s => s.color + s.fill)
"""
OUTSIDE = """
[...document.querySelectorAll('main *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_a_report_is_whole(shown: Page, tmp_path: Path) -> None:
    """At both widths and in both schemes; by keyboard; on paper. Two runs, one an attack."""
    report = tmp_path / "report.html"
    report.write_text(page_of([night(), hostile()], "2026-11-28 04:00 UTC", "0.2.0"))
    look_at(shown, report)
    report.write_text(page_of([short()], "2026-11-28 04:00 UTC", "0.2.0"))
    look_at(shown, report)
    reached = "[...document.querySelectorAll('.scroll')].map(e => [e.tabIndex, e.ariaLabel])"
    assert all(index == 0 and name for index, name in shown.ask(reached))
    headings = shown.ask("[...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName)")
    assert headings[0] == "H1"
    assert headings.count("H1") == 1
    shown.ask("document.querySelector('summary').click()")
    assert shown.ask("document.querySelector('details').open") is True
    assert shown.ask("document.querySelectorAll('script').length") == 0
    shown.prefer("dark", media="print")
    assert shown.ask("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert shown.ask("getComputedStyle(document.querySelector('details')).display") == "none"


def test_paper_is_light_and_cuts_nothing_off(shown: Page, tmp_path: Path) -> None:
    """Printed from a dark screen, on A4 and on a narrower sheet; names of any letters."""
    names = "größe-üñ", "مرحبا-שלום", "🚀" * 40, "a-long-name-" * 9
    report = tmp_path / "report.html"
    runs = [night(f"runs/{name}") for name in names]
    report.write_text(page_of(runs, "2026-11-28 04:00 UTC", "0.2.0"))
    for width in (794, 560):
        shown.open(report, width)
        shown.prefer("light", media="print")
        light = shown.ask(COLORS)
        shown.prefer("dark", media="print")
        assert shown.ask(COLORS) == light
        assert shown.ask(OUTSIDE) == []
    shown.prefer("light")


def test_what_overlaps_is_seen(shown: Page, tmp_path: Path) -> None:
    """The look itself: letters over each other, and a page that must be scrolled sideways."""
    report = tmp_path / "report.html"
    text = page_of([night(history=())], "2026-11-28 04:00 UTC", "0.2.0")
    for fault in (".legend li { margin-right: -60px }", "h3 { width: 1300px }"):
        report.write_text(text.replace("</style>", fault + "</style>"))
        with pytest.raises(AssertionError):
            look_at(shown, report)

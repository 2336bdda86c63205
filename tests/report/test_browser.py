"""Reports in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.report.page import page as page_of
from tests.helpers.browser import Page, browser
from tests.report.looks import look_at
from tests.report.nights import hostile, night, short


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


def test_what_overlaps_is_seen(shown: Page, tmp_path: Path) -> None:
    """The look itself: letters over each other, and a page that must be scrolled sideways."""
    report = tmp_path / "report.html"
    text = page_of([night(history=())], "2026-11-28 04:00 UTC", "0.2.0")
    for fault in (".legend li { margin-right: -60px }", "h3 { width: 1300px }"):
        report.write_text(text.replace("</style>", fault + "</style>"))
        with pytest.raises(AssertionError):
            look_at(shown, report)

"""What must be true of a report that a browser shows, at any width and in both schemes."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.browser import Page

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
# Pairs of rectangles that lie over each other: letters of a chart, its legend, boxes of the page.
OVERLAPS = """
(() => {
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const found = [];
  const compare = (elements) => {
    const boxes = elements.map(e => [e.textContent.trim().slice(0, 40), e.getBoundingClientRect()]);
    boxes.forEach(([name, box], i) => boxes.slice(i + 1).forEach(([other, second]) => {
      if (over(box, second)) found.push(name + ' / ' + other);
    }));
  };
  for (const svg of document.querySelectorAll('svg')) compare([...svg.querySelectorAll('text')]);
  for (const list of document.querySelectorAll('.legend')) compare([...list.children]);
  for (const grid of document.querySelectorAll('.charts')) compare([...grid.children]);
  compare([...document.querySelectorAll('header, section, footer')]);
  return found;
})()
"""
# Letters that are smaller than a person can read, and what sticks out of the page.
SMALL = """
[...document.querySelectorAll('svg text, p, li, td, th, summary')]
  .filter(e => e.getBoundingClientRect().height > 0 && e.textContent.trim()
    && e.getBoundingClientRect().height < 8).map(e => e.textContent)
"""
OUTSIDE = """
[...document.querySelectorAll('main *:not(.scroll *)')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""
CONTRAST = """
(() => {
  const light = (css) => css.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const paper = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  const ratio = (css) => (Math.max(light(css), paper) + .05) / (Math.min(light(css), paper) + .05);
  return Math.min(...[...document.querySelectorAll('section p, section a, td, th, section li')]
    .map(e => ratio(getComputedStyle(e).color)),
    ...[...document.querySelectorAll('svg text')].map(e => ratio(getComputedStyle(e).fill)));
})()
"""


def look_at(page: Page, report: Path, pictures: Path | None = None) -> None:
    """Raises AssertionError. A picture of each look is left in a folder."""
    for width in WIDTHS:
        page.open(report, width)
        for scheme in SCHEMES:
            page.prefer(scheme)
            if pictures is not None:
                page.picture(pictures / f"{report.stem}-{width}-{scheme}.png")
            assert page.complaints() == []
            assert page.loads() == [report.absolute().as_uri()]
            assert page.ask("document.documentElement.scrollWidth") == width
            assert page.ask(OVERLAPS) == []
            assert page.ask(SMALL) == []
            assert page.ask(OUTSIDE) == []
            assert page.ask(CONTRAST) >= 4.5  # WCAG 2, AA
            dark = page.ask("getComputedStyle(document.body).backgroundColor")
            assert (dark == "rgb(14, 17, 22)") == (scheme == "dark")

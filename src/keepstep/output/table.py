"""Tables within the width of a terminal: a line for each row, whatever the cells are. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len

from keepstep.output.printable import printable

MARK = "…"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: above it.
        justify: at which side its cells are.
        worth: where there is no room for all, those worth least are left out; None: never.
        least: how narrow its cells may become, in characters; None: they stay whole.
        elide: where a cell that is shortened lacks something.
    """

    title: str
    justify: Literal["left", "right"] = "left"
    worth: int | None = None
    least: int | None = None
    elide: Literal["end", "middle"] = "end"


class Table:
    """Rows of cells, which are data."""

    def __init__(self, *columns: Column, header: bool = True, gap: int = 2) -> None:
        self.columns = columns
        self.header, self.gap = header, gap
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str) -> None:
        """One row; as many cells as there are columns."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append([printable(cell).strip() for cell in cells])

    def fits(self, width: int) -> bool:
        """Whether all of it has room in so many columns of a terminal."""
        return self._together([max(map(cell_len, texts)) for texts in self._texts()]) <= width

    def lines(self, width: int | None = None) -> list[str]:
        """Its lines, that of the titles first; None: without an end at the right."""
        texts = self._texts()
        widths: dict[int, int] = {n: max(map(cell_len, told)) for n, told in enumerate(texts)}
        if width is not None:
            widths = self._within(widths, width)
        told = [
            [_filled(text, wide, self.columns[number]) for text in texts[number]]
            for number, wide in widths.items()
        ]
        lines = [(" " * self.gap).join(line).rstrip() for line in zip(*told, strict=True)]
        return lines if width is None else [elided(line, width) for line in lines]

    def _texts(self) -> list[list[str]]:
        titles = [
            [printable(c.title)] if self.header else [""] * (not self.rows) for c in self.columns
        ]
        return [[*title, *(row[n] for row in self.rows)] for n, title in enumerate(titles)]

    def _together(self, widths: list[int]) -> int:
        return sum(widths) + self.gap * (len(widths) - 1)

    def _within(self, natural: dict[int, int], width: int) -> dict[int, int]:
        """The columns that stay, and how wide they are."""
        widths = dict(natural)
        least = {n: min(wide, self.columns[n].least or wide) for n, wide in widths.items()}
        while self._together(list(least.values())) > width:
            worth = {n: w for n in least if (w := self.columns[n].worth) is not None}
            if not worth or len(least) == 1:
                least = dict.fromkeys(least, 1)  # narrower than it was made for
                break
            gone = min(worth, key=lambda n: (worth[n], -n))
            del widths[gone], least[gone]
        while self._together(list(widths.values())) > width:
            wider = [n for n in widths if widths[n] > least[n]]
            if not wider:
                break
            widest = max(wider, key=lambda n: widths[n])
            widths[widest] -= 1
        return widths


def elided(text: str, width: int, elide: Literal["end", "middle"] = "end") -> str:
    """The text in so many columns of a terminal, with a mark where something of it is left out."""
    if cell_len(text) <= width:
        return text
    room = max(0, width - cell_len(MARK))
    behind = room // 2 if elide == "middle" else 0
    return _begin(text, room - behind) + MARK + _end(text, behind)


def _begin(text: str, width: int) -> str:
    end = 0
    while end < len(text) and cell_len(text[: end + 1]) <= width:
        end += 1
    return text[:end]


def _end(text: str, width: int) -> str:
    start = len(text)
    while start and cell_len(text[start - 1 :]) <= width:
        start -= 1
    while start < len(text) and not cell_len(text[start]):  # an accent of what is left out
        start += 1
    return text[start:]


def _filled(text: str, width: int, column: Column) -> str:
    text = elided(text, width, column.elide)
    blanks = " " * (width - cell_len(text))
    return blanks + text if column.justify == "right" else text + blanks

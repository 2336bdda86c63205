"""The one way out to a terminal: whatever is shown is data, never markup or a control sequence.

Nothing else makes a console, a progress bar, or prints (a test sees to that).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from keepstep.output.fold import NARROWEST, folded
from keepstep.output.printable import printable
from keepstep.output.table import Table, elided

SHOWN_AFTER = 2.0  # seconds: what is done by then needs no bar
PLAIN = ("dumb", "unknown")  # as rich has it of TERM

if TYPE_CHECKING:  # few commands show a bar, and all would wait for what it is made of
    from rich.progress import Progress, ProgressColumn, TextColumn


def is_plain() -> bool:
    """Whether a person, or the terminal, wants no color, nothing bold: https://no-color.org."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "").lower() in PLAIN


class Terminal(Console):
    """A console that takes every text for data: in lines, cells, titles and bars alike.

    Attributes:
        folds: whether lines are folded at a terminal's width: a command's are. What a run says is
            kept as it is said, line by line.
    """

    def __init__(self, **options: Any) -> None:
        # In a notebook, too, lines are text: rich would make a block of HTML of each.
        options = {"force_jupyter": False} | options
        if "ipykernel" in sys.modules:  # it calls itself a terminal, and moves no cursor
            options = {"force_terminal": False} | options
        if is_plain():
            options = {"color_system": None} | options
        self._told: bool | None = options.get("force_terminal")
        self._asked = {n: options[n] for n in ("width", "force_terminal") if n in options}
        self.folds = False
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def is_terminal(self) -> bool:
        """FORCE_COLOR makes none of a file: bars and bold titles would be written there."""
        if self._told is not None:
            return self._told
        return super().is_terminal and self.file.isatty()

    @property
    def moves_cursor(self) -> bool:
        """Whether a bar can be drawn again at its place."""
        return self.is_terminal and not self.is_dumb_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        """Cells and titles come through here."""
        return super().render_str(printable(text), **options)

    @property
    def margin(self) -> int | None:
        """Where lines end; None: a file, or a pipe, has them as long as they are."""
        return max(NARROWEST, self.width) if self.folds and self.is_terminal else None

    def tell(self, text: str, hang: int | None = None) -> None:
        """One line, whatever is in the text; folded for people, `hang` says how."""
        line, margin = printable(text), self.margin
        self._show([line] if margin is None else folded(line, margin, hang))

    def tell_lines(self, text: str) -> None:
        """A text of several lines."""
        for line in text.split("\n"):
            self.tell(line)

    def tell_whole(self, text: str) -> None:
        """Lines that are to be copied, or to be seen as they are."""
        self._show(map(printable, text.split("\n")))

    def _show(self, lines: Iterable[str]) -> None:
        self.print(Text("\n".join(lines)), soft_wrap=True)

    def tell_named(self, name: str, text: str) -> None:
        """A line of a list: a name, and what it is, within the width. Without a name: a heading."""
        begin = f"  {name + ':':<14}" if name else ""
        self.tell(begin + text, hang=len(begin) or None)

    def table(self, table: Table) -> None:
        """One whose cells are data, too; on a terminal within its width."""
        lines = table.lines(self.width if self.is_terminal else None)
        text = Text("\n".join(lines))
        if table.header:
            text.stylize("bold", 0, len(lines[0]))
        self.print(text, soft_wrap=True)

    def table_that_fits(self, make: Callable[[bool], Table]) -> None:
        """The same; made `narrow` (True) where a terminal has not the width for all of it."""
        table = make(False)
        self.table(make(True) if self.is_terminal and not table.fits(self.width) else table)

    @contextlib.contextmanager
    def waiting(
        self, text: str, after: float = SHOWN_AFTER, redirect: bool = True
    ) -> Iterator[None]:
        """On a terminal a spinner, the text and the time, once something has gone on for a while;
        on stderr, as bars are: stdout may be for a program. `redirect`: what is printed meanwhile
        stands above it, and goes through rich."""
        from rich.progress import SpinnerColumn, TimeElapsedColumn

        columns = SpinnerColumn(), bar_text("{task.description}"), TimeElapsedColumn()
        with _late_bar(self, text, columns, 12, after, redirect):
            yield

    def beside(self) -> Terminal:
        """The same for stderr, where bars are drawn."""
        beside = Terminal(stderr=True, **self._asked)
        beside.folds = self.folds
        return beside

    def bar(
        self, *columns: ProgressColumn, transient: bool = False, redirect: bool = True
    ) -> Progress:
        """A progress bar; texts in its columns are `bar_text`."""
        from rich.progress import Progress

        # What is printed meanwhile stands above the bar, unless it goes somewhere else.
        shared = redirect and (not self.stderr or sys.stdout.isatty())
        return Progress(
            *columns,
            console=self,
            transient=transient,
            redirect_stdout=shared,
            redirect_stderr=redirect,
        )


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def complain(text: str) -> None:
    """Lines on stderr, from whichever process and thread: something is wrong."""
    print(_lines(text), file=sys.stderr, flush=True)


class _Warnings(logging.Handler):
    """The package's warnings, as logging shows them where nothing is set up: the text alone."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))


def warnings_as_lines() -> None:
    """Show the package's warnings as data, too."""
    logger = logging.getLogger("keepstep")
    logger.addHandler(_Warnings(logging.WARNING))
    logger.propagate = False


def show_as_data() -> None:
    """For a command: what a stream's encoding does not have is escaped, and a traceback is data."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = lambda *error: complain("".join(traceback.format_exception(*error)).rstrip())


def hand_out(text: str) -> None:
    """A whole file on stdout, for what reads it there; UTF-8, whatever the locale is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def bar_text(form: str) -> TextColumn:
    """A column of a bar: `form` is filled in with `task`."""
    from rich.progress import TextColumn

    return TextColumn(form, markup=False)


@contextlib.contextmanager
def progress_bar(
    terminal: Terminal, text: str, after: float = SHOWN_AFTER
) -> Iterator[Callable[[int, int | None], None]]:
    """On a terminal, once it has taken a while, a bar with rate and time left: on stderr, or on
    stdout if only that is one; elsewhere nothing. Yields (done, total) → None, in bytes."""
    from rich import progress

    columns = (
        *(bar_text("{task.description}"), progress.BarColumn(), progress.DownloadColumn()),
        *(progress.TransferSpeedColumn(), progress.TimeRemainingColumn()),
    )
    with _late_bar(terminal, text, columns, 46, after) as tell:
        yield tell


@contextlib.contextmanager
def _late_bar(
    terminal: Terminal,
    text: str,
    columns: tuple[ProgressColumn, ...],
    beside: int,
    after: float,
    redirect: bool = True,
) -> Iterator[Callable[[int, int | None], None]]:
    """`beside`: the width that the other columns take: a text that is longer than the rest would be
    folded, and the others with it."""
    # (launch/train.sh reads what its ranks have on stderr: their bars are on stdout.)
    shown = next((t for t in (terminal.beside(), terminal) if t.moves_cursor), None)
    if shown is None:
        yield lambda done, total: None
        return
    bar = shown.bar(*columns, transient=True, redirect=redirect)
    text = elided(printable(text), max(8, shown.width - beside), "middle")
    task = bar.add_task(text, total=None)
    timer = threading.Timer(after, bar.start)
    timer.daemon = True
    if after:
        timer.start()
    else:
        bar.start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        if after:
            timer.join()  # it may be about to show it
        bar.stop()

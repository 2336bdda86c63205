"""In a log: a line every half minute of what takes long, and none of what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from keepstep.output.progress import Phase, added_up, phases, progress_lines


def told(moments: list[float], total: int | None = 10_000_000_000) -> list[str]:
    """What is said of something that reads 100 MB a second, and is asked at these moments."""
    lines: list[str] = []
    clock = iter([1000.0, *(1000 + moment for moment in moments)])
    tell = progress_lines(lines.append, "verifying checkpoint-300", clock=lambda: next(clock))
    for moment in moments:
        tell(int(moment * 1e8), total)
    return lines


def test_a_line_every_half_minute() -> None:
    assert told([1, 29, 31, 40, 60, 62, 100]) == [
        "verifying checkpoint-300: 3.1 GB of 10 GB, 100 MB/s, 1 min 9 s left",
        "verifying checkpoint-300: 6.2 GB of 10 GB, 100 MB/s, 38 s left",
        "verifying checkpoint-300: 10 GB of 10 GB, 100 MB/s, 0 s left",
    ]


def test_what_is_soon_done_has_none() -> None:
    assert told([0, 10, 29.9]) == []


def test_a_total_that_is_not_known() -> None:
    assert told([30], None) == ["verifying checkpoint-300: 3 GB, 100 MB/s"]


def test_pieces_are_counted() -> None:
    far: list[tuple[int, int]] = []
    count = added_up(lambda *told: far.append(told), 10)
    for size in (4, 0, 6):
        count(size)
    assert far == [(4, 10), (4, 10), (10, 10)]


def test_one_bar_after_the_other() -> None:
    """Each phase has its own, a second time, too; a total that is not known is not told."""
    seen: list[object] = []

    @contextmanager
    def bar(text: str) -> Iterator[Callable[[int, int | None], None]]:
        seen.append(text)
        yield lambda done, total: seen.append((done, total))
        seen.append(f"end of {text}")

    shows: list[Any] = [nullcontext, lambda: bar("reading"), lambda: bar("sending")]
    with phases(shows) as tell:
        for phase in [
            (0, 0, 0),
            (1, 0, 0),
            (1, 5, 9),
            (7, 1, 1),
            (-1, 1, 1),
            (2, 1, 4),
            (0, 0, 0),
            (2, 2, 4),
        ]:
            tell(Phase(*phase))
    assert seen == [
        *("reading", (5, 9), "end of reading"),
        *("sending", (1, 4), "end of sending"),
        *("sending", (2, 4), "end of sending"),
    ]

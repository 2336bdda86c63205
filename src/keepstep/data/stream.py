"""A stream's rows, in their order, from where a run has come to; and where that is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch

from keepstep.data.common import LoaderError, is_stream

OVER = json.dumps("over")
# Steps of a stream that go on exactly where they were (datasets 5.2).
EXACT = frozenset(
    {
        *("ArrowExamplesIterable", "ExamplesIterable", "RebatchedArrowExamplesIterable"),
        *("SelectColumnsIterable", "MappedExamplesIterable", "FilteredExamplesIterable"),
        *("FormattedExamplesIterable", "VerticallyConcatenatedMultiSourcesExamplesIterable"),
        *("SkipExamplesIterable", "TakeExamplesIterable", "RepeatExamplesIterable"),
        *("ShuffledBlocks", "FilesInTurn", "SourcesInTurn"),  # ours
    }
)
LONGEST_STATE = 2**20  # characters of what a stream says of its place: it is kept in a manifest


class StreamError(LoaderError):
    """A row of a stream cannot be read, or cannot be prepared."""


@dataclass(frozen=True)
class Place:
    """Where a pass over a stream goes on.

    Attributes:
        done: steps of the pass that are over.
        drawn: rows of it that they had.
        state: what the stream says of itself there, as JSON (or that the pass is over); empty: it
            cannot tell, and to go on there all rows before are read again.
    """

    done: int = 0
    drawn: int = 0
    state: str = ""


BEGINNING = Place()


class StreamReader:
    """Reads one pass of a stream, in one process, whatever `torch` thinks that process is for.

    Attributes:
        place: behind the rows that were taken.
    """

    def __init__(self, rows: Any, number: int, place: Place) -> None:
        """
        Args:
            rows: a `datasets.IterableDataset`, or any other that can be iterated over.
            number: of the pass; files have another order in each.
            place: in it; nothing before it is read, if the stream could tell where it is.
        """
        self._rows, self._number = rows, number
        self.place = place
        _begin_pass(rows, number)
        over = place.state == OVER
        if is_stream(rows):
            known = bool(place.state) and not over
            rows.load_state_dict(json.loads(place.state) if known else None)
        self._iterator = iter(()) if over else _each(rows)
        if place.drawn and not place.state:
            self._next(place.drawn)

    def take(self, count: int) -> list[Any]:
        """The rows of the next step; fewer, or none, at the end of the pass.

        Raises:
            StreamError: one of them cannot be read.
        """
        taken = self._next(count)
        state = state_of(self._rows) if len(taken) == count else OVER
        self.place = Place(self.place.done + 1, self.place.drawn + len(taken), state)
        return taken

    def _next(self, count: int) -> list[Any]:
        taken: list[Any] = []
        try:
            taken.extend(islice(self._iterator, count))
        except Exception as error:  # pyarrow's, of a template, of a tokenizer, a disk's
            told = str(error).strip().split("\n")[0] or "no more is known"
            if isinstance(error, KeyError):
                told += ", a column that is not there, or null"
            raise StreamError(
                f"the stream cannot be read beyond row {self.place.drawn + len(taken):,} of pass "
                f"{self._number + 1}: {type(error).__name__}: {told}\n"
                "    Hint: mend that row where it is (as many rows as before), and run the same "
                "command again"
            ) from error
        return taken


def state_of(rows: Any) -> str:
    """What a stream says of its place, as JSON; empty: nothing that could be relied on, or too
    much. Ranks: any."""
    if not is_stream(rows) or not _steps_of(rows) <= EXACT:
        return ""
    try:
        text = json.dumps(rows.state_dict())
    except TypeError:  # some part of it keeps what JSON does not hold
        return ""
    return text if len(text) <= LONGEST_STATE else ""


def _steps_of(rows: datasets.IterableDataset) -> set[str]:
    """What a stream's rows go through, by the classes of datasets."""
    found, ahead = set(), [rows._ex_iterable]
    while ahead:
        step = ahead.pop()
        found.add(type(step).__name__)
        ahead += getattr(step, "ex_iterables", [])
        ahead += [step.ex_iterable] if hasattr(step, "ex_iterable") else []
    return found


def fits(rows: Any, state: str) -> bool:
    """Whether a place is one in this stream: it is made in the same steps. Ranks: any; the same
    everywhere."""
    try:
        return state == OVER or _alike(json.loads(state), json.loads(state_of(rows) or "null"))
    except ValueError:
        return False


def shards_of(rows: Any) -> int | None:
    """Of how many files (or parts of such) a stream is made; None: that is not known."""
    return rows.num_shards if is_stream(rows) else None


def _alike(then: Any, now: Any) -> bool:
    if then is None or now is None:  # what is not begun yet has no state
        return True
    if isinstance(then, dict) and isinstance(now, dict):
        return then.keys() == now.keys() and all(_alike(then[name], now[name]) for name in then)
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(map(_alike, then, now))
    return isinstance(then, str) == isinstance(now, str) and (
        not isinstance(then, str) or then == now  # the kinds of its steps
    )


def _begin_pass(rows: Any, number: int) -> None:
    """As Accelerate begins one."""
    if hasattr(rows, "set_epoch"):
        rows.set_epoch(number)
    elif isinstance(getattr(rows, "generator", None), torch.Generator):
        rows.generator.manual_seed(number)


def _each(rows: Any) -> Iterator[Any]:
    """Each row. By `iter`, `datasets` would give a loader's worker a part of the files alone."""
    if is_stream(rows):
        for batch in rows.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}
    else:
        yield from rows

"""What all of this room says and asks of rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import datasets

from keepstep.errors import KeepstepError
from keepstep.recipe.config import Problem

Rows: TypeAlias = Any  # datasets.Dataset, or IterableDataset when streamed
STREAM_SAMPLE = 100  # rows of a stream that are looked at, and that it is known by


def is_stream(rows: Rows) -> bool:
    return isinstance(rows, datasets.IterableDataset)


def problem(what: str, hint: str = "") -> Problem:
    return Problem(what, hint, "data")


class LoaderError(KeepstepError, RuntimeError):
    """A row cannot be had. From a loader's worker, too, it says what it said there: torch (2.13)
    raises it again with the worker's traceback in front."""

    def __init__(self, text: str, **facts: Any) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2], **facts)

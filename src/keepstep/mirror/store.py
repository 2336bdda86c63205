"""What a mirror asks of a store: one run's prefix, below which objects are put, listed, fetched and
deleted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from keepstep.errors import KeepstepError


class StoreError(KeepstepError, OSError):
    """A store cannot be reached, refuses, or does not give back what it was given.

    Attributes:
        fatal: it would be so again: no permission, no such bucket.
    """

    def __init__(self, *arguments: Any, fatal: bool, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self.fatal = fatal


@dataclass(frozen=True)
class Entry:
    """An object: its size in bytes, and what the store says of its content."""

    bytes: int
    tag: str


class Store(Protocol):
    """A run's objects. Each method raises a StoreError when the store has not done what it says.

    Attributes:
        url: where they are.
        conditional: it decides who of many creates an object, whatever a listing shows.
    """

    url: str
    conditional: bool

    def names(self, below: str = "") -> dict[str, Entry]:
        """All objects, or those of a folder, without what is put there in this moment."""
        ...

    def get(self, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write an object, in the place of one that is there, and see that it is what was given."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that is not there yet; False: it is, or others are at it."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Make an object of another, without its bytes leaving the store."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Objects that are not there are deleted already. Several go in no particular order."""
        ...

    def holds(self, entry: Entry | None, content: bytes) -> bool:
        """Whether what is listed is this content, as far as the store tells."""
        ...

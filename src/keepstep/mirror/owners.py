"""Who writes to a run's mirror, and what counts there: never what an owner adds that is none any
more.

An owner that is paused right before its manifest writes it when another machine has the run
already. So each owner notes what it found when it took over, before it does anything else; of
earlier owners that alone counts from then on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from keepstep.mirror.store import Store, StoreError
from keepstep.policy.mirror import (
    Copied,
    copied,
    found_name,
    found_of,
    newest_owner,
    owner_name,
    owners_that_found,
    read_found,
)
from keepstep.policy.strict import TextError


class DeposedError(StoreError):
    """Another machine has taken the run on this mirror: this one writes nothing more there."""


@dataclass(frozen=True)
class Owner:
    """Who writes to a run's mirror: the newest of those that said so there."""

    number: int
    token: str

    @property
    def name(self) -> str:
        return owner_name(self.number)


def claim(store: Store, token: str) -> Owner:
    """Become the newest owner: of several at once, one after the other.

    Raises:
        StoreError: of the store.
    """
    number = newest_owner(store.names("owners")) + 1
    while (owner := claim_as(store, token, number)) is None:
        number += 1  # a listing may lag: what it does not show is there all the same
    return owner


def claim_as(store: Store, token: str, number: int) -> Owner | None:
    """Become the owner of this number; None: somebody else is.

    Raises:
        StoreError: of the store.
    """
    if not store.create(owner_name(number), _text(token)):
        return None
    store.put(found_name(number), found_of(one.folder for one in there(store, store.names())))
    return Owner(number, token)


def check(store: Store, owner: Owner) -> None:
    """
    Raises:
        DeposedError: there is a newer owner.
    """
    names = store.names("owners")
    newest, own = newest_owner(names), names.get(owner.name)
    # Where the store decides nothing, a listing that lagged may have let two have one number.
    is_own = store.conditional or own is None or store.holds(own, _text(owner.token))
    if newest > owner.number or not is_own:
        told = f"{store.url}: the run belongs to another machine there (owner {newest})"
        raise DeposedError(told, fatal=True)


def _text(token: str) -> bytes:
    return f'{{"token": "{token}"}}\n'.encode()


def there(store: Store, names: Collection[str]) -> list[Copied]:
    """The checkpoints that count, by the names of all objects; the oldest step first.

    Raises:
        StoreError: of the store.
    """
    for number in owners_that_found(names):
        try:
            return copied(names, read_found(number, store.get(found_name(number))))
        except (TextError, FileNotFoundError):
            continue  # damaged: then by what the owner before it found
    return copied(names)

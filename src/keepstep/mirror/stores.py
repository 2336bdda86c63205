"""The kinds of stores, by their addresses."""

from __future__ import annotations

from keepstep.mirror.object_store import ObjectStore
from keepstep.mirror.store import Store, StoreError
from keepstep.policy.mirror import address_fault


def open_store(url: str, person_waits: bool = False) -> Store:
    """The store of an address.

    Args:
        url: the address.
        person_waits: a command asks: an object store that is away is given up soon.

    Raises:
        StoreError: the address is none, or of a kind that is not known.
    """
    fault = address_fault(url)
    if fault is not None:
        raise StoreError(fault, fatal=True)
    if url.startswith("hf:"):
        from keepstep.mirror.hub_store import HubStore  # not everybody waits for its libraries

        return HubStore(url)
    return ObjectStore(url, person_waits)

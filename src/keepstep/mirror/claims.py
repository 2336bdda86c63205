"""An object created by one of many, on a store that decides nothing: by a claim beside it.

Of two at once, who looks last sees the other's claim, or the object. So both cannot create it, in
whatever order they come, as long as a listing shows what was written before it; both may fail.
"""

from __future__ import annotations

import random
import secrets
import time
from pathlib import PurePosixPath

from keepstep.mirror.store import Store
from keepstep.policy.mirror import CLAIMS

PAUSE = 1.0  # seconds, at most: who has met others comes back at another moment than they


def create_by_claim(store: Store, name: str, content: bytes) -> bool:
    """Write an object that is not there yet; False: it is, or others are at it.

    Raises:
        StoreError: of the store.
    """
    folder = f"{CLAIMS}/{name}"
    own = f"{folder}/{secrets.token_hex(8)}"
    store.put(own, content)
    if any(claim != own for claim in store.names(folder)):
        store.delete([own])
        time.sleep(random.uniform(0, PAUSE))
        return False
    # In this order: who has created it takes the claim away when the object is there.
    parent = str(PurePosixPath(name).parent)
    if is_new := name not in store.names("" if parent == "." else parent):
        store.put(name, content)
    store.delete([own])
    return is_new or store.get(name) == content

"""A machine that wants a run: told where and when on stdin, it claims, copies a checkpoint, prunes.

    python -m tests.mirror.racer RUN STEP TOKEN

It can be told to stop itself (SIGSTOP) right before it writes an object.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from keepstep.mirror.owners import DeposedError, claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.retention import Policy
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.reader import RunFolder


def pausing(url: str, pause: str | None) -> Store:
    """A store that stands still before it writes the first object whose name matches."""
    store = open_store(url)
    write = store.put

    def put(name: str, content: bytes) -> None:
        nonlocal pause
        if pause is not None and re.search(pause, name):
            pause = None
            os.kill(os.getpid(), signal.SIGSTOP)
        write(name, content)

    store.put = put  # type: ignore[method-assign]
    return store


def race(url: str, pause: str | None, folder: Path, step: int, token: str) -> dict[str, object]:
    store, run = pausing(url, pause), RunFolder(folder)
    owner = claim(store, token)
    try:
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}")).run({})
        prune(store, owner, run, Policy(), ())
    except DeposedError:
        return {"number": owner.number, "deposed": True}
    return {"number": owner.number, "deposed": False}


def main() -> None:
    folder, step, token = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        while time.monotonic() < job["begin"]:
            pass  # all at once, to the microsecond
        print(json.dumps(race(job["url"], job["pause"], folder, step, token)), flush=True)


if __name__ == "__main__":
    main()

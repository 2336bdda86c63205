"""The process that talks to a mirror: reads a job on stdin, says on stdout what came of it.

    python -m keepstep.mirror.job        (started by mirroring.py, which ends it at its deadline)

Training never waits for it, whatever the store does.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepstep.mirror.download import history_of
from keepstep.mirror.evaluations import send_evaluations
from keepstep.mirror.owners import DeposedError, Owner, claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.mirrored import RETENTION, retention_text
from keepstep.policy.retention import Policy
from keepstep.run_folder.background import serve
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Copy a frozen checkpoint and the run's history; then remove what is not kept."""
    try:
        return _copied(job)
    except DeposedError as error:
        return {"error": str(error), "fatal": True, "deposed": True}


def _copied(job: dict[str, Any]) -> dict[str, Any]:
    store, run = open_store(job["url"]), RunFolder(job["run"])
    owner = Owner(**job["owner"]) if job["owner"] else claim(store, job["token"])
    frozen = Path(job["frozen"])
    node, nodes = job["node"], job["nodes"]
    upload = Upload(store, owner, read_checkpoint(frozen), job["rate"], node, nodes)
    history = {name: path.read_bytes() for name, path in history_of(run).items() if path.exists()}
    policy = Policy(**job["policy"])
    upload.run({**history, RETENTION: retention_text(policy, job["pinned"])})
    if node == 0:
        send_evaluations(store, run)
    if frozen.parent == run.mirroring:  # here, and not by the thread that trains: it takes a while
        Storage().remove(frozen)
    gone = prune(store, owner, run, policy, job["pinned"]) if node == 0 else []
    return {**asdict(upload.sent), "pruned": gone, "owner": asdict(owner)}


if __name__ == "__main__":
    sys.exit(serve(do))

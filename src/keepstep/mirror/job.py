"""The process that talks to a mirror: reads a job on stdin, says on stdout what came of it.

    python -m keepstep.mirror.job        (started by mirroring.py, which ends it at its deadline)

Training never waits for it, whatever the store does.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from keepstep.mirror.evaluations import send_evaluations
from keepstep.mirror.history import history_to_send
from keepstep.mirror.listing import look
from keepstep.mirror.owners import DeposedError, Owner, claim
from keepstep.mirror.pruning import prune
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.output.progress import Tell
from keepstep.policy.manifest import MANIFEST_NAME
from keepstep.policy.retention import Policy
from keepstep.run_folder.background import serve
from keepstep.run_folder.checkpoint import Checkpoint, read_checkpoint
from keepstep.run_folder.how_far import HowFar
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage

SENT = 1  # the phase in which bytes are sent; 0: any other
SEE_SECONDS = 15.0  # until a network file system shows what another machine has made


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Copy a frozen checkpoint and the run's history; then remove what is not kept. Or, without
    one, become the run's owner there."""
    try:
        if "frozen" not in job:
            return {"owner": asdict(claim(open_store(job["url"]), job["token"]))}
        return _copied(job)
    except DeposedError as error:
        return {"error": str(error), "fatal": True, "deposed": True}


def _copied(job: dict[str, Any]) -> dict[str, Any]:
    store, run = open_store(job["url"]), RunFolder(job["run"])
    owner = Owner(**job["owner"]) if job["owner"] else claim(store, job["token"])
    frozen = Path(job["frozen"])
    node, nodes = job["node"], job["nodes"]
    checkpoint = _read(frozen, run.path / frozen.name)
    if job["files"] is not None:  # it lies there for all machines
        files = {n: e for n, e in checkpoint.manifest.files.items() if n in set(job["files"])}
        checkpoint = replace(checkpoint, manifest=replace(checkpoint.manifest, files=files))
    far = HowFar.of(job)
    tell: Tell = lambda done, total: far.tell(SENT if done < total else 0, done, total)  # noqa: E731
    upload = Upload(store, owner, checkpoint, job["rate"], node, nodes, tell)
    policy = Policy(**job["policy"])
    upload.run(history_to_send(run, policy, job["pinned"]))
    if node == 0:
        send_evaluations(store, run)
    own = node == 0 or job["files"] is None  # else another machine has set it aside
    if frozen.parent == run.mirroring and own:
        Storage().remove(frozen)  # here, not by the thread that trains: it takes a while
    done = {**asdict(upload.sent), "pruned": [], "owner": asdict(owner)}
    if node > 0:
        return done
    listed = look(store)
    coming = _last(run, policy) if nodes > 1 else ()
    gone = prune(store, owner, run, policy, job["pinned"], listed, coming)
    left = {step: count for step, count in listed.objects().items() if step not in gone}
    return {**done, "pruned": gone, "objects": left}


def _last(run: RunFolder, policy: Policy) -> set[int]:
    """What every machine sends at the end, each as fast as it can: one may have sent its part of
    the second before the first one's copy is over, and does not send it again."""
    return {one.step for one in (run.latest(), run.best(policy)) if one is not None}


def _read(frozen: Path, in_place: Path) -> Checkpoint:
    """It; where another machine sets it aside, once this one sees that. (It has not, where that is
    done with, or where there are no second names.)"""
    end = time.monotonic() + SEE_SECONDS
    while not (frozen / MANIFEST_NAME).exists() and time.monotonic() < end:
        time.sleep(0.2)
    return read_checkpoint(frozen if (frozen / MANIFEST_NAME).exists() else in_place)


if __name__ == "__main__":
    sys.exit(serve(do))

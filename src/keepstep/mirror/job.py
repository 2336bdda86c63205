"""The process that talks to a mirror: reads a job on stdin, says on stdout what came of it.

    python -m keepstep.mirror.job        (started by mirroring.py, which ends it at its deadline)

Training never waits for it, whatever the store does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepstep.mirror.download import history_of
from keepstep.mirror.listing import prune
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.upload import DeposedError, Owner, Upload, claim
from keepstep.output.terminal import complain
from keepstep.policy.retention import Policy
from keepstep.ranks import signals
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage


def main() -> int:
    os.nice(10)  # training comes first
    for number in signals.SIGNALS:  # to all processes of a job: our parent decides
        signal.signal(number, signal.SIG_IGN)
    job = json.load(sys.stdin)
    # Our parent ends us at the deadline; if it is gone, we end ourselves, with or after it.
    signal.alarm(int(job["timeout"]) + 5)
    signals.die_with_parent(signal.SIGKILL)
    try:
        answer = do(job)
    except DeposedError as error:
        answer = {"error": str(error), "fatal": True, "deposed": True}
    except StoreError as error:
        answer = {"error": str(error), "fatal": error.fatal}
    except OSError as error:  # of our own disk
        answer = {"error": f"{type(error).__name__}: {error}", "fatal": False}
    except Exception as error:
        complain(traceback.format_exc())  # into the log
        answer = {"error": f"{type(error).__name__}: {error}", "fatal": True}
    print(json.dumps(answer), flush=True)
    return 1 if "error" in answer else 0


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Copy a frozen checkpoint and the run's history; then remove what is not kept."""
    store, run = Store(job["url"]), RunFolder(job["run"])
    owner = Owner(**job["owner"]) if job["owner"] else claim(store, job["token"])
    frozen = Path(job["frozen"])
    upload = Upload(store, owner, read_checkpoint(frozen), job["rate"])
    history = {name: path.read_bytes() for name, path in history_of(run).items() if path.exists()}
    upload.run(history)
    if frozen.parent == run.mirroring:  # here, and not by the thread that trains: it takes a while
        Storage().remove(frozen)
    gone = prune(store, owner, run, Policy(**job["policy"]), job["pinned"])
    return {**asdict(upload.sent), "pruned": gone, "owner": asdict(owner)}


if __name__ == "__main__":
    sys.exit(main())

"""The process that talks to the Hub: reads a job on stdin, says on stdout what came of it.

    python -m keepstep.publish.push        (started by process.py, which ends it at its deadline)

Training never waits for it, whatever the Hub does. The token is in its environment only; so it
opens no checkpoint, which may hold pickles: prepare.py does, without the token.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepstep.output.terminal import complain
from keepstep.publish import hub
from keepstep.publish.client import PushError, connect
from keepstep.publish.prepare import prepared
from keepstep.publish.remote import Target
from keepstep.ranks import signals
from keepstep.run_folder.contents import sizes_under


def main() -> int:
    for number in signals.SIGNALS:  # to all processes of a job: our parent decides
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    job = json.load(sys.stdin)
    # Our parent ends us at the deadline; if it is gone, we end ourselves, with or after it.
    signal.alarm(int(job["timeout"]) + 5)
    signals.die_with_parent(signal.SIGKILL)
    try:
        answer = do(job)
    except PushError as error:
        answer = {"error": str(error), "fatal": error.fatal}
    except OSError as error:  # of our own disk
        answer = {"error": f"{type(error).__name__}: {error}", "fatal": False}
    except Exception as error:
        complain(traceback.format_exc())  # into push.log
        answer = {"error": f"{type(error).__name__}: {error}", "fatal": True}
    print(json.dumps(answer), flush=True)
    return 1 if "error" in answer else 0


def do(job: dict[str, Any]) -> dict[str, Any]:
    """A check of the target, or a push of a frozen checkpoint."""
    target = Target(**job["target"])
    if "frozen" not in job:
        return hub.check(connect(), target, job["card"], job["base"], job["until"])
    frozen = Path(job["frozen"])
    folder = frozen.with_name(frozen.name.replace("checkpoint-", "export-"))
    best = prepared(job, folder)
    if job.get("dry_run"):
        files = sorted(sizes_under(folder))
        return {"outcome": "would publish", "step": best.global_step, "files": files}
    asked = bool(job.get("card"))
    return asdict(hub.push(connect(), target, folder, best, asked, until=job["until"]))


if __name__ == "__main__":
    sys.exit(main())

"""The process that talks to the Hub: reads a job on stdin, says on stdout what came of it.

    python -m keepstep.publish.push        (started by process.py, which ends it at its deadline)

Training never waits for it, whatever the Hub does. The token is in its environment only; so it
opens no checkpoint, which may hold pickles: prepare.py does, without the token.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepstep.hub.client import connect
from keepstep.hub.sending import Sending
from keepstep.publish import hub
from keepstep.publish.prepare import prepared
from keepstep.publish.process import ASKED, SENT
from keepstep.publish.remote import Target
from keepstep.run_folder.background import serve
from keepstep.run_folder.contents import sizes_under
from keepstep.run_folder.how_far import HowFar


def do(job: dict[str, Any]) -> dict[str, Any]:
    """A check of the target, or a push of a frozen checkpoint."""
    target = Target(**job["target"])
    if "frozen" not in job:
        return hub.check(connect(), target, job["card"], job["base"], job["until"])
    frozen = Path(job["frozen"])
    folder = frozen.with_name(frozen.name.replace("checkpoint-", "export-"))
    far = HowFar.of(job)
    best = prepared(job, folder, far)
    if job.get("dry_run"):
        files = sorted(sizes_under(folder))
        return {"outcome": "would publish", "step": best.global_step, "files": files}
    asked = bool(job.get("card"))
    far.tell(ASKED)
    sending = Sending(lambda done, total: far.tell(SENT if done < total else ASKED, done, total))
    return asdict(hub.push(connect(), target, folder, best, asked, job["until"], sending))


if __name__ == "__main__":
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    sys.exit(serve(do))

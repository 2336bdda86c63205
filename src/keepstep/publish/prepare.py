"""The process that reads a checkpoint for a push: it may have to unpickle, and knows no token.

    python -m keepstep.publish.prepare        (started by push.py)

Reads a job on stdin, makes the folder of allow-listed files, and says on stdout what is in it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keepstep.hub.client import HubError
from keepstep.output.environment import without_secrets
from keepstep.output.terminal import complain
from keepstep.policy.retention import Policy
from keepstep.publish.best import Best
from keepstep.publish.bundle import make_bundle
from keepstep.publish.process import READ
from keepstep.ranks import signals
from keepstep.run_folder.how_far import HowFar


def prepared(job: dict[str, Any], folder: Path, far: HowFar) -> Best:
    """Fill the new folder `folder` with what is pushed, in a process of its own, which tells `far`.

    Raises:
        HubError: it could not be done.
    """
    environment = {**without_secrets(os.environ), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "keepstep.publish.prepare"],
        env=environment,
        input=json.dumps({**job, "folder": str(folder)}).encode(),
        stdout=subprocess.PIPE,
        pass_fds=far.handed_on,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        raise HubError(f"preparing the files ended with status {done.returncode}", fatal=False)
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise HubError(answer["error"], answer["fatal"])
    return Best(**answer)


def main() -> int:
    for number in signals.SIGNALS:  # to all processes of a job: who started the push decides
        signal.signal(number, signal.SIG_IGN)
    signals.die_with_parent(signal.SIGKILL)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    job = json.load(sys.stdin)
    far = HowFar.of(job)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    try:
        answer = asdict(
            make_bundle(
                Path(job["frozen"]),
                Policy(**job["policy"]),
                job["target"]["repo_id"],
                Path(job["folder"]),
                job.get("card") or {},
                lambda done, total: far.tell(READ, done, total),
            )
        )
    except (OSError, ValueError) as error:  # of the disk; of what is stored, or asked for
        answer = {"error": str(error), "fatal": isinstance(error, ValueError)}
    except Exception as error:
        complain(traceback.format_exc())  # into push.log
        answer = {"error": f"{type(error).__name__}: {error}", "fatal": True}
    print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

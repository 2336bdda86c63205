"""Runs a command as a user of a Hub on the loopback, which is there as long as the command.

python -m tests.hub.serve FOLDER COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hub.client import Client
from tests.hub.peer import HubPeer


def main(folder: str, *command: str) -> int:
    """The command's exit status; `folder` is made, and holds all that came in."""
    place = Path(folder).resolve()
    place.mkdir(parents=True)
    with HubPeer(place / "hub") as peer:
        environment = Client(peer, place / "user", "xet").environment()
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

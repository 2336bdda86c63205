"""The real client in a process of its own, which it needs: it reads its settings when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

from tests.helpers.waiting import PATIENCE
from tests.hub.peer import WRITE_TOKEN, HubPeer

Mode = Literal["lfs", "xet"]
SETTINGS = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE", "HF_XET_CACHE", "HF_TOKEN")
PRELUDE = """
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

api = HfApi()

def attempt(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
        print("done")
    except HfHubHTTPError as error:
        print(error.response.status_code, type(error).__name__)
"""


class Client:
    """Runs scripts, in its folder, that find an `api`, the operations, and `attempt`."""

    def __init__(self, hub: HubPeer, folder: Path, mode: Mode) -> None:
        self.hub, self.folder, self.mode = hub, folder, mode
        folder.mkdir()

    def environment(self, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """What a process needs to find the Hub."""
        kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        settings = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        settings |= {"HF_TOKEN": token} if token else {}
        settings |= {"HF_HUB_DISABLE_XET": "1"} if self.mode == "lfs" else {}
        return kept | settings

    def start(self, script: str, token: str | None = WRITE_TOKEN) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script],
            cwd=self.folder,
            env=self.environment(token),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, script: str, token: str | None = WRITE_TOKEN, timeout: float = PATIENCE
    ) -> list[str]:
        """The lines that the script has printed; it must end without error."""
        process = self.start(script, token)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, output
        return output.splitlines()

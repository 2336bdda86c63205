"""`stopped.py`, which ends as a process does: W&B writes its last rows at exit, and forked ranks
have none. A SIGKILL comes before."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

try:
    runpy.run_path(str(Path(__file__).with_name("stopped.py")), run_name="__main__")
finally:
    if sys.modules["wandb"].run is not None:
        sys.modules["wandb"].finish()

"""Starts push.py, and ends it at its deadline. The token is in its environment, nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from keepstep.policy.retention import Policy
from keepstep.publish.remote import Target
from keepstep.run_folder.files import no_link

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # they are for the training


class Push:
    """One process that talks to the Hub.

    Attributes:
        step: of the checkpoint that it pushes; None: it looks only.
        deadline: on the monotonic clock.
    """

    def __init__(self, job: dict[str, Any], timeout: float, log: Path | None = None) -> None:
        self.step: int | None = job.get("step")
        self.deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._answer: dict[str, Any] | None = None
        environment = {**os.environ, **QUIET, **NO_GPU, "HF_TOKEN": get_token() or ""}
        with open(log or os.devnull, "ab", opener=no_link) as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "keepstep.publish.push"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the training
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            bounds = {"timeout": timeout, "until": self.deadline}  # one clock for all processes
            stdin.write(json.dumps(job | bounds).encode())

    def poll(self) -> dict[str, Any] | None:
        """What came of it; None while it is at work. `error`: why there is nothing."""
        if self._answer is None:
            late = time.monotonic() > self.deadline
            if self._process.poll() is None and not late:
                return None
            self._answer = self._collect(late)
        return self._answer

    def wait(self, stop: Callable[[], str | None] = lambda: None) -> dict[str, Any]:
        """The same, once it has ended, its time is over, or `stop` says why not to wait."""
        while (answer := self.poll()) is None:
            if (reason := stop()) is not None:
                self.stop()
                self._answer = answer = {"error": reason}
                return answer
            time.sleep(0.1)
        return answer

    def stop(self) -> None:
        """End it. What it sends is one commit: it is there whole, or not at all."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _collect(self, late: bool) -> dict[str, Any]:
        self.stop()
        assert self._process.stdout is not None
        lines = self._process.stdout.read().decode(errors="replace").splitlines()
        with contextlib.suppress(ValueError, IndexError):
            answer: dict[str, Any] = json.loads(lines[-1])
            return answer
        if late:
            told = f"the Hub did not answer to the end within {self._timeout:.0f} s"
            return {"error": told, "fatal": False}
        return {"error": f"the push ended with exit status {self._process.returncode}"}


def check(target: Target, card: dict[str, Any], base: str | None, timeout: float) -> dict[str, Any]:
    """Whether the target can be written to, and what is there (see hub.check); or `error`."""
    return Push({"target": asdict(target), "card": card, "base": base}, timeout).wait()


def push_of(
    frozen: Path, step: int, policy: Policy, target: Target, timeout: float, log: Path, **more: Any
) -> Push:
    """Begin to push a frozen checkpoint."""
    job = {"frozen": str(frozen), "step": step, "policy": asdict(policy)}
    return Push({**job, "target": asdict(target), **more}, timeout, log)

"""Starts push.py, and ends it at its deadline. The token is in its environment, nowhere else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from keepstep.policy.retention import Policy
from keepstep.publish.remote import Target
from keepstep.run_folder.background import BackgroundJob

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Push(BackgroundJob):
    """One process that talks to the Hub.

    Attributes:
        step: of the checkpoint that it pushes; None: it looks only.
    """

    def __init__(self, job: dict[str, Any], timeout: float, log: Path | None = None) -> None:
        self.step: int | None = job.get("step")
        environment = {**QUIET, "HF_TOKEN": get_token() or ""}
        told: Any = {"who": "the Hub", "what": "the push", "log": log, "environment": environment}
        super().__init__("keepstep.publish.push", job, timeout, **told)


def check(target: Target, card: dict[str, Any], base: str | None, timeout: float) -> dict[str, Any]:
    """Whether the target can be written to, and what is there (see hub.check); or `error`."""
    job = {"target": asdict(target), "card": card, "base": base, "waited_for": True}
    return Push(job, timeout).wait()


def push_of(
    frozen: Path, step: int, policy: Policy, target: Target, timeout: float, log: Path, **more: Any
) -> Push:
    """Begin to push a frozen checkpoint."""
    job = {"frozen": str(frozen), "step": step, "policy": asdict(policy)}
    return Push({**job, "target": asdict(target), **more}, timeout, log)

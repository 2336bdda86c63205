"""Starts push.py, and ends it at its deadline. The token is in its environment, nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from keepstep.hub import sending
from keepstep.output.progress import Shown
from keepstep.policy.retention import Policy
from keepstep.publish.remote import Target
from keepstep.run_folder.background import BackgroundJob

QUIET = {**sending.ENVIRONMENT, "HF_HUB_DISABLE_TELEMETRY": "1"}
READ, SENT, ASKED = 1, 2, 3  # phases of a push; 0: it begins


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


def shows_of(
    name: str,
    repo_id: str,
    progress: Callable[[str], Shown],
    waiting: Callable[[str], Shown],
) -> list[Callable[[], Shown]]:
    """What shows each phase of a push (see `phases`).

    Args:
        name: of the checkpoint.
        progress: a bar, or lines of a log, under a text.
        waiting: that something goes on of which nobody knows how far it is.
    """
    return [
        lambda: waiting(f"pushing {name} to {repo_id} …"),
        lambda: progress(f"reading {name}"),
        lambda: progress(f"sending {name} to {repo_id}"),
        lambda: waiting(f"waiting for {repo_id} …"),
    ]

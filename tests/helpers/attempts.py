"""Attempts of a run without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.folders import manifest

METRIC = Policy(3, "metric", "eval_loss")


class Launch:
    """One attempt of a run without a model: `save` commits as the manager does."""

    def __init__(
        self,
        run: Path,
        policy: Policy = METRIC,
        request: str = "auto",
        weights_only: bool = False,
        storage: Storage | None = None,
        owner: str | None = None,
    ) -> None:
        self.folder = RunFolder(run)
        self.writer = RunWriter(self.folder, policy, storage or Storage(), owner)
        self.writer.start()
        chosen, choice = self.writer.select(request, self.verify, 3, weights_only)
        self.choice = replace(choice, weights_only=weights_only and not choice.under_way)
        self.step = chosen.step if chosen and not self.choice.weights_only else 0
        self.parent = self.step or None
        self.writer.record_resume(request, weights_only, chosen, self.choice)
        if chosen is not None:
            self.writer.prune_after_verifying(chosen)
        self.writer.record("training")

    def verify(self, step: int) -> list[str]:
        return self.folder.faults(self.folder.checkpoint(step), deep=True)

    def save(self, step: int, loss: float | None = None, **changes: object) -> Manifest:
        staged = self.writer.stage(step)
        files = {}
        for rank in range(2):
            name = f"rank{rank}.pt"
            file = self.writer.storage.write(staged / name, f"{step} {rank}".encode())
            files[name] = FileEntry(rank, file.bytes, file.xxh3_128)
        metrics = {} if loss is None or not math.isfinite(loss) else {"eval_loss": loss}
        values = {"run_id": self.writer.run_id, "attempt": self.writer.attempt}
        made = manifest(step, metrics=metrics, files=files, parent=self.parent, **values, **changes)
        self.writer.commit(made)
        self.writer.point()
        self.writer.prune()
        self.writer.point()
        return made

    def steps(self) -> list[int]:
        return [c.step for c in self.folder.checkpoints()]

    def end(self, outcome: str, step: int) -> None:
        self.writer.end({"outcome": outcome, "global_step": step})

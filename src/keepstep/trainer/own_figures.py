"""What keepstep tells trackers of itself: stall, lag, disk, goodput, MFU, restarts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from keepstep.policy.auto_interval import length_of
from keepstep.policy.mfu import mfu, peak_of
from keepstep.ranks import start_up
from keepstep.run_folder.progress import goodput_of
from keepstep.run_folder.writer import Saved
from keepstep.trainer.protocol import CheckpointedTrainer

logger = logging.getLogger(__name__)


class OwnFigures:
    """Of one attempt. Ranks: the main process."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer
        self._before = (0.0, 0.0)  # seconds: productive, and all, of earlier attempts
        self._since = 0.0
        self._told_start = False
        self._parameters: tuple[int, int] | None = None
        self._peak: float | None = None

    def begin(self) -> None:
        trainer = self._trainer
        try:
            spent = goodput_of(trainer.manager.run)
            self._before = spent.productive / 1000, spent.wall / 1000
        except OSError as error:
            logger.warning("goodput is not known: %s", error)
            self._before = math.nan, math.nan
        self._since = start_up.now()
        if trainer.args.device.type == "cuda" and (trainer.args.bf16 or trainer.args.fp16):
            peak = peak_of(torch.cuda.get_device_name())
            self._peak = None if peak is None else peak * trainer.args.world_size
        self._parameters = None if self._peak is None else trainer.parameter_counts()

    def of_log(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """Beside a line with a loss."""
        trainer, found = self._trainer, {}
        bound = trainer.every_step.lost_work_bound()
        if bound is not None:
            found["lost_work_bound_seconds"] = bound
        if self._peak and self._parameters and "tokens_per_second" in logs:
            found["mfu"] = mfu(*self._parameters, logs["tokens_per_second"], self._peak)
        if not self._told_start:
            self._told_start = True
            spent = trainer.manager.time_sheet.told()
            kinds = ("startup", "restore", "reshard")
            found["attempt"] = trainer.manager.attempt
            found["restart_seconds"] = sum(spent.get(kind, 0.0) for kind in kinds)
            if trainer.resharded is not None:
                found["reshard_seconds"] = trainer.resharded.seconds
        return found

    def of_save(self, saved: Saved) -> dict[str, float]:
        """At the step of a checkpoint."""
        facts, made = saved.facts, self._trainer.manager.time_sheet.told().get("step", 0.0)
        found = {
            "save_stall_seconds": facts["stall"],
            "save_write_seconds": facts["write"],
            "save_lag_seconds": length_of(facts),
            "save_bytes": saved.checkpoint.manifest.total_bytes,
            "save_gb_per_second": facts["gb_per_s"],
        }
        if saved.free is not None:
            found["disk_free_bytes"] = saved.free
        productive, whole = self._before
        whole += start_up.now() - self._since
        if whole > 0:
            found["goodput"] = (productive + made) / whole
        return found

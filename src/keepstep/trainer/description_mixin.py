"""What a checkpoint's manifest says of the step that it was made at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from transformers import Trainer

from keepstep.policy.manifest import Manifest, finite_metrics

LIBRARIES = (
    *("keepstep", "torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets"),
)
VERSIONS = {name: version(name) for name in LIBRARIES}


class DescriptionMixin(Trainer):
    """Gathers what is told of a step. Overridden: `_prepare_for_training` (listens), `log`
    (listens, and tells callbacks how fast training is)."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._training_since = time.monotonic()
        return prepared

    def describe(self) -> Manifest:
        """What is known of this step before its files are written. Ranks: any."""
        step, metrics = self._evaluated
        return Manifest(
            run_id="",
            attempt=0,
            parent=None,
            global_step=self.state.global_step,
            epoch=round(self.state.epoch or 0.0, 6),
            samples=self.samples(),
            metrics=metrics if step == self.state.global_step else {},
            evaluation_due=self.evaluation_due_at == self.state.global_step != step,
            world_size=self.args.world_size,
            zero_stage=self.args.zero_stage,
            deepspeed=self.is_deepspeed_enabled,
            planned_steps=self.state.max_steps,
            settings=self.settings,
            health=self._health(),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            adapter=isinstance(self.model, PeftModel),
            versions=VERSIONS,
            saved_at="",
            save_seconds=0.0,
            about=self.about | self._counted(),
            dealt=self.dealt().as_json(),
        )

    def parameter_counts(self) -> tuple[int, int]:
        """How many elements the model has, and how many of them are trained. Ranks: any."""
        # Under ZeRO-3 a parameter is empty here, and `ds_numel` is its size.
        sizes = {p: getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()}
        return sum(sizes.values()), sum(n for p, n in sizes.items() if p.requires_grad)

    def _counted(self) -> dict[str, Any]:
        """Sizes, and what was spent so far, by all attempts together."""
        before = self.start.manifest.about if self.start else {}
        seconds = float(before.get("train_seconds", 0.0)) + time.monotonic() - self._training_since
        parameters, trained = self.parameter_counts()
        return {
            "parameters": parameters,
            "trained": trained,
            "tokens": self.tokens_seen(),
            "train_seconds": round(seconds, 1),
        }

    def tokens_seen(self) -> int:
        """By all attempts together; TRL counts them in a place of its own."""
        return int(getattr(self, "_total_train_tokens", self.state.num_input_tokens_seen))

    def _take_up_counts(self, about: Mapping[str, Any]) -> None:
        """Go on with what earlier attempts have counted."""
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = int(about.get("tokens") or 0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._logged |= {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        speeds = self._speeds() if "loss" in logs else {}
        logs |= speeds
        super().log(logs, *args, **kwargs)
        for name in speeds:  # callbacks hear of them; a run's history is the same every time
            self.state.log_history[-1].pop(name, None)

    def _speeds(self) -> dict[str, float]:
        if not self.is_in_train:
            return {}
        step, planned, rows = self.state.global_step, self.state.max_steps, self.args.batch.rows
        return self.every_step.speed.told(step, planned, self.tokens_seen(), rows)

    def _health(self) -> dict[str, Any]:
        """Whether the state is finite, and what was logged last."""
        return {**self.every_step.health.described(), **finite_metrics(self._logged)}

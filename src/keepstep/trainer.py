"""KeepstepTrainer: the one seam to the Trainer's private save path.

What is overridden, and why (transformers 5.17 to 5.23, trl 1.16):
- `_save_checkpoint`: Trainer writes straight into `checkpoint-N`, and rotates by age.
- `_save`: Trainer stores its arguments, absolute paths and Hub token included, every time.
- `_determine_best_metric`: given the metrics of each evaluation; an infinite one must not win.
"""

from __future__ import annotations

import json
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from . import distributed, preemption
from .checkpoint.manager import CheckpointManager, Saved, SaveError
from .checkpoint.manifest import Manifest, finite_metrics
from .checkpoint.writer import Part, PartEngine

logger = logging.getLogger(__name__)

LIBRARIES = (
    *("keepstep", "torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets"),
)


class KeepstepTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are committed by a `CheckpointManager`.

    Attributes:
        preempted: why training stopped before its end, None when it did not.
        last_saved: the newest commit of this attempt, None before the first.
    """

    def __init__(
        self,
        *args: Any,
        manager: CheckpointManager,
        settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.manager = manager
        self.settings = settings or {}
        self.preempted: str | None = None
        self.last_saved: Saved | None = None
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._logged: dict[str, float] = {}
        self._finite: Any = True
        self._part: Part | None = None
        self._engine_writer = PartEngine()
        # Retention is the manager's: with a limit of 1, Trainer deletes folders at the end.
        self.args.save_total_limit = None
        self.add_callback(_StopOnSignal(self))

    def planned_steps(self) -> int:
        """How many optimizer steps the whole run has. Ranks: all."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._evaluated = (self.state.global_step, finite_metrics(metrics))
        name = self.manager.policy.metric
        is_best = False
        if name not in metrics or math.isfinite(metrics[name]):
            is_best = bool(super()._determine_best_metric(metrics, trial))
        return is_best or self.preempted is not None  # save_strategy: best saves where this is true

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save this step, once. Ranks: all (collective)."""
        if self.saved_step() == self.state.global_step:
            return  # stopped in the middle of an epoch, Trainer comes here once more
        self.store_flos()
        self.state.best_model_checkpoint = None  # an absolute path: not for trainer_state.json
        try:
            self.last_saved = self.manager.save(self._describe(), self._write_part)
        except SaveError as error:
            if self.args.on_save_error == "stop":
                raise
            logger.error("%s\nTraining goes on without it.", error)
            self.last_saved = None
        if self.last_saved and self.last_saved.best and not self.preempted:
            self.state.best_model_checkpoint = str(self.last_saved.best.path)

    def saved_step(self) -> int | None:
        """The step of this attempt's newest commit; None before the first, or when one failed."""
        return self.last_saved.checkpoint.step if self.last_saved else None

    def _describe(self) -> Manifest:
        step, metrics = self._evaluated
        return Manifest(
            run_id="",
            attempt=0,
            parent=None,
            global_step=self.state.global_step,
            epoch=round(self.state.epoch or 0.0, 6),
            samples=self._samples_consumed(),
            metrics=metrics if step == self.state.global_step else {},
            world_size=self.args.world_size,
            zero_stage=self.args.zero_stage,
            planned_steps=self.state.max_steps,
            settings=self.settings,
            health=self._health(),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            adapter=isinstance(self.model, PeftModel),
            versions={name: version(name) for name in LIBRARIES},
            saved_at="",
            save_seconds=0.0,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._finite = loss.isfinite().all() & self._finite  # stays on the device: no wait
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._logged |= {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        super().log(logs, *args, **kwargs)

    def _health(self) -> dict[str, Any]:
        """Whether every loss of this attempt was finite here, and what was logged last."""
        finite = bool(self._finite) and all(map(math.isfinite, self._logged.values()))
        return {"finite": finite, **finite_metrics(self._logged)}

    def _samples_consumed(self) -> int:
        batch = self.args.rows_per_step
        try:
            rows = len(self.train_dataset)
        except TypeError:  # streamed: the length is not known
            return int(self.state.global_step * batch)
        epochs, steps = divmod(self.state.global_step, math.ceil(rows / batch))
        return int(epochs * rows + min(steps * batch, rows))

    def _write_part(self, part: Part) -> None:
        """Write this rank's share of the checkpoint. Ranks: all (collective)."""
        folder = str(part.folder)
        self._part = part
        try:
            self.save_model(folder, _internal_call=True)  # gathers, then _save below
        finally:
            self._part = None
        if not self.args.save_only_model:
            self._write_state(part)
        part.attempt(lambda: self._save_rng_state(folder))
        part.adopt(f"rng_state_{part.rank}.pth" if self.args.world_size > 1 else "rng_state.pth")
        if distributed.is_main():
            part.attempt(lambda: part.write("trainer_state.json", self._state_json()))

    def _write_state(self, part: Part) -> None:
        """Optimizer, scheduler and loss scaler. Ranks: all (collective)."""
        main = distributed.is_main()
        if self.is_deepspeed_enabled:
            self._write_engine(part)
        elif main:
            part.attempt(lambda: part.save("optimizer.pt", self.optimizer.state_dict()))
        if main:
            part.attempt(lambda: part.save("scheduler.pt", self.lr_scheduler.state_dict()))
        scaler = self.accelerator.scaler
        if main and scaler is not None:
            part.attempt(lambda: part.save("scaler.pt", scaler.state_dict()))

    def _write_engine(self, part: Part) -> None:
        """DeepSpeed's shards: every rank its own, and the module's from rank 0."""
        engine = self.model_wrapped
        stock, engine.checkpoint_engine = engine.checkpoint_engine, self._engine_writer
        copy_script, engine._copy_recovery_script = engine._copy_recovery_script, lambda path: None
        self._engine_writer.part = part
        tag = f"global_step{self.state.global_step}"
        try:
            engine.save_checkpoint(
                str(part.folder),
                tag=tag,
                save_latest=False,
                exclude_frozen_parameters=isinstance(self.model, PeftModel),
            )
        finally:
            self._engine_writer.part = None
            engine.checkpoint_engine = stock
            engine._copy_recovery_script = copy_script
        if distributed.is_main():
            part.write("latest", tag.encode())  # where DeepSpeed looks for the tag

    def _state_json(self) -> bytes:
        """trainer_state.json, as Trainer writes it: callbacks that have a state are in it."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks.get(name), list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state
        return json.dumps(vars(self.state), indent=2, sort_keys=True).encode() + b"\n"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights, configuration and tokenizer in Hugging Face layout; no training_args.bin."""
        if not self.args.should_save:
            return

        def write() -> None:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

        if self._part is None:
            write()
        else:
            self._part.attempt(write)


class _StopOnSignal(TrainerCallback):
    """Every step: has any rank been asked to stop? Then all save this step, and stop."""

    def __init__(self, trainer: KeepstepTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = preemption.requested()
        if state.global_step < state.max_steps and distributed.any_rank(asked is not None):
            heard = enumerate(distributed.gather(asked))
            self.trainer.preempted = ", ".join(f"{name} to rank {r}" for r, name in heard if name)
            control.should_save = control.should_training_stop = True

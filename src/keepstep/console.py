"""What a person sees of a run: one progress bar, a line per evaluation and per save. Main process."""

from __future__ import annotations

from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from . import distributed
from .checkpoint.runfolder import Committed
from .report import human_bytes
from .trainer import KeepstepTrainer

def show_library_bars(wanted: bool) -> None:
    """The progress bars of datasets and transformers: for a terminal, and the main process only."""
    if not wanted:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


class RunReporter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The progress bar and the lines above it; silent on other ranks than the main one."""

    def __init__(self, trainer: KeepstepTrainer, console: Console) -> None:
        self.trainer = trainer
        self.console = console
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.console.is_terminal or not distributed.is_main():
            return
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        text = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}"
        if self.progress:
            self.progress.update(self.task, description=text)
        else:
            self._line(state, text)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        name = self.trainer.manager.policy.metric or "eval_loss"
        if metrics and name in metrics:
            self._line(state, f"{name} {metrics[name]:.4f}{self._best_so_far(metrics[name])}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = self.trainer.last_saved
        if saved is None:
            return  # it failed, and the trainer has said so
        manifest = saved.checkpoint.manifest
        text = (
            f"saved {saved.checkpoint.path.name}: {human_bytes(manifest.total_bytes)} "
            f"in {manifest.save_seconds:.1f} s"
        )
        if saved.pruned:
            text += f", pruned {', '.join(map(str, saved.pruned))}"
        self._line(state, text + self._best_checkpoint(saved.best))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _best_so_far(self, value: float) -> str:
        """Compares with the evaluations before this one: Trainer updates its best afterwards."""
        best, greater = self.trainer.state.best_metric, self.trainer.args.greater_is_better
        if best is None or (value > best if greater else value < best):
            return "  (best so far)"
        return f"  (best so far {best:.4f} at step {self.trainer.state.best_global_step})"

    def _best_checkpoint(self, best: Committed | None) -> str:
        name = self.trainer.manager.policy.metric
        if best is None or name is None:
            return ""
        return f"; best {best.path.name} ({name} {best.manifest.metrics[name]:.4f})"

    def _line(self, state: Any, text: str) -> None:
        if distributed.is_main():
            step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            self.console.print(f"{step}  {text}", highlight=False, markup=False, soft_wrap=True)

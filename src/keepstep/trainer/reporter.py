"""What a person sees of a run: one progress bar, a line per evaluation and per save."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, Progress, TaskID
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from keepstep.output.printable import printable
from keepstep.output.terminal import bar_text
from keepstep.output.units import human_bytes, human_duration, parse_moment
from keepstep.policy.metric import value_of
from keepstep.policy.samples import Sample
from keepstep.ranks import collectives
from keepstep.ranks.console import console, say
from keepstep.ranks.start_up import own_start
from keepstep.run_folder.metrics import FIGURES
from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.writer import Saved
from keepstep.trainer.protocol import CheckpointedTrainer
from keepstep.trainer.resharded import Resharded

WAIT_WORTH_TELLING = 0.05  # seconds
ROOM_WORTH_TELLING = 3  # checkpoints
SAMPLES_SHOWN, SAMPLE_WIDTH = 5, 60  # lines of an evaluation; characters of a prompt, an answer
# Trackers of transformers (5.23) whose `on_log` takes a text for a text.
TAKES_TEXTS = ("TensorBoardCallback", "WandbCallback", "TrackioCallback")


def _speed(logs: Mapping[str, float]) -> str:
    """Tokens a second, or rows where tokens are not counted."""
    for name, unit in (("tokens_per_second", "tokens/s"), ("samples_per_second", "samples/s")):
        if name in logs:
            value = logs[name]
            return f"  {value:,.0f} {unit}" if value >= 10 else f"  {value:.2g} {unit}"
    return ""


def _of_steps(first: int, last: int) -> str:
    """Which steps a mean is of."""
    return f" (step {last})" if first >= last else f" (mean of steps {first} to {last})"


def _loss_before(history: Sequence[Mapping[str, Any]]) -> str:
    """What an earlier attempt logged last, where this one has not come to it. (A 0 is what the
    Trainer says of steps that were not finite.)"""
    for entry in reversed(history):
        if loss := entry.get("loss"):
            return f"{loss:.4f} (logged at step {entry['step']})" if math.isfinite(loss) else ""
    return ""


def _told(resharded: Resharded) -> str:
    return (
        f"resharded checkpoint-{resharded.step}: {resharded.before} → {resharded.now}, "
        f"{human_bytes(resharded.bytes)} in {resharded.seconds:.2f} s "
        f"({resharded.gb_per_s:.2f} GB/s)"
    )


def tell_samples(trainer: CheckpointedTrainer, samples: Sequence[Sample]) -> None:
    """Show completions: a line each of the first few, all of them to trackers that take texts.
    Ranks: all, each its own callbacks."""
    width = max(len(str(sample.number)) for sample in samples)
    for sample in samples[:SAMPLES_SHOWN]:
        mark = (
            "" if sample.reference is None else "  (matches)" if sample.matches else "  (differs)"
        )
        words = f"{_shortened(sample.prompt)} -> {_shortened(sample.completion)}{mark}"
        say(f"sample {sample.number:>{width}}  {words}")
    if len(samples) > SAMPLES_SHOWN:
        rest = len(samples) - SAMPLES_SHOWN
        say(f"{rest} more: {trainer.manager.run.samples_file}")
    texts = {f"eval_sample_{s.number}": f"{s.prompt}\n\n---\n\n{s.completion}" for s in samples}
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ in TAKES_TEXTS:
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=dict(texts))


def _shortened(text: str) -> str:
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= SAMPLE_WIDTH else f"{shown[: SAMPLE_WIDTH - 1]}…"


class RunReporter(TrainerCallback):
    """The progress bar and the lines above it; silent on other ranks than the main one."""

    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self.trainer = trainer
        self.progress: Progress | None = None
        self.told: Saved | None = None
        self.task = TaskID(0)
        self._text = ""  # of the log line before
        self._logged = 0, 0  # steps, and those whose loss was not finite
        self._last_loss = ""  # and of which steps
        self._evaluated = 0, 0.0  # batches, and since when

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.resharded is not None:
            say(_told(self.trainer.resharded))
        self._logged = state.global_step, 0
        if not console.moves_cursor or not collectives.is_main():
            return
        self.progress = console.bar(
            bar_text("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            bar_text("{task.description}"),
            transient=True,  # what it showed last is told in a line
        )
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "first_step" not in own_start.seconds:  # a later trainer of this process starts from it
            own_start.ended("first_step")
            self.trainer.manager.first_step(state.global_step, own_start.seconds)
        self._tell_saved(state)
        self._evaluated = 0, 0.0  # one that was broken off told no end
        self.trainer.manager.figures["planned_steps"] = state.max_steps
        if self.progress:
            left = self.trainer.every_step.speed.seconds_left(state.global_step, state.max_steps)
            told = "" if left is None else f"{human_duration(left)} left"
            text = "  ".join(part for part in (self._text, told) if part)
            self.progress.update(self.task, completed=state.global_step, description=text)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        before, loss = self._logged[0], self._loss(logs["loss"], state.global_step)
        self._last_loss = f"{loss}{_of_steps(before + 1, state.global_step)}"
        text = f"loss {loss}  lr {logs['learning_rate']:.2e}"
        self._show(logs)
        self._text = text + _speed(logs)
        left = f"  {human_duration(logs['seconds_left'])} left" if "seconds_left" in logs else ""
        if self.progress:
            self.progress.update(self.task, description=self._text + left)
        else:
            self._line(state, self._text + left)

    def _show(self, logs: Mapping[str, float]) -> None:
        """In the heartbeat and metrics.prom; what is not finite tells nothing there."""
        figures = self.trainer.manager.figures
        for name in FIGURES.keys() & logs.keys():
            figures.pop(name, None)
            if math.isfinite(logs[name]):
                figures[name] = float(logs[name])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._evaluated = 0, 0.0
        if self.progress:
            self.progress.update(self.task, description=self._text)
        name = self.trainer.manager.policy.metric or "eval_loss"
        if metrics and name in metrics:
            self._line(state, f"{name} {metrics[name]:.4f}{self._best_so_far(metrics[name])}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """The bar stands still meanwhile: it says how far the evaluation is."""
        if not self.progress:
            return
        done, began = self._evaluated
        began, done = began or time.monotonic(), done + 1
        self._evaluated = done, began
        text = f"evaluating: batch {done}"
        if has_length(eval_dataloader):
            of = len(eval_dataloader)
            text += f" of {of}"
            if done > 1:
                left = (time.monotonic() - began) / (done - 1) * max(0, of - done)
                text += f"  {human_duration(left)} left"
        self.progress.update(self.task, description=text)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_saved(state)

    def _tell_saved(self, state: Any) -> None:
        """A save that has arrived; one that failed, the trainer has spoken of."""
        saved = self.trainer.last_saved
        if saved is None or saved is self.told:
            return
        self.told = saved
        manifest, facts = saved.checkpoint.manifest, saved.facts
        self._show_saved(saved)
        text = f"saved {saved.checkpoint.path.name}: {human_bytes(manifest.total_bytes)} "
        text += f"in {facts['write']:.2f} s (training stopped for {facts['stall']:.2f} s"
        if facts["wait"] > WAIT_WORTH_TELLING:
            text += f", {facts['wait']:.2f} s of it for the save before"
        text += ")"
        if saved.pruned:
            text += f", pruned {', '.join(map(str, saved.pruned))}"
        self._line(state, text + self._best_checkpoint(saved.best))
        if saved.free is None:
            return
        room = (saved.free - self.trainer.args.min_free) // max(1, manifest.total_bytes)
        if room < ROOM_WORTH_TELLING:
            free = human_bytes(saved.free)
            say(f"warning: {free} are left on this disk: room for {max(0, room)} more checkpoints")

    def _show_saved(self, saved: Saved) -> None:
        figures, manifest = self.trainer.manager.figures, saved.checkpoint.manifest
        figures["checkpoint_step"] = manifest.global_step
        figures["checkpoint_bytes"] = manifest.total_bytes
        figures["checkpoint_timestamp_seconds"] = parse_moment(manifest.saved_at)
        figures["checkpoint_write_seconds"] = saved.facts["write"]
        figures["checkpoint_stall_seconds"] = saved.facts["stall"]
        if saved.best is not None:
            figures["best_step"] = saved.best.step
        if saved.free is not None:
            figures["disk_free_bytes"] = saved.free

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell_saved(state)
        self.close()
        last = self._last_loss or _loss_before(state.log_history)
        if last:
            self._line(state, f"last training loss {last}")

    def close(self) -> None:
        """No bar any more, however the training has ended."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _loss(self, logged: float, step: int) -> str:
        """The Trainer leaves steps out of its mean whose loss is not finite, and says 0 where all
        are left out (transformers 5.23)."""
        (before, bad_before), bad = self._logged, self.trainer.every_step.health.bad_losses()
        self._logged = step, bad
        steps, bad = step - before, bad - bad_before
        if not bad:
            return f"{logged:.4f}"
        return "nan" if bad >= steps else f"{logged:.4f} (not finite in {bad} of {steps} steps)"

    def _best_so_far(self, value: float) -> str:
        """Compares with the evaluations before this one: Trainer updates its best afterwards."""
        if not math.isfinite(value):
            return "  (not finite: it ranks nothing)"
        if not self.trainer.is_in_train:
            return ""
        best, greater = self.trainer.state.best_metric, self.trainer.args.greater_is_better
        if best is None or (value > best if greater else value < best):
            return "  (best so far)"
        return f"  (best so far {best:.4f} at step {self.trainer.state.best_global_step})"

    def _best_checkpoint(self, best: Checkpoint | None) -> str:
        name = self.trainer.manager.policy.metric
        if best is None or name is None:
            return ""
        return f"; best {best.path.name} ({name} {value_of(best.metrics, name):.4f})"

    def _line(self, state: Any, text: str) -> None:
        if not state.max_steps:  # an evaluation, before there is a run
            say(text)
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        say(f"{step}  {text}")

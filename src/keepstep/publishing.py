"""Publishing as a run does it: checked at its start, offered at every save, finished at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from . import distributed
from .checkpoint.manager import CheckpointManager
from .config import Problem, Recipe
from .console import say
from .outcome import EXIT_STATUS, Outcome
from .publish import process
from .publish.hub import Target
from .publish.publisher import Publisher
from .trainer import KeepstepTrainer

CHECK_SECONDS = 90.0


def target_of(recipe: Recipe) -> Target | None:
    """Where the recipe wants its best checkpoint; None: nowhere."""
    training = recipe.training
    if not training.push_to_hub:
        return None
    return Target(str(training.hub_model_id), private=training.hub_private_repo is not False)


def check(recipe: Recipe) -> list[Problem]:
    """Before anything is loaded: may we write there? Ranks: any; the main process alone asks."""
    target = target_of(recipe)
    if target is None or not distributed.is_main():
        return []
    answer = process.check(target, CHECK_SECONDS)
    if "error" not in answer:
        theirs = answer["theirs"]
        if theirs is not None:
            value = (
                "" if theirs["value"] is None else f" ({theirs['metric']} {theirs['value']:.4f})"
            )
            say(
                f"{target.repo_id} has step {theirs['global_step']}{value}; a better one goes there"
            )
        return []
    hint = "export HF_TOKEN=…; hub_model_id: owner/name"
    if answer.get("fatal") or recipe.training.hub_require:
        return [Problem(f"push_to_hub: {answer['error']}", hint)]
    say(f"The Hub cannot be reached now ({answer['error']}); it is tried again after a save.")
    return []


class Publishing(TrainerCallback):
    """A run's publishing. Nothing without a target, and on other ranks than the main one."""

    def __init__(self, recipe: Recipe, manager: CheckpointManager) -> None:
        self._trainer: KeepstepTrainer | None = None
        self._publisher: Publisher | None = None
        self._target, self._args, self._manager = target_of(recipe), recipe.training, manager
        recipe.training.push_to_hub = False  # Trainer would push what it finds, whatever is best

    def start(self, trainer: KeepstepTrainer) -> None:
        """Once the attempt has begun. Ranks: all."""
        self._trainer = trainer
        trainer.add_callback(self)
        if self._target is not None and distributed.is_main():
            self._publisher = Publisher(
                self._manager.run,
                self._manager.policy,
                self._target,
                self._manager.writer.record,
                pause=self._args.publish_min_seconds,
                timeout=self._args.publish_timeout_seconds,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._offer()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._offer()

    def _offer(self) -> None:
        saved = self._trainer.last_saved if self._trainer else None
        if self._publisher is not None and saved is not None:
            self._publisher.offer(saved.best)
            self._tell(self._publisher)

    def finish(self, outcome: Outcome) -> Outcome:
        """Publish what a finished run leaves, if that has not been done. Ranks: any."""
        publisher, best_step = self._publisher, outcome.best_step
        if publisher is None or outcome.outcome != "finished":
            self.close()
            return outcome
        best = None if best_step is None else self._manager.run.checkpoint(best_step)
        answer = publisher.finish(best) or {"error": "there is no best checkpoint"}
        self._tell(publisher)
        if "error" not in answer or not self._args.hub_require:
            return outcome
        reason = f"not published: {answer['error']}"
        return replace(outcome, reason=reason, exit=EXIT_STATUS["failed"])

    def close(self) -> None:
        """An attempt that has not finished publishes nothing more. Ranks: any."""
        if self._publisher is not None:
            self._publisher.abandon()

    def _tell(self, publisher: Publisher) -> None:
        news, publisher.news = publisher.news, None
        if news is not None:
            say(tell(news, publisher.target.repo_id, str(publisher.run.path)))


def tell(news: dict[str, Any], repo_id: str, run: str) -> str:
    """What came of a push, as a line for people."""
    if "error" in news:
        return (
            f"Not published: {news['error']}\n"
            f"    Hint: nothing is lost; `keepstep push {run}` finishes it"
        )
    if news["outcome"] == "refused":
        return f"Not published to {repo_id}: {news['reason']}"
    verb = "Published" if news["outcome"] == "published" else "Already published"
    return f"{verb}: {repo_id}, step {news['step']}, commit {news['commit'][:8]}"

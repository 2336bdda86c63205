"""Publishing as a run does it: checked at its start, offered at every save, finished at its end."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from . import distributed, preemption
from .checkpoint.manager import CheckpointManager
from .checkpoint.schedule import left
from .config import Problem, Recipe
from .console import say
from .outcome import EXIT_STATUS, Outcome
from .preflight import looks_local
from .publish.hub import Target
from .publish.process import check
from .publish.publisher import Publisher
from .trainer import KeepstepTrainer

CHECK_SECONDS = 90.0


def target_of(recipe: Recipe) -> Target | None:
    """Where the recipe wants its best checkpoint; None: nowhere."""
    training = recipe.training
    if not training.push_to_hub:
        return None
    return Target(str(training.hub_model_id), private=training.hub_private_repo is not False)


class Publishing(TrainerCallback):
    """A run's publishing. Nothing without a target, and on other ranks than the main one.

    Attributes:
        license: of the base model, if the Hub says; None before `check`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._args = recipe, recipe.training
        self._target = target_of(recipe) if distributed.is_main() else None
        self._trainer: KeepstepTrainer | None = None
        self._publisher: Publisher | None = None
        self.license: str | None = None
        recipe.training.push_to_hub = False  # Trainer would push what it finds, whatever is best

    def check(self) -> list[Problem]:
        """Before anything is loaded: may we write there? Ranks: any; the main process asks."""
        if self._target is None:
            return []
        name, base = self._target.repo_id, str(self._recipe.model.model_name_or_path)
        card = self._args.card_data
        answer = check(self._target, card, None if looks_local(base) else base, CHECK_SECONDS)
        if "error" in answer:
            if answer.get("fatal") or self._args.hub_require:
                return [Problem(f"push_to_hub: {answer['error']}", code="hub")]
            say(f"The Hub cannot be reached now ({answer['error']}); a save tries again.")
            return []
        self.license, theirs = answer["license"], answer["theirs"]
        if theirs is not None:
            value = theirs["value"]
            score = "" if value is None else f" ({theirs['metric']} {value:.4f})"
            say(
                f"{name} has step {theirs['global_step']}{score}; only a better one takes its place"
            )
        if answer["public"] and self._target.private:
            say(f"{name} can be read by everybody: it was made before, and is left as it is")
        return []

    def start(self, trainer: KeepstepTrainer) -> None:
        """Once the attempt has begun. Ranks: all."""
        self._trainer = trainer
        trainer.add_callback(self)
        if self._target is not None:
            self._publisher = Publisher(
                trainer.manager.run,
                trainer.manager.policy,
                self._target,
                trainer.manager.writer.record,
                trainer.manager.storage,
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

    def finish(self, outcome: Outcome, manager: CheckpointManager) -> Outcome:
        """Publish what a finished run leaves, if that has not been done. Ranks: any."""
        publisher, best = self._publisher, None
        if publisher is None or outcome.outcome != "finished":
            self.close()
            return outcome
        if outcome.best_step is not None:
            with contextlib.suppress(KeyError, OSError):  # pruned by hand this very moment
                best = manager.run.checkpoint(outcome.best_step)
        answer = publisher.finish(best, lambda: self._why_stop(manager))
        if publisher.news is None and "error" in answer:
            publisher.news = answer
        self._tell(publisher)
        if "error" not in answer or not self._args.hub_require:
            return outcome
        reason = f"not published: {answer['error']}"
        return replace(outcome, reason=reason, exit=EXIT_STATUS["failed"])

    def _why_stop(self, manager: CheckpointManager) -> str | None:
        """A scheduler that wants the machine back does not wait for the Hub."""
        manager.beat()
        lookout, asked = manager.lookout(), preemption.requested()
        if lookout.lost:
            return "the run belongs to a newer attempt"
        if "stop" in lookout.requests:
            lookout.take_up(["stop"])
            asked = "keepstep stop"
        if asked is not None:
            return f"stopped on request ({asked})"
        seconds = left(self._args.schedule(), preemption.steady(), time.time())
        if seconds < self._args.stop_margin_seconds:
            return "the job's time is over"
        return None

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

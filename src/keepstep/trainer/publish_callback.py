"""Publishing as a run does it: checked at its start, offered at every save, finished at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from huggingface_hub import get_token
from transformers import TrainerCallback

from keepstep.hub.client import offline
from keepstep.output.printable import first_few, quoted
from keepstep.output.progress import phases
from keepstep.policy.schedule import left
from keepstep.preflight.validate import severity_of_hub
from keepstep.publish.process import check, shows_of
from keepstep.publish.publisher import Publisher
from keepstep.publish.remote import Target
from keepstep.ranks import collectives, signals
from keepstep.ranks.console import progress, say, waiting
from keepstep.ranks.outcome import EXIT_STATUS, Outcome
from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.data_files import looks_local
from keepstep.save.manager import CheckpointManager
from keepstep.trainer.protocol import CheckpointedTrainer

CHECK_SECONDS = 90.0
HINT = "name another one, or leave push_to_hub out: `keepstep push RUN --force` can follow"


def target_of(recipe: Recipe) -> Target | None:
    """Where the recipe wants its best checkpoint; None: nowhere."""
    training = recipe.training
    if not training.push_to_hub:
        return None
    return Target(str(training.hub_model_id), training.hub_private_repo)


class Publishing(TrainerCallback):
    """A run's publishing. Nothing without a target, and on other ranks than the main one.

    Attributes:
        license: of the base model, if the Hub says; None before `check`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._args = recipe, recipe.training
        self._target = target_of(recipe) if collectives.is_main() else None
        self._trainer: CheckpointedTrainer | None = None
        self._publisher: Publisher | None = None
        self.license: str | None = None

    def check(self) -> list[Problem]:
        """Before anything is loaded: may we write there? Ranks: any; the main process asks.

        What may pass is told, and ends nothing: a save tries again, and whether the run has to have
        published (`hub_require`) is judged at its end.
        """
        if self._target is None or offline() or not get_token():  # of which preflight has spoken
            return []
        base, card = self._recipe.model.model_name_or_path, self._args.card_data
        unknown = base is None or looks_local(base)
        asked = None if unknown or card.get("license") else base
        answer = check(self._target, card, asked, CHECK_SECONDS)
        fault, name = answer.get("error"), self._target.repo_id
        if fault is not None and not answer.get("fatal"):
            text = f"push_to_hub: the Hub cannot be reached now ({fault})"
            return [Problem(text, "a save tries again", "hub", "warning")]
        hint = ""  # the error's own
        if fault is None:
            fault, hint = obstacle(answer, name, self._args.policy().metric), HINT
        if fault is not None:
            severity = severity_of_hub(self._recipe)
            if severity == "warning":
                push = f"keepstep push {quoted(str(self._args.output_dir))}"
                hint = f"the run goes on; `{push}` publishes it later"
            return [Problem(f"push_to_hub: {fault}", hint, "hub", severity)]
        self.license = answer["license"]
        lines = told_of({**answer, "asked": self._target.private}, name, str(base))
        return [Problem(line, code="hub", severity="warning") for line in lines]

    def start(self, trainer: CheckpointedTrainer) -> None:
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
        if best is not None and publisher.owes(best):
            say(waiting_for(best.step, publisher, self._args.publish_timeout_seconds))
        name = "" if best is None else best.path.name
        with phases(shows_of(name, publisher.target.repo_id, progress, waiting)) as far:
            answer = publisher.finish(best, lambda: self._why_stop(manager), far)
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
        lookout, asked = manager.lookout(), signals.requested()
        if lookout.lost:
            return "the run belongs to a newer attempt"
        if "stop" in lookout.requests:
            lookout.take_up(["stop"])
            asked = "keepstep stop"
        if asked is not None:
            return f"the wait for the Hub was ended on request ({asked})"
        seconds = left(self._args.schedule(), signals.steady(), time.time())
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
            f"    Hint: nothing is lost; `keepstep push {quoted(run)}` finishes it"
        )
    if news["outcome"] == "refused":
        return f"Not published to {repo_id}: {news['reason']}"
    verb = {"present": "Already published"}.get(news["outcome"], news["outcome"].capitalize())
    files = f" ({first_few(news['mended'])})" if news["mended"] else ""
    return f"{verb}: {repo_id}, step {news['step']}, commit {news['commit'][:8]}{files}"


def obstacle(answer: dict[str, Any], name: str, metric: str | None) -> str | None:
    """What is there, if nothing of this run could take its place (see hub.check)."""
    theirs = answer["theirs"]
    if answer["doubt"] is not None:
        return f"{name}: {answer['doubt']}"
    if theirs is not None and theirs["metric"] != metric:
        score = f"{theirs['metric']}, not by {metric}"
        return f"{name}: step {theirs['global_step']} is there, ranked by {score}"
    return None


def told_of(answer: dict[str, Any], name: str, base: str) -> Iterator[str]:
    """What a person should know of the repository, and of the base model's license."""
    theirs = answer["theirs"]
    if theirs is not None:
        value = theirs["value"]
        score = "" if value is None else f" ({theirs['metric']} {value:.4f})"
        yield f"{name} has step {theirs['global_step']}{score}; only a better one takes its place"
    if not answer["private"] and answer["asked"] is None:
        yield f"{name} can be read by everybody: it was made before, and is left as it is"
    if answer["private"] and answer["asked"] is False:
        yield f"{name} is private: it was made before, and is left as it is"
    if answer["license_fault"] is not None:
        yield (
            f"the license of {base} is not known ({answer['license_fault']}): the model card will "
            "name none, unless the recipe does (card: {license: …})"
        )


def waiting_for(step: int, publisher: Publisher, seconds: float) -> str:
    """What the end of a run waits for, and how to end that."""
    return (
        f"Training has finished; step {step} is on its way to {publisher.target.repo_id}, for "
        f"{seconds:.0f} s at most.\n    Ctrl-C ends this wait alone: the run stays finished, and "
        f"`keepstep push {quoted(publisher.run.path)}` publishes it later"
    )

"""The story of one attempt: parse, validate, choose the checkpoint, build, train, tell.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.train --config launch/recipes/demo.yaml [--any_field value]
"""

from __future__ import annotations

from keepstep.errors import KeepstepError
from keepstep.output import log_filters, streams
from keepstep.ranks import signals

if __name__ == "__main__":  # before the slow imports, which take seconds and write to the log
    signals.install_handlers()
    streams.protect()
    log_filters.silence()

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import EarlyStoppingCallback, PrinterCallback

from keepstep.data import dataset
from keepstep.output.terminal import complain, warnings_as_lines
from keepstep.policy.selection import Choice, NoProgressError, SelectionError, UnreadableError
from keepstep.preflight import inspection
from keepstep.preflight.model import check_model_of
from keepstep.preflight.probes import probe
from keepstep.preflight.saving import check_meeting
from keepstep.preflight.validate import validate
from keepstep.ranks import collectives
from keepstep.ranks.console import say, say_everywhere
from keepstep.ranks.outcome import (
    CONFIG_EXIT_STATUS,
    EXIT_STATUS,
    Outcome,
    ended,
    tell_shell_of_beginning,
)
from keepstep.ranks.watchdog import Watchdog
from keepstep.recipe import model
from keepstep.recipe.config import ConfigError, Problem, Recipe, refused_by_libraries
from keepstep.recipe.parse import parse_recipe
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.reader import Checkpoint
from keepstep.save.manager import CheckpointManager, DriftError, Resume
from keepstep.sharding.sources import ReshardError
from keepstep.trainer import about, publish_callback
from keepstep.trainer.reporter import RunReporter, farewell, introduce, show_library_bars
from keepstep.trainer.sft import KeepstepTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt; returns the exit status. Ranks: all."""
    streams.protect()
    log_filters.silence_prints()
    warnings_as_lines()
    show_library_bars()
    joined = threading.Event()
    signals.tell_at_once(lambda name: joined.is_set() or leave_unjoined(name))
    try:
        # This makes the process group, too.
        recipe = parse_recipe(sys.argv[1:] if argv is None else argv, validate=validate)
        joined.set()
        return attempt(recipe).exit
    except ConfigError as error:
        say(error.report())
        Outcome("failed", "configuration", exit=CONFIG_EXIT_STATUS).tell_shell()
        return CONFIG_EXIT_STATUS
    except Exception:
        complain(traceback.format_exc())
        return EXIT_STATUS["failed"]
    finally:
        collectives.leave()


def leave_unjoined(name: str) -> NoReturn:
    """End at once, asked to by a signal before the ranks have found each other: one that it ended
    before its handlers were installed will never come, and nothing has begun. Ranks: any."""
    reason = f"{name}, before the ranks had found each other"
    ended("preempted", reason=reason).tell_shell()
    os._exit(EXIT_STATUS["preempted"])


def attempt(recipe: Recipe) -> Outcome:
    """Train until the end, or until somebody asks for a stop. Ranks: all (collective)."""
    built = collectives.on_main("looking at the model", lambda: check_model_of(recipe))
    agree([*collectives.on_all("checking the recipe", lambda: validate(recipe)), *built])
    hub = publish_callback.Publishing(recipe)
    asked = collectives.on_all("asking the Hub", hub.check)
    agree([*asked, *probe(recipe)])
    training = recipe.training
    manager = CheckpointManager(
        str(training.output_dir),
        training.policy(),
        mode=training.save_mode,
        timeout=training.save_timeout_seconds,
        min_free=training.min_free,
    )
    watchdog = watch(recipe, manager)
    watchdog.start()
    try:
        early = stop_asked() is not None
        inputs, settings, problems = ({}, {}, []) if early else gather_inputs(recipe)
        agree(problems)
        begin(manager)
        checkpoint, choice = manager.choose(resume_of(recipe, settings))
        facts = collectives.on_main(
            "describing the run", lambda: about.describe(recipe, hub.license)
        )
        with refused_by_libraries():
            trainer = build_trainer(recipe, checkpoint, choice, manager, settings, inputs, facts)
        trainer.every_step.watchdog = watchdog
        stop_if_asked()
        hub.start(trainer)
        manager.begin_training()
        introduce(trainer, recipe, checkpoint, choice)
        outcome = carry_on(trainer)
    except StoppedError as stop:
        outcome = ended("preempted", reason=f"{stop}, before training began")
    except ConfigError as error:
        watchdog.stop(missed=True)
        manager.end(Outcome("failed", str(error), exit=CONFIG_EXIT_STATUS))
        raise
    except NoProgressError as error:
        outcome = ended("no_progress", reason=str(error))
    # Nothing is written any more; or nothing can be read, which a later launch may find otherwise.
    except (NotOwnerError, UnreadableError) as error:
        outcome = ended("failed", reason=str(error))
    except (SelectionError, DriftError, ReshardError) as error:
        watchdog.stop()
        manager.end(Outcome("failed", str(error), exit=CONFIG_EXIT_STATUS))
        raise ConfigError([Problem(str(error), code="resume")]) from error
    except Exception as error:
        reason = watchdog.explain(error)
        watchdog.stop()  # other ranks may wait for this one: they hear why
        hub.close()
        manager.end(ended("failed", reason=reason))
        raise
    watchdog.stop()
    outcome = hub.finish(outcome, manager)  # the main process alone: the others do not wait
    manager.end(outcome)
    farewell(manager, outcome)
    return outcome


class StoppedError(KeepstepError):
    """Somebody has asked for a stop before training has begun: there is nothing to save."""


def stop_asked() -> str | None:
    """The signals that ask for a stop, None when there are none. Ranks: all (collective)."""
    of_ranks = enumerate(collectives.gather(signals.requested()))
    return ", ".join(f"{name} to rank {rank}" for rank, name in of_ranks if name) or None


def stop_if_asked() -> None:
    """
    Ranks: all (collective).

    Raises:
        StoppedError: on every rank, when one of them has received a signal.
    """
    asked = stop_asked()
    if asked is not None:
        raise StoppedError(asked)


def begin(manager: CheckpointManager) -> None:
    """Begin the attempt, unless it has been asked to stop. Ranks: all (collective)."""
    tell_shell_of_beginning()
    manager.start()
    signals.tell_at_once(manager.stop_asked)
    stop_if_asked()


def watch(recipe: Recipe, manager: CheckpointManager) -> Watchdog:
    """What sees to it that no rank waits for ever for one that is dead. Ranks: any."""

    def give_up(reason: str) -> None:
        say_everywhere(f"keepstep: {reason}. This rank ends.")
        manager.end(ended("failed", reason=reason))

    training = recipe.training
    return Watchdog(training.peer_timeout_seconds, training.hang_timeout_seconds, give_up)


def gather_inputs(
    recipe: Recipe,
) -> tuple[dict[str, Any], dict[str, Any], Sequence[Problem]]:
    """Rows and tokenizer, and the settings that a resume compares. Ranks: all (collective).

    Problems are returned, not raised: they may be one rank's alone (a file that a node lacks).
    """
    inputs: dict[str, Any] = {}
    settings: dict[str, Any] = recipe.settings()
    problems: Sequence[Problem] = []
    try:
        rows = dataset.load_data(recipe.data, recipe.training)
        inputs = {"train_dataset": rows.training.rows, "eval_dataset": None}
        if rows.evaluation is not None:
            inputs["eval_dataset"] = rows.evaluation.rows
        inputs["processing_class"] = model.build_tokenizer(recipe.model, recipe.training)
        inputs["sources"] = {name: part.source for name, part in rows.parts.items()}
        settings["dataset"] = dataset.fingerprint(inputs["train_dataset"])
        settings["eval_dataset"] = dataset.fingerprint(inputs["eval_dataset"])
        settings["stream"] = dataset.stream_fingerprint(inputs["train_dataset"])
        settings["eval_stream"] = dataset.stream_fingerprint(inputs["eval_dataset"])
        problems = inspection.inspect(rows, inputs["processing_class"], recipe).problems
        settings |= model.tokenizer_settings(inputs["processing_class"], recipe.training)
        settings["base_model"] = model.fingerprint(recipe.model)
        settings["base_weights"] = model.weights_fingerprint(recipe.model)
    except ConfigError as error:
        problems = error.problems
    for name, values in transposed(collectives.gather(settings)).items():
        wrong = any(problem.severity == "error" for problem in problems)
        if not wrong and len(set(map(repr, values))) > 1:
            problems = [Problem(f"{name} differs between ranks: {values}", code="data")]
    return inputs, settings, problems


def transposed(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Name → every rank's value of it."""
    return {name: [row.get(name) for row in rows] for row in rows for name in row}


def resume_of(recipe: Recipe, settings: dict[str, Any]) -> Resume:
    """How the recipe wants to resume."""
    training = recipe.training
    return Resume(
        request=str(training.resume_from_checkpoint),
        settings=settings,
        allow_drift=training.allow_drift,
        verify=training.verify_on_resume,
        patience=training.max_attempts_without_progress,
        weights_only=training.resume_weights_only,
        batch=training.batch,
        allow_batch_change=training.allow_batch_change,
        parallel_layout=training.parallel_layout,
        rigid=training.rigid,
        recipe=recipe.fingerprint(),
    )


def build_trainer(
    recipe: Recipe,
    checkpoint: Checkpoint | None,
    choice: Choice,
    manager: CheckpointManager,
    settings: dict[str, Any],
    inputs: dict[str, Any],
    facts: dict[str, Any],
) -> KeepstepTrainer:
    """The trainer, with the model that it will train. Ranks: all (collective under ZeRO-3)."""
    training, asked = recipe.training, recipe.training.batch
    training.take(choice.batch or asked)
    whole_state = checkpoint is not None and not choice.weights_only
    if whole_state:
        training.eval_on_start = False  # this step has been evaluated
    with contextlib.ExitStack() as shown:
        weights = None
        if checkpoint is not None and choice.weights_only:
            weights = shown.enter_context(only_listed(checkpoint)).path
        trainer = KeepstepTrainer(
            args=training,
            manager=manager,
            settings=settings | {"rows_per_step": training.batch.rows},
            start=checkpoint if whole_state else None,
            asked=asked,
            about=facts,
            **inputs,
            **model.trainer_arguments(recipe.model, training, weights),
        )
    if manager.policy.limit is not None and min(training.save_steps, training.eval_steps or 1) < 1:
        # Shares of a number of steps that is known only now.
        apart = list(check_meeting(training, trainer.planned_steps()))
        if apart:
            raise ConfigError(apart)
    attention = {"attn_implementation": trainer.model.config._attn_implementation}
    trainer.settings |= attention
    if trainer.start is not None:
        manager.compare(trainer.start, attention, training.allow_drift)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunReporter(trainer))
    if training.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    return trainer


def carry_on(trainer: KeepstepTrainer) -> Outcome:
    """Train from its start to the end. Ranks: all (collective)."""
    start, planned, finish = trainer.start, trainer.planned_steps(), trainer.manager.finish
    plan = {"steps": planned, **trainer.may_stop_early()}
    finished = finish is not None and finish.holds(plan, trainer.saves_at(finish.step, planned))
    step = finish.step if finish and finished else start.step if start else 0
    if finished or (step >= planned and not trainer.owes_evaluation):
        of = f" of {planned}" if step <= planned else f", and {planned} are planned now"
        say(f"This run is finished, at step {step}{of}: there is nothing to train.")
    else:
        trainer.train()
        trainer.manager.confirm()
        step = trainer.state.global_step
    best = trainer.manager.best()
    facts: dict[str, Any] = {"global_step": step, "best_step": best.step if best else None}
    stopped, lost = trainer.preempted, trainer.manager.fault_of(trainer.last_saved)
    saved = trainer.saving.complete if stopped is None else trainer.saved_step() == step
    if lost is not None or not saved:
        reason = lost or trainer.saving.reason
        told = reason if stopped is None else f"stopped ({stopped}), and not saved: {reason}"
        return ended("failed", reason=told, **facts)
    if stopped is not None:
        return ended("preempted", reason=stopped, **facts)
    trainer.manager.record_finish(step, plan)
    return ended("finished", **facts)


def agree(problems: Sequence[Problem]) -> None:
    """Fail on every rank when one of them sees an error; tell warnings. Ranks: all (collective)."""
    seen = [problem for of_rank in collectives.gather(list(problems)) for problem in of_rank]
    told = list(dict.fromkeys(seen))  # once, however many ranks see it
    errors = [problem for problem in told if problem.severity == "error"]
    for warning in told:
        if warning not in errors:
            say(f"warning: {warning.told()}")
    if errors:
        raise ConfigError(errors)


if __name__ == "__main__":
    sys.exit(main())

"""The story of one attempt: parse, validate, choose the checkpoint, build, train, tell.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.train --config launch/recipes/demo.yaml [--any_field value]
"""

from __future__ import annotations

import gc

from keepstep.output import loading, log_filters, streams
from keepstep.ranks import signals

if __name__ == "__main__":  # before the slow imports, which take seconds and write to the log
    gc.disable()  # they make a million objects that stay: nothing is to be found among them
    signals.install_handlers()
    streams.protect()
    log_filters.silence()
    shown = loading.begin()

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from keepstep.data import dataset
from keepstep.output.terminal import complain, warnings_as_lines
from keepstep.policy.selection import NoProgressError, SelectionError, UnreadableError
from keepstep.preflight import inspection
from keepstep.preflight.agreement import agree, differing
from keepstep.preflight.model import check_model_of
from keepstep.preflight.validate import validate
from keepstep.ranks import collectives, control_group
from keepstep.ranks.console import say
from keepstep.ranks.outcome import CONFIG_EXIT_STATUS, EXIT_STATUS, Outcome, ended
from keepstep.ranks.start_up import own_start
from keepstep.recipe import model
from keepstep.recipe.config import ConfigError, Problem, Recipe, refused_by_libraries
from keepstep.recipe.parse import parse_recipe
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.save.resume_checks import DriftError
from keepstep.sharding.sources import ReshardError
from keepstep.trainer.attempt import CurrentAttempt
from keepstep.trainer.description_mixin import VERSIONS
from keepstep.trainer.health import SpoiltError
from keepstep.trainer.introduction import show_library_bars
from keepstep.trainer.sft import KeepstepTrainer
from keepstep.trainer.stops import StoppedError, stop_asked, stopped_rather_than_failed

if __name__ == "__main__":
    shown.close()
    gc.freeze()  # and neither later
    gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt; returns the exit status. Ranks: all."""
    own_start.ended("imports")
    streams.protect()
    log_filters.silence_prints()
    warnings_as_lines()
    show_library_bars()
    joined = threading.Event()
    signals.tell_at_once(lambda name: joined.is_set() or leave_unjoined(name))
    try:
        control_group.name_interface()
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
    if os.environ.get("RANK", "0") == "0":
        complain(f"Stopped on request ({name}) before the run began. Run the same command again.")
    reason = f"{name}, before the ranks had found each other"
    ended("preempted", reason=reason).tell_shell()
    os._exit(EXIT_STATUS["preempted"])


def attempt(recipe: Recipe) -> Outcome:
    """Train until the end, or until somebody asks for a stop. Ranks: all (collective)."""
    built = collectives.on_main("looking at the model", lambda: check_model_of(recipe))
    agree([*collectives.on_all("checking the recipe", lambda: validate(recipe)), *built])
    this = CurrentAttempt(recipe)
    this.check()
    try:
        with this:
            early = stop_asked() is not None
            own_start.ended("recipe")
            inputs, settings, problems = ({}, {}, []) if early else gather_inputs(recipe)
            agree(problems)
            own_start.ended("inputs")
            this.begin()
            this.choose(settings)
            own_start.ended("choice")
            with refused_by_libraries(), stopped_rather_than_failed(lambda: this.trained_to):
                trainer = build_trainer(this, inputs)
            with stopped_rather_than_failed(lambda: this.trained_to):
                trainer.train()
    # A stop before training, a run that has another owner, one that cannot be read now, or that has
    # nothing left to try, or that a step has spoilt: the attempt has told of it.
    except (StoppedError, NoProgressError, NotOwnerError, UnreadableError, SpoiltError):
        pass
    except (SelectionError, DriftError, ReshardError) as error:
        raise ConfigError([Problem(str(error), code="resume")]) from error
    assert this.outcome is not None  # at the end of the block
    return this.outcome


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
        inputs = {"train_dataset": rows.training.rows, "eval_dataset": rows.eval_dataset}
        inputs["processing_class"] = model.build_tokenizer(recipe.model, recipe.training)
        inputs["sources"] = {name: part.source for name, part in rows.parts.items()}
        inputs["renamed"] = {name: part.renamed for name, part in rows.parts.items()}
        settings["dataset"] = dataset.fingerprint(inputs["train_dataset"])
        settings["eval_dataset"] = dataset.fingerprints(inputs["eval_dataset"], dataset.fingerprint)
        settings["stream"] = dataset.stream_fingerprint(inputs["train_dataset"])
        settings["eval_stream"] = dataset.fingerprints(
            inputs["eval_dataset"], dataset.stream_fingerprint
        )
        problems = inspection.inspect(rows, inputs["processing_class"], recipe).problems
        settings |= model.tokenizer_settings(inputs["processing_class"], recipe.training)
        settings["base_model"] = model.fingerprint(recipe.model)
        settings["base_weights"] = model.weights_fingerprint(recipe.model)
    except ConfigError as error:
        problems = error.problems
    apart = differing(settings, VERSIONS)
    if not any(problem.severity == "error" for problem in problems):
        problems = [*problems, *apart]
    return inputs, settings, problems


def build_trainer(this: CurrentAttempt, inputs: dict[str, Any]) -> KeepstepTrainer:
    """The trainer, with the model that it will train. Ranks: all (collective under ZeRO-3)."""
    recipe, choice = this.recipe, this.choice
    with contextlib.ExitStack() as shown:
        weights = None
        if this.checkpoint is not None and choice is not None and choice.weights_only:
            weights = shown.enter_context(only_listed(this.checkpoint)).path
            this.weights_taken = True
        arguments = model.trainer_arguments(recipe.model, recipe.training, weights)
        return KeepstepTrainer(attempt=this, **inputs, **arguments)


if __name__ == "__main__":
    sys.exit(main())

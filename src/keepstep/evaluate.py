"""Evaluate checkpoints of a run afterwards: what `keepstep evaluate` launches, on any processes.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.evaluate runs/mine --config recipe.yaml [--any_field value]

The run folder is not claimed: a run that is at work goes on. What is measured is written beside the
manifest, checkpoint by checkpoint; killed, the same command goes on with those that lack it.
"""

from __future__ import annotations

from keepstep.output import loading, log_filters, streams
from keepstep.ranks import signals

if __name__ == "__main__":  # before the slow imports, which write to the log
    streams.protect()
    log_filters.silence()
    signals.install_handlers()
    shown = loading.begin()

import functools
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from transformers.trainer_utils import IntervalStrategy

from keepstep.errors import KeepstepError
from keepstep.output.terminal import complain, warnings_as_lines
from keepstep.policy.manifest import step_of
from keepstep.policy.metric import OTHERS, names_of
from keepstep.policy.standstill import Standstills
from keepstep.preflight.agreement import agree
from keepstep.preflight.comparable import digests, other_rows, other_settings, weights_only
from keepstep.preflight.validate import validate
from keepstep.ranks import collectives, control_group
from keepstep.ranks.console import say, say_everywhere
from keepstep.ranks.outcome import CONFIG_EXIT_STATUS, Outcome, ended, is_persons
from keepstep.ranks.watchdog import Watchdog
from keepstep.recipe.config import ConfigError, Problem, Recipe, refused_by_libraries
from keepstep.recipe.model import trainer_arguments
from keepstep.recipe.parse import parse_recipe
from keepstep.recipe.trajectory import word
from keepstep.run_folder.checkpoint import Checkpoint, DamagedError
from keepstep.run_folder.evaluations import add_evaluation
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.train import gather_inputs
from keepstep.trainer.afterwards import Evaluator
from keepstep.trainer.attempt import CurrentAttempt
from keepstep.trainer.introduction import show_library_bars

if __name__ == "__main__":
    shown.close()

# Nothing of a run but its rows and its model is asked for.
WITHOUT = ("--report_to", "none", "--push_to_hub", "false", "--load_best_model_at_end", "false")
NOT_ASKED = ("unknown-metric", "apart")  # what would rank; when a run saves


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names; returns the exit status. Ranks: all."""
    path, *rest = sys.argv[1:] if argv is None else argv
    streams.protect()
    log_filters.silence_prints()
    warnings_as_lines()
    show_library_bars()
    signals.tell_at_once(leave)
    watchdog = None
    try:
        control_group.name_interface()
        recipe = parse_recipe([*rest, *WITHOUT])  # this makes the process group, too
        watchdog = watch(recipe)
        evaluate(Path(path), _for_evaluation(recipe, Path(path), rest), watchdog)
        outcome = ended("finished")
    except ConfigError as error:
        say(error.report())
        outcome = Outcome("failed", "configuration", exit=CONFIG_EXIT_STATUS)
    except KeepstepError as error:
        say(f"keepstep: {error}")
        outcome = ended("failed", reason=str(error))
    except Exception as error:
        complain(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
        outcome = ended("failed", reason=watchdog.explain(error) if watchdog else reason)
    if watchdog is not None:
        watchdog.stop(missed=outcome.exit == CONFIG_EXIT_STATUS)
    collectives.leave()
    outcome.tell_shell()
    return outcome.exit


def leave(signal: str) -> NoReturn:
    """End at once, asked to by a signal: what was measured is written down. Ranks: any."""
    outcome = ended("failed", reason=signal)
    if is_persons(signal):  # else a launcher ends what is left: of the reason others have told
        outcome = ended("preempted", reason=signal)
        say(f"Stopped on request ({signal}). What was measured stands; the same command goes on.")
        outcome.tell_shell()
    os._exit(outcome.exit)


def watch(recipe: Recipe) -> Watchdog:
    """See that no rank waits for ever for another one. Ranks: all (collective)."""

    def give_up(reason: str) -> None:
        say_everywhere(f"keepstep: {reason}. This rank ends.")
        ended("failed", reason=reason).tell_shell()

    longest = recipe.training.hang_timeout_seconds
    watchdog = Watchdog(
        recipe.training.peer_timeout_seconds, Standstills(longest, longest), give_up
    )
    watchdog.start()
    return watchdog


def evaluate(path: Path, recipe: Recipe, watchdog: Watchdog) -> None:
    """Evaluate the checkpoint at `path`, or those of the run there that were not.

    Ranks: all (collective).

    Raises:
        ConfigError: on every rank: the recipe is wrong, or not the one of these checkpoints.
    """
    agree(collectives.on_all("checking the recipe", lambda: _problems(recipe)))
    inputs, settings, problems = gather_inputs(recipe)
    agree(problems)
    known = names_of(recipe.data.eval_datasets or ())
    names = [name for name, within in known.items() if within == "loss"]
    own = recipe.training.metrics is not None  # which metrics that gives is known only later
    there, wanted = collectives.on_main(
        "looking for checkpoints", lambda: _wanted(path, names, complete=own)
    )
    rows = digests(settings)
    compared = wanted or there
    agree(other_settings(wanted, settings, recipe))
    agree(collectives.on_main("comparing the rows", lambda: other_rows(there, compared, rows)))
    if not wanted:
        say(f"{path}: every checkpoint has {', '.join(names)} already: nothing is evaluated")
        return
    agree(weights_only(wanted, recipe))
    wanted, damaged = _intact(wanted)
    if wanted:
        arguments = trainer_arguments(recipe.model, recipe.training, None)
        with refused_by_libraries():
            evaluator = Evaluator(attempt=CurrentAttempt(recipe), **inputs, **arguments)
        evaluator.every_step.watchdog = watchdog
        named = step_of(path.resolve().name) is not None
        tell = functools.partial(_write_down, rows)
        evaluator.evaluate_all(wanted, tell, None if named else names)
    if damaged:
        raise KeepstepError(f"not evaluated: {'; '.join(damaged)}")


def _for_evaluation(recipe: Recipe, path: Path, flags: Sequence[str]) -> Recipe:
    """The recipe, with what the command line says of evaluation sets in the place of its own, and
    with the run folder of what is evaluated, whatever the recipe's is."""
    folder = path.resolve()
    is_run = step_of(folder.name) is None
    recipe.training.output_dir = str(path if is_run else folder.parent)
    given = {flag.partition("=")[0] for flag in flags}
    if "--eval_datasets" in given and "--eval_dataset_name" not in given:
        recipe.data.eval_dataset_name = None
    if "--eval_dataset_name" in given and "--eval_datasets" not in given:
        recipe.data.eval_datasets = None
    if word(recipe.training.eval_strategy) == "no":
        recipe.training.eval_strategy = IntervalStrategy.STEPS
    return recipe


def _problems(recipe: Recipe) -> list[Problem]:
    found = [problem for problem in validate(recipe) if problem.severity == "error"]
    return [problem for problem in found if problem.code not in NOT_ASKED]


def _wanted(
    path: Path, names: Sequence[str], complete: bool
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """All checkpoints of the run; and the one that is named, or those of all that lack any of these
    metrics (`complete`: all)."""
    if step_of(path.resolve().name) is not None:
        named = Checkpoint.at(path)
        beside = [c for c in RunFolder(named.path.parent).checkpoints() if c.path != named.path]
        return [*beside, named], [named]
    there = RunFolder(path).checkpoints()
    if not there:
        raise ConfigError([Problem(f"{path}: no committed checkpoint is there", code="run")])
    return there, [c for c in there if complete or not set(names) <= c.metrics.keys()]


def _intact(wanted: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Those that every rank finds intact, and what is wrong with the others, a sentence each.
    Ranks: all (collective)."""

    def look() -> dict[int, str]:
        found = {}
        for checkpoint in wanted:
            try:
                checkpoint.verify(None)
            except DamagedError as error:
                found[checkpoint.step] = str(error)
        return found

    of_ranks = collectives.gather(collectives.on_all("looking at the checkpoints", look))
    faults = {step: fault for of_rank in reversed(of_ranks) for step, fault in of_rank.items()}
    return [c for c in wanted if c.step not in faults], list(faults.values())


def _write_down(rows: Mapping[str, str], checkpoint: Checkpoint, metrics: dict[str, float]) -> None:
    """Beside the manifest; then the links follow. Ranks: all (collective)."""

    def write() -> bool:
        run, storage = RunFolder(checkpoint.path.parent), Storage()
        try:
            add_evaluation(storage, checkpoint.path, checkpoint.manifest, metrics, rows)
        except FileNotFoundError:
            return False
        if checkpoint.manifest.run_id == run.run_id():
            Keeper(run, run.policy(), storage).point()
        return True

    if not collectives.on_main("writing down the evaluation", write):
        say(f"{checkpoint.path.name}: the run has pruned it meanwhile")
        return
    passing = (*OTHERS, "perplexity", "model_preparation_time", "epoch")
    told = [f"{n} {v:.4f}" for n, v in metrics.items() if not n.endswith(passing)]
    say(f"{checkpoint.path.name}: {', '.join(told)}")


if __name__ == "__main__":
    sys.exit(main())

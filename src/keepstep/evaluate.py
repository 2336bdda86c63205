"""Evaluate checkpoints of a run afterwards: what `keepstep evaluate` launches, on any processes.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.evaluate runs/mine --config recipe.yaml [--any_field value]

The run folder is not claimed: a run that is at work goes on. What is measured is written beside the
manifest, checkpoint by checkpoint; killed, the same command goes on with those that lack it.
"""

from __future__ import annotations

from keepstep.output import log_filters, streams

if __name__ == "__main__":  # before the slow imports, which write to the log
    streams.protect()
    log_filters.silence()

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from keepstep.errors import KeepstepError
from keepstep.output.terminal import complain, warnings_as_lines
from keepstep.policy.drift import drift
from keepstep.policy.manifest import step_of
from keepstep.policy.metric import OTHERS, names_of
from keepstep.preflight.agreement import agree
from keepstep.preflight.validate import validate
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.ranks.outcome import CONFIG_EXIT_STATUS, Outcome, ended
from keepstep.recipe.config import ConfigError, Problem, Recipe, refused_by_libraries
from keepstep.recipe.model import trainer_arguments
from keepstep.recipe.parse import parse_recipe
from keepstep.recipe.trajectory import word
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import add_evaluation
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.save.resume_checks import ROWS
from keepstep.train import gather_inputs
from keepstep.trainer.afterwards import Evaluator
from keepstep.trainer.attempt import CurrentAttempt
from keepstep.trainer.reporter import show_library_bars

# Nothing of a run but its rows and its model is asked for.
WITHOUT = ("--report_to", "none", "--push_to_hub", "false", "--load_best_model_at_end", "false")
NOT_ASKED = ("unknown-metric", "apart")  # what would rank; when a run saves
EVALUATION = ("eval_dataset", "eval_stream")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate what the command line names; returns the exit status. Ranks: all."""
    path, *rest = sys.argv[1:] if argv is None else argv
    streams.protect()
    log_filters.silence_prints()
    warnings_as_lines()
    show_library_bars()
    try:
        recipe = parse_recipe([*rest, *WITHOUT])  # this makes the process group, too
        evaluate(Path(path), _for_evaluation(recipe, rest))
        outcome = ended("finished")
    except ConfigError as error:
        say(error.report())
        outcome = Outcome("failed", "configuration", exit=CONFIG_EXIT_STATUS)
    except KeepstepError as error:
        say(f"keepstep: {error}")
        outcome = ended("failed", reason=str(error))
    except Exception as error:
        complain(traceback.format_exc())
        outcome = ended("failed", reason=f"{type(error).__name__}: {error}")
    finally:
        collectives.leave()
    outcome.tell_shell()
    return outcome.exit


def evaluate(path: Path, recipe: Recipe) -> None:
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
    wanted = collectives.on_main(
        "looking for checkpoints", lambda: _wanted(path, names, complete=own)
    )
    if not wanted:
        say(f"{path}: every checkpoint has {', '.join(names)} already: nothing is evaluated")
        return
    agree([p for checkpoint in wanted for p in _other_run(checkpoint, settings, recipe)])
    collectives.on_all("looking at the checkpoints", lambda: _verify(wanted))
    arguments = trainer_arguments(recipe.model, recipe.training, None)
    with refused_by_libraries():
        evaluator = Evaluator(attempt=CurrentAttempt(recipe), **inputs, **arguments)
    named = step_of(path.resolve().name) is not None
    evaluator.evaluate_all(wanted, _write_down, None if named else names)


def _for_evaluation(recipe: Recipe, flags: Sequence[str]) -> Recipe:
    """The recipe, with what the command line says of evaluation sets in the place of its own."""
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


def _wanted(path: Path, names: Sequence[str], complete: bool) -> list[Checkpoint]:
    """The checkpoint that is named; of a run those that lack any of these metrics, or all."""
    if step_of(path.resolve().name) is not None:
        return [Checkpoint.at(path)]
    there = RunFolder(path).checkpoints()
    if not there:
        raise ConfigError([Problem(f"{path}: no committed checkpoint is there", code="run")])
    return [c for c in there if complete or not set(names) <= c.metrics.keys()]


def _verify(checkpoints: Sequence[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        checkpoint.verify(None)


def _other_run(
    checkpoint: Checkpoint, settings: Mapping[str, Any], recipe: Recipe
) -> list[Problem]:
    """What would make a value that cannot be ranked with the run's own."""
    stored = checkpoint.manifest.settings
    told, allowed = [], (*EVALUATION, ROWS, *recipe.training.allow_drift)
    changed = drift(stored, settings, allowed, checkpoint.manifest.planned_steps)
    if changed:
        what = f"settings are not those that {checkpoint.path.name} was made with: "
        hint = "set them back, or accept by name: --allow_drift …"
        told.append(Problem(what + "; ".join(changed), hint, "drift"))
    for name in EVALUATION:
        before, now = _sets(stored.get(name)), _sets(settings[name])
        own = {key for key in before.keys() & now.keys() if before[key] != now[key]}
        for key in sorted(own):
            told.append(
                Problem(
                    f"these are other rows than {checkpoint.path.name} was evaluated on"
                    + (f" ({key})" if key else ""),
                    'give them a name of their own: --eval_datasets \'{"other": "…"}\'',
                    "drift",
                )
            )
    return told


def _sets(stored: Any) -> dict[str, Any]:
    """Digests of rows, by the names of their sets; a single one has none."""
    if isinstance(stored, Mapping):
        return dict(stored)
    return {} if stored is None else {"": stored}


def _write_down(checkpoint: Checkpoint, metrics: dict[str, float]) -> None:
    """Beside the manifest; then the links follow. Ranks: all (collective)."""

    def write() -> None:
        run, storage = RunFolder(checkpoint.path.parent), Storage()
        add_evaluation(storage, checkpoint.path, checkpoint.manifest, metrics)
        if checkpoint.manifest.run_id == run.run_id():
            Keeper(run, run.policy(), storage).point()

    collectives.on_main("writing down the evaluation", write)
    passing = (*OTHERS, "perplexity", "model_preparation_time")
    told = [f"{n} {v:.4f}" for n, v in metrics.items() if not n.endswith(passing)]
    say(f"{checkpoint.path.name}: {', '.join(told)}")


if __name__ == "__main__":
    sys.exit(main())

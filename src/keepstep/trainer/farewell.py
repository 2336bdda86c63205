"""What a person reads at an attempt's end: how it ended, and what to do next."""

from __future__ import annotations

import os

from keepstep.output.printable import quoted
from keepstep.output.units import counted
from keepstep.policy.completeness import has_weights
from keepstep.policy.metric import value_of
from keepstep.ranks import collectives
from keepstep.ranks.console import say
from keepstep.ranks.outcome import STATUS_FILE, Outcome
from keepstep.run_folder.ownership import VARIABLE
from keepstep.run_folder.progress import goodput_of
from keepstep.run_folder.reader import Checkpoint
from keepstep.save.manager import CheckpointManager


def farewell(manager: CheckpointManager, outcome: Outcome) -> None:
    """How it ended, what the time went into, and what to do next. Ranks: any."""
    _tell_end(manager, outcome)
    if outcome.outcome in ("finished", "preempted", "failed") and collectives.is_main():
        spent = goodput_of(manager.run)
        if spent.is_known:
            say(f"Goodput:     {spent.told()}")


def _tell_end(manager: CheckpointManager, outcome: Outcome) -> None:
    folder, metric = manager.run.path, manager.policy.metric
    best = None if outcome.best_step is None else manager.run.checkpoint(outcome.best_step)
    if outcome.outcome == "no_progress":
        say(
            f"No progress: {outcome.reason}\nHint: find out what ends it. Then ask by name: "
            "--resume_from_checkpoint latest, a step, or never (from the beginning)."
        )
        return
    if outcome.outcome == "failed":
        where = "" if outcome.global_step is None else f" at step {outcome.global_step}"
        say(f"Failed{where}: {outcome.reason}")
        return
    if outcome.outcome == "rewound":
        # launch/train.sh, or a job, does so by itself.
        waits = STATUS_FILE not in os.environ and VARIABLE not in os.environ
        then = "\nRun the same command again to go on." if waits else ""
        say(f"Going back: {outcome.reason}{then}")
        return
    if outcome.outcome == "preempted":
        then = "" if VARIABLE in os.environ else " Run the same command again to go on."  # or a job
        step = outcome.global_step
        saved = "." if step is None else f" after step {step}; the state is saved."
        say(f"{_stopped(outcome.reason or '')}{saved}{then}")
        return
    say(f"Finished: {counted(outcome.global_step or 0, 'step')}{_but(outcome)}.")
    newest = manager.run.latest()
    if newest is not None and not newest.manifest.is_finite:
        say(f"warning: {newest.path.name} is not finite: it ranks nothing, and is not published")
    if best is not None and metric:
        say(f"Best:        {best.path} ({metric} {value_of(best.metrics, metric):.4f})")
    if best is not None and not has_weights(best.manifest):
        say(f"Use it:      keepstep export {quoted(f'{folder}/best')} --to DIR")
    elif best is not None:
        say(f"Use it:      {_loaded_by(best)}{f'{folder}/best'!r})")
    say(f"Checkpoints: keepstep ls {quoted(folder)}")


def _stopped(reason: str) -> str:
    """By whom, or for what: the time is nobody's request."""
    time = "the deadline"
    if not reason.startswith(time):
        return f"Stopped on request ({reason})"
    asked = f", and on request ({reason[len(time) + 2 :]})" if reason != time else ""
    return f"Stopped in time for the deadline (deadline, time_limit, or the job's end){asked}"


def _loaded_by(best: Checkpoint) -> str:
    """How transformers or peft load it, but for its place."""
    manifest = best.manifest
    if manifest.settings.get("processor"):  # peft 0.21 has no auto class for such a base
        auto = "AutoModelForImageTextToText.from_pretrained("
        return "PeftModel.from_pretrained(BASE, " if manifest.adapter else auto
    auto = "AutoPeftModelForCausalLM" if manifest.adapter else "AutoModelForCausalLM"
    return f"{auto}.from_pretrained("


def _but(outcome: Outcome) -> str:
    return f"; {outcome.reason}" if outcome.reason else ""

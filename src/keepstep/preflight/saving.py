"""What a recipe says about saving, evaluating and keeping: the mistakes that cost a night. Pure,
but for links in the way to a mirror's folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote, urlsplit

from keepstep.output.units import parse_bytes
from keepstep.policy.auto_interval import AUTO
from keepstep.policy.mirror import VARIABLE, address_fault
from keepstep.policy.schedule import left
from keepstep.ranks import signals
from keepstep.recipe.arguments import CheckpointArguments
from keepstep.recipe.config import KeepstepConfig, Problem
from keepstep.recipe.trajectory import word

OF_AUTO = ("max_save_overhead", "save_min_seconds")  # what only `save_interval_seconds: auto` reads


def check_saving(training: KeepstepConfig) -> Iterator[Problem]:
    """Every problem of the fields about checkpoints (see `check_numbers`, too). Ranks: any."""
    for check in (_sizes, _mirror, _ranking, _recovery_points, _weights_only, _auto, _times):
        yield from check(training)


def _sizes(training: KeepstepConfig) -> Iterator[Problem]:
    for name in ("keep_total_bytes", "min_free_bytes", "mirror_bytes_per_second"):
        try:
            parse_bytes(getattr(training, name) or 0)
        except ValueError as error:
            yield Problem(f"{name}: {error}", code="size")


def _mirror(training: KeepstepConfig) -> Iterator[Problem]:
    asked = training.mirror or os.environ.get(VARIABLE)
    fault = address_fault(asked) if asked else None
    if fault is not None:
        yield Problem(f"mirror: {fault}", code="mirror")
    elif asked:
        yield from _overlap(training)
    if not training.node_local:
        return
    if not asked:
        yield Problem(
            "node_local: each machine has a part of every checkpoint, and there is no mirror to "
            "put them together",
            "mirror: s3://bucket/prefix (docs/mirror.md)",
            "mirror",
        )


def _overlap(training: KeepstepConfig) -> Iterator[Problem]:
    """A folder that is the run's own, or around it: pruned and lost with what it copies."""
    url = urlsplit(training.mirror_url or "")
    if url.scheme != "file" or not training.output_dir:
        return
    run, mirror = (Path(p).expanduser().resolve() for p in (training.output_dir, unquote(url.path)))
    if run.is_relative_to(mirror) or mirror.is_relative_to(run):
        yield Problem(
            f"mirror: the run is copied to {mirror}, which is not apart from output_dir ({run})",
            "name a folder on another disk: one that is left when this one is gone",
            "mirror",
        )


def _ranking(training: KeepstepConfig) -> Iterator[Problem]:
    """Whether every checkpoint that is kept for its metric has one."""
    limit = training.save_total_limit
    if limit is None or limit < 1 or training.keep_ranking == "recency":
        return
    if training.eval_strategy == "no":
        yield Problem(
            f"save_total_limit: {limit} keeps the best checkpoints, and eval_strategy: no "
            "leaves nothing to rank them by",
            "set eval_strategy: steps, or ask for age: keep_ranking: recency",
            "no-evaluation",
        )
    elif training.ranking_metric is None:
        yield Problem(
            f"save_total_limit: {limit} keeps the best checkpoints, and "
            "metric_for_best_model is not set",
            "metric_for_best_model: eval_loss, or keep_ranking: recency",
            "no-metric",
        )
    elif limit == 1:
        yield Problem(
            "save_total_limit: 1 keeps the newest checkpoint only, so the best one is lost",
            "at least 2, or keep_ranking: recency",
            "best-is-lost",
        )
    elif training.save_strategy in ("steps", "epoch") and (
        training.save_strategy != training.eval_strategy
    ):
        yield Problem(
            f"save_strategy: {word(training.save_strategy)} and eval_strategy: "
            f"{word(training.eval_strategy)} do not meet, so some checkpoints would have no "
            "metric to rank by",
            "give both the same value, or ask for age: keep_ranking: recency",
            "apart",
        )
    else:
        yield from check_meeting(training, training.max_steps)


def check_meeting(training: KeepstepConfig, planned: int) -> Iterator[Problem]:
    """Whether every save is at a step that is evaluated.

    Args:
        planned: steps of the whole run, of which shares are taken; not above 0: not known yet.
    """
    save, evaluate = training.save_steps, training.eval_steps or training.save_steps
    by_steps = word(training.save_strategy) == word(training.eval_strategy) == "steps"
    if not by_steps or training.keep_ranking == "recency" or not (save > 0 and evaluate > 0):
        return
    if not _is_multiple(rounded(save, planned), rounded(evaluate, planned)):
        yield Problem(
            f"save_steps: {_steps(save, planned)} is no multiple of eval_steps: "
            f"{_steps(evaluate, planned)}, so some checkpoints would have no metric to rank by",
            "save at steps that are evaluated, or ask for age: keep_ranking: recency",
            "apart",
        )


def _steps(steps: float, planned: int) -> str:
    found = rounded(steps, planned)
    return f"{steps:g}" if found == steps else f"{steps:g} ({found:g} of {planned} steps)"


def rounded(steps: float, planned: int) -> float:
    """A share of the run in steps, as the Trainer rounds it (transformers 5.23)."""
    return math.ceil(planned * steps) if steps < 1 and planned > 0 else steps


def _recovery_points(training: KeepstepConfig) -> Iterator[Problem]:
    """Whether there is a checkpoint to carry on from before the run is over."""
    strategy, by_clock = word(training.save_strategy), training.save_interval_seconds
    if by_clock or training.time_limit:
        return
    if strategy == "no":
        yield Problem(
            "save_strategy: no: a run that is killed begins again",
            "save_strategy: steps",
            "no-recovery-point",
            "warning",
        )
    elif strategy == "epoch" and training.max_steps <= 0 and training.num_train_epochs <= 1:
        yield Problem(
            f"save_strategy: epoch with num_train_epochs: {training.num_train_epochs:g}: the first "
            "checkpoint is the last, and a run that is killed begins again",
            "save_strategy: steps",
            "no-recovery-point",
            "warning",
        )
    elif strategy == "steps" and 1 < training.max_steps <= rounded(
        training.save_steps, training.max_steps
    ):
        yield Problem(
            f"save_steps: {training.save_steps:g} is as long as the run (max_steps: "
            f"{training.max_steps}): there is no checkpoint inside of it",
            f"save_steps: {max(1, training.max_steps // 10)}",
            "no-recovery-point",
            "warning",
        )


def _weights_only(training: KeepstepConfig) -> Iterator[Problem]:
    if not training.save_only_model:
        return
    request = str(training.resume_from_checkpoint)
    if request == "auto":
        yield Problem(
            "save_only_model: checkpoints hold weights and no state: a run that is killed cannot "
            "be carried on",
            "leave it out, or say so: resume_from_checkpoint: never",
            "weights-only",
            "warning",
        )
    if training.deepspeed_plugin is not None and training.load_best_model_at_end:
        yield Problem(
            "save_only_model and load_best_model_at_end: DeepSpeed loads a checkpoint whole, or "
            "not at all",
            "leave one of them out",
            "zero",
        )


def _auto(training: KeepstepConfig) -> Iterator[Problem]:
    """`save_interval_seconds: auto`, and what belongs to it."""
    interval, unlimited = training.save_interval_seconds, training.save_total_limit is None
    if interval != AUTO:
        for field in fields(CheckpointArguments):
            value = getattr(training, field.name)
            if field.name in OF_AUTO and value != field.default:
                told = f"{field.name}: {value:g} has no effect without save_interval_seconds: auto"
                yield Problem(
                    told, "save_interval_seconds: auto, or leave it out", "auto", "warning"
                )
    elif unlimited and not training.keep_total_bytes:
        yield Problem(
            "save_interval_seconds: auto with save_total_limit: null keeps every checkpoint, and "
            f"may save every {training.save_min_seconds:g} s",
            "save_total_limit: 3, with keep_every_n_steps for those that are to stay",
            "auto",
            "warning",
        )


def _times(training: KeepstepConfig) -> Iterator[Problem]:
    if isinstance(training.save_interval_seconds, str) and training.save_interval_seconds != AUTO:
        told = f"{training.save_interval_seconds!r} is neither a number of seconds nor auto"
        yield Problem(f"save_interval_seconds: {told}", code="time")
        return
    try:
        seconds = left(training.schedule(), signals.steady(), time.time())
    except ValueError as error:
        yield Problem(f"time_limit or deadline: {error}", code="time")
        return
    if seconds <= training.stop_margin_seconds:
        yield Problem(
            "the deadline is over before a step can be made and saved (stop_margin_seconds: "
            f"{training.stop_margin_seconds:g})",
            "set a later deadline, or a longer time_limit",
            "time",
        )
    if not 0 < training.save_timeout_seconds < training.ddp_timeout:
        yield Problem(
            f"save_timeout_seconds: {training.save_timeout_seconds:g} is not between 0 and "
            f"ddp_timeout: {training.ddp_timeout}: ranks that wait for a slow save would be ended",
            "raise ddp_timeout with it",
            "time",
        )


def _is_multiple(steps: float, of: float) -> bool:
    """Steps, or shares of the run below 1, whose division is exact but for rounding."""
    return abs(steps / of - round(steps / of)) < 1e-9

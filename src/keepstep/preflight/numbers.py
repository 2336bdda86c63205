"""Numbers of a recipe that nothing can be made of: a batch of 0, a rate below 0. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from keepstep.recipe.config import Problem, Recipe
from keepstep.recipe.trajectory import word

AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("eval_accumulation_steps", "dataloader_prefetch_factor", "dataset_num_proc", "max_length"),
    *("ddp_timeout", "ddp_bucket_cap_mb", "pad_to_multiple_of", "early_stopping_patience"),
    *("save_total_limit", "keep_every_n_steps", "max_failed_saves", "mirror_total_limit"),
    "mirror_every",
    *("max_attempts_without_progress", "torch_empty_cache_steps", "sample_max_new_tokens"),
)
ABOVE_ZERO = (
    *("save_interval_seconds", "peer_timeout_seconds", "hang_timeout_seconds"),
    *("hang_min_seconds", "publish_timeout_seconds", "mirror_timeout_seconds"),
)
NOT_BELOW_ZERO = (
    *("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"),
    *("eval_delay", "dataloader_num_workers", "neftune_noise_alpha", "router_aux_loss_coef"),
    *("stop_margin_seconds", "publish_min_seconds", "max_lost_minutes", "last_save_retry_seconds"),
    *("save_min_seconds", "mirror_min_seconds", "sample_temperature"),
    *("seed", "data_seed"),
)
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")  # from 0 to below 1
SEEDS = 2**32  # numpy takes no more
OF_ADAPTERS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "use_rslora", "use_dora"),
)


def check_numbers(recipe: Recipe) -> Iterator[Problem]:
    """Every number that is out of its range. Ranks: any."""
    training = recipe.training
    for names, low, told in (
        (AT_LEAST_ONE, 1, "is not above 0"),
        (ABOVE_ZERO, math.ulp(0.0), "is not above 0"),
        (NOT_BELOW_ZERO, 0, "is below 0"),
    ):
        for name in names:
            value = getattr(training, name, None)  # not every Trainer's config has each
            if value is not None and not isinstance(value, str) and not value >= low:
                yield Problem(f"{name}: {value:g} {told}", code="number")
    for name in SHARES:
        if not 0 <= getattr(training, name) < 1:
            yield _not_in(name, getattr(training, name), "0 and below 1")
    if not 0 < training.max_save_overhead < 1:
        told = f"max_save_overhead: {training.max_save_overhead:g} is not above 0 and below 1"
        yield Problem(told, "a share of the time: 0.01 is 1 %", "number")
    for name in ("seed", "data_seed"):
        if (getattr(training, name) or 0) >= SEEDS:
            yield _not_in(name, getattr(training, name), "0 and 4294967295")
    if math.isinf(training.learning_rate):
        yield Problem("learning_rate: inf is not finite", code="number")
    yield from _length(recipe)
    yield from _adapter(recipe)


def _length(recipe: Recipe) -> Iterator[Problem]:
    """How long the run is, and how often something is done in it."""
    training = recipe.training
    if training.max_steps == 0 or training.max_steps < -1:
        yield Problem(
            f"max_steps: {training.max_steps} is not above 0",
            "leave it out: num_train_epochs decides",
            "number",
        )
    if not 0 < training.num_train_epochs < math.inf and training.max_steps <= 0:
        yield Problem(
            f"num_train_epochs: {training.num_train_epochs:g} leaves nothing to train",
            "above 0, or set max_steps",
            "number",
        )
    follows = training.eval_steps == training.save_steps  # as it does unless it is set
    for kind in ("save", "logging", *([] if follows else ["eval"])):
        strategy, steps = getattr(training, f"{kind}_strategy"), getattr(training, f"{kind}_steps")
        if word(strategy) == "steps" and steps is not None and not 0 < steps < math.inf:
            hint = f"a number of steps, a share of the run below 1, or {kind}_strategy: no"
            yield Problem(f"{kind}_steps: {steps:g} is not above 0", hint, "number")


def _adapter(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if not model.use_peft:
        for name in OF_ADAPTERS:
            if getattr(model, name) != getattr(type(model), name, None):
                told = f"{name}: {getattr(model, name)!r} has no effect without use_peft: true"
                yield Problem(told, "use_peft: true, or leave it out", "adapter", "warning")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(model, name):
                told = f"{name}: quantized weights cannot be trained"
                yield Problem(told, "use_peft: true", "adapter")
        return
    for name in ("lora_r", "lora_alpha"):
        if getattr(model, name) < 1:
            yield Problem(f"{name}: {getattr(model, name)} is not above 0", code="number")
    if not 0 <= model.lora_dropout < 1:
        yield _not_in("lora_dropout", model.lora_dropout, "0 and below 1")
    if model.lora_task_type != "CAUSAL_LM":
        told = f"lora_task_type: {model.lora_task_type}: a causal language model is trained"
        yield Problem(told, "leave it out", "adapter")


def _not_in(name: str, value: float, bounds: str) -> Problem:
    return Problem(f"{name}: {value:g} is not between {bounds}", code="number")

"""A run as a person's own script asks for it: with objects in the place of a recipe's names."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch
import xxhash
from peft import PeftModel
from torch.utils.data import IterableDataset
from transformers import AutoConfig, ProcessorMixin
from transformers.trainer_utils import has_length
from trl import ModelConfig

from keepstep.data import dataset, images
from keepstep.policy.metric import PREFIX, SAMPLED
from keepstep.ranks.console import say
from keepstep.recipe import model as recipe_model
from keepstep.recipe.arguments import CheckpointArguments
from keepstep.recipe.config import DataConfig, Recipe
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.recipe.trajectory import plain, word
from keepstep.trainer.program import called, known_by
from keepstep.trainer.restore import random_numbers_apart

SAMPLES = 1000  # rows that a digest is made of, and numbers of each weight
FORMATTED = 100  # rows that a formatting function is known by
# Of an adapter's configuration: where its base lies, and what does not change its training.
NOT_COMPARED = ("base_model_name_or_path", "revision", "inference_mode", "runtime_config")


def arguments_of(given: Mapping[str, Any], trainer: str) -> Any:
    """The config that a Trainer was given: keepstep's.

    Args:
        given: the Trainer's arguments by name.
        trainer: its class.

    Raises:
        ConfigError: it has not keepstep's fields.
    """
    args = given.get("args")
    if isinstance(args, CheckpointArguments):
        return args
    kind = "nothing" if args is None else type(args).__name__
    config = "SFTConfig" if args is None else kind
    raise ConfigError(
        [
            Problem(
                f"{trainer} is given args: {kind}, which has none of keepstep's fields",
                "args=KeepstepConfig(output_dir=…); for another Trainer: @dataclass class "
                f"MyConfig(CheckpointArguments, {config}): ...",
                "arguments",
            )
        ]
    )


def recipe_of(given: Mapping[str, Any], args: Any) -> Recipe:
    """The recipe that these arguments stand for. Ranks: any; the main process tells.

    Args:
        given: the Trainer's arguments by name.
        args: its config; what the recipe has is a copy.
    """
    training = copy.copy(args)
    if given.get("eval_dataset") is None:
        _without_evaluation(training)
    name, rows = name_of(given.get("model")), given.get("train_dataset")
    adapter = given.get("peft_config") is not None or isinstance(given.get("model"), PeftModel)
    init = getattr(training, "model_init_kwargs", None) or {}
    return Recipe(
        DataConfig(dataset_streaming=rows is not None and not has_length(rows)),
        training,
        ModelConfig(
            model_name_or_path=name,
            model_revision=init.get("revision", "main"),
            use_peft=adapter,
        ),
    )


def _without_evaluation(training: Any) -> None:
    """No rows to evaluate on: nothing ranks the checkpoints. Said aloud, for whoever forgot them.

    Raises:
        ConfigError: what was asked for cannot be had without.
    """
    wants = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy: best": word(training.save_strategy) == "best",
        "early_stopping_patience": training.early_stopping_patience is not None,
        "eval_on_start": training.eval_on_start,
        "push_to_hub (of the best checkpoint)": training.push_to_hub,
    }
    wanted = [name for name, asked in wants.items() if asked]
    if wanted:
        told = f"{', '.join(wanted)} needs an evaluation, and there is no eval_dataset"
        raise ConfigError([Problem(told, "eval_dataset=…", "no-evaluation")])
    training.eval_strategy, training.eval_steps = "no", None
    if training.keep_ranking == "metric" and training.save_total_limit is not None:
        training.keep_ranking = "recency"
        say(
            f"no eval_dataset is given: nothing ranks the checkpoints, and the newest "
            f"{training.save_total_limit} stay"
        )


def check_rows(given: Mapping[str, Any], training: Any) -> Iterator[Problem]:
    """What is wrong with the rows that a script gives, as far as their number and names tell.

    Ranks: any.

    Args:
        given: the Trainer's arguments by name.
        training: its config.
    """
    evaluation = given.get("eval_dataset")
    several = evaluation if isinstance(evaluation, dict) else {}
    sets = {"train_dataset": given.get("train_dataset"), "eval_dataset": evaluation}
    sets |= {f"eval_dataset {name!r}": rows for name, rows in several.items()}
    for name, rows in sets.items():
        if rows is not None and has_length(rows) and len(rows) == 0:
            yield Problem(f"{name} has no rows", code="data")
        if isinstance(rows, datasets.IterableDataset) and next(iter(rows), None) is None:
            yield Problem(f"{name} is a stream without rows", code="data")
    blind = [p for name, rows in sets.items() for p in images.without_image(name, rows, training)]
    if blind and sees_images(given):
        yield from blind
    metric = training.ranking_metric
    own = tuple(f"eval_{name}_" for name in several)
    own += (PREFIX + SAMPLED,) if own else ()
    if own and metric and not all(part.strip().startswith(own) for part in metric.split("+")):
        would_do = ", ".join(f"eval_{name}_loss" for name in several)
        yield Problem(
            f"metric_for_best_model: {metric}: of several evaluation sets each has metrics of its "
            "own",
            f"name one of these: {would_do}; or a sum, as in "
            f"{' + '.join(f'0.5*eval_{name}_loss' for name in list(several)[:2])}",
            "unknown-metric",
        )


def name_of(model: Any) -> str | None:
    """The name or the folder that a model was loaded from; None: that is not known."""
    if model is None or isinstance(model, str):
        return model
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def sees_images(given: Mapping[str, Any]) -> bool:
    """Whether a vision-language model is trained: SFTTrainer (trl 1.16) asks the processor.

    Args:
        given: the Trainer's arguments by name.
    """
    processing, model = given.get("processing_class"), given.get("model")
    if processing is not None or model is None:
        return isinstance(processing, ProcessorMixin)
    config = getattr(model, "config", None)
    if isinstance(model, str):
        args = given.get("args")
        init = getattr(args, "model_init_kwargs", None) or {}
        trusted = bool(getattr(args, "trust_remote_code", False))
        revision = init.get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusted)
    return config is not None and recipe_model.is_vision_language(config)


def settings_of(recipe: Recipe, given: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """What determines the trajectory, to be compared at a resume. Ranks: any; the same everywhere.

    Args:
        recipe: what `recipe_of` gives.
        given: the Trainer's arguments by name, rows as they were given.
        trainer: built.
    """
    found = recipe.settings()
    for name in ("train_dataset", "eval_dataset"):
        rows, stream = given.get(name), name.replace("train_", "").replace("dataset", "stream")
        found[name.replace("train_", "")] = digest_of_rows(rows)
        found[stream] = None if isinstance(rows, dict) else _digest_of_stream(rows)
    model = given.get("model")
    if isinstance(model, str):
        found["base_model"] = recipe_model.fingerprint(recipe.model)
        found["base_weights"] = recipe_model.weights_fingerprint(recipe.model)
    else:
        found["base_model"] = digest_of_model(trainer.model)
        found |= _base_weights(trainer.model)
    found["trained_weights"] = digest_of_trained(trainer.model)
    found["peft_config"] = _adapters(trainer.model)
    processing = trainer.processing_class
    if hasattr(getattr(processing, "tokenizer", processing), "get_vocab"):
        found |= recipe_model.tokenizer_settings(processing, recipe.training)
    found["data_collator"] = known_by(given.get("data_collator"))
    found["compute_loss_func"] = known_by(given.get("compute_loss_func"))
    found["formatting_func"] = called(given.get("formatting_func"))
    found["formatted_rows"] = digest_of_formatted(
        given.get("train_dataset"), given.get("formatting_func")
    )
    found["optimizers"] = [_told(one) for one in given.get("optimizers") or () if one is not None]
    found["ref_model"] = _name_of_model(given.get("ref_model"))
    rewards = given.get("reward_funcs")
    found["reward_funcs"] = None if rewards is None else _names_of_rewards(rewards)
    kind = given.get("optimizer_cls_and_kwargs")
    found["optimizer_cls_and_kwargs"] = None if kind is None else [kind[0].__name__, plain(kind[1])]
    return found


def _name_of_model(model: Any) -> str | None:
    """Of one that is not trained: its name, or what an object is."""
    return model if model is None or isinstance(model, str) else digest_of_model(model)


def _names_of_rewards(rewards: Any) -> list[str | None]:
    """Of a reward function or model, or several."""
    several = rewards if isinstance(rewards, (list, tuple)) else [rewards]
    models = (str, torch.nn.Module)
    return [_name_of_model(r) if isinstance(r, models) else known_by(r) for r in several]


def digest_of_rows(rows: Any) -> Any:
    """A short digest of rows that are given as an object; of several sets, each one's."""
    if isinstance(rows, dict):
        return {str(name): digest_of_rows(part) for name, part in rows.items()}
    if rows is None or not has_length(rows) or isinstance(rows, IterableDataset):
        return None
    if hasattr(rows, "column_names"):
        return dataset.fingerprint(rows)
    digest = xxhash.xxh3_64(f"{len(rows)} {type(rows).__name__}".encode())
    for index in range(0, len(rows), max(1, len(rows) // SAMPLES)):
        digest.update(json.dumps(rows[index], default=_plain_tensor).encode())
    return f"{len(rows)} rows, {digest.hexdigest()}"


def _digest_of_stream(rows: Any) -> str | None:
    """Of one that can be read twice; from another, the first rows would be gone."""
    return dataset.stream_fingerprint(rows) if hasattr(rows, "column_names") else None


def _plain_tensor(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def digest_of_model(model: Any) -> str:
    """Of a model object: its class, and the names and shapes of its weights."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes = [(n, list(getattr(p, "ds_shape", p.shape))) for n, p in base.named_parameters()]
    plain_shapes = [(n.replace(".base_layer", ""), s) for n, s in shapes if ".lora_" not in n]
    return f"{type(base).__name__}, {xxhash.xxh3_64_hexdigest(json.dumps(plain_shapes).encode())}"


def _base_weights(model: Any) -> dict[str, str]:
    """What lies under an adapter, and in no checkpoint; nothing where that cannot be looked at."""
    if not isinstance(model, PeftModel):
        return {}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    if any(hasattr(p, "ds_id") or p.is_meta for p in frozen.values()):
        return {}  # shared out among the ranks: on as many others it would look another way
    digest = xxhash.xxh3_64()
    for name, weight in sorted(frozen.items()):
        if ".lora_" not in name:
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLES)].contiguous().cpu()
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return {"base_weights": digest.hexdigest()}


def digest_of_trained(model: Any) -> str:
    """Which weights are trained: how many, and their names."""
    names = sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
    return f"{len(names)} tensors, {xxhash.xxh3_64_hexdigest(json.dumps(names).encode())}"


def digest_of_formatted(rows: Any, function: Any) -> str | None:
    """What a formatting function makes of a hundred rows: by its name alone, one that was edited
    would be the same. None without one, and for rows that are not counted. Ranks: any."""
    if function is None or not hasattr(rows, "column_names") or not has_length(rows):
        return None
    with random_numbers_apart():
        picked = range(0, len(rows), max(1, len(rows) // FORMATTED))
        texts = [function(rows[index]) for index in picked]
    return str(xxhash.xxh3_64_hexdigest(json.dumps(texts, default=str).encode()))


def _adapters(model: Any) -> Any:
    if not isinstance(model, PeftModel):
        return None
    return {
        name: {n: v for n, v in plain(config.to_dict()).items() if n not in NOT_COMPARED}
        for name, config in model.peft_config.items()
    }


def _told(one: Any) -> Any:
    """An optimizer's class and numbers; a schedule's class."""
    numbers = getattr(one, "defaults", {})
    return [type(one).__name__, {n: plain(v) for n, v in numbers.items() if _is_number(v)}]


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)
    )

"""What determines a run's trajectory, field by field: a resume compares it with the checkpoint's.

Every field of the recipe that is not named harmless here is compared, also one that a newer library
brings along: a test then asks for a place for it. Pure: no disk, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from keepstep.policy.kernels import LIGER, PADDING_FREE

COMPARED = frozenset(
    {
        # The optimizer and its schedule.
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
        *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "max_grad_norm"),
        # The loss.
        *("loss_type", "label_smoothing_factor", "completion_only_loss", "assistant_only_loss"),
        *("router_aux_loss_coef", "neftune_noise_alpha", "average_tokens_across_devices"),
        # The numbers' precision, and kernels that round in another way.
        *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("use_liger_kernel", "liger_kernel_config", "full_determinism"),
        # What is computed again in the backward pass may draw other random numbers.
        *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        # Random numbers.
        *("seed", "data_seed"),
        # How rows become batches.
        *("max_length", "truncation_mode", "packing", "packing_strategy", "padding_free"),
        *("pad_to_multiple_of", "shuffle_dataset", "dataset_text_field", "dataset_kwargs"),
        *("train_sampling_strategy", "length_column_name", "dataloader_drop_last"),
        *("dataloader_in_order", "remove_unused_columns", "label_names", "accelerator_config"),
        # How an evaluation averages: values of another one cannot be ranked with the earlier ones,
        # and early stopping and a plateau's schedule would take the difference for progress.
        *("per_device_eval_batch_size", "eval_packing", "bf16_full_eval", "fp16_full_eval"),
        # The model.
        *("model_init_kwargs", "model_revision", "dtype", "use_peft", "lora_r", "lora_alpha"),
        *("lora_dropout", "lora_target_modules", "lora_target_parameters"),
        *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora", "load_in_8bit"),
        *("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    }
)

HARMLESS = frozenset(
    {
        # Compared by what they stand for, wherever it lies (see `train.gather_inputs`): the rows,
        # the model, the tokenizer with its chat template, the attention that the model takes.
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
        *("dataset_streaming", "datasets", "streaming", "test_split_size", "eval_dataset_name"),
        *("eval_datasets", "eval_split_fraction", "column_names", "mixture_stopping_strategy"),
        *("model_name_or_path", "chat_template_path"),
        *("eos_token", "pad_token", "attn_implementation"),
        # Compared as `rows_per_step`; how they are shared out changes with the processes.
        *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),
        # They extend a run, or end it.
        *("max_steps", "num_train_epochs", "early_stopping_patience", "load_best_model_at_end"),
        # When to evaluate, and what ranks: see `EVALUATED` for the schedules that depend on it.
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model"),
        *("greater_is_better", "keep_ranking"),
        # What else an evaluation gives, and how much memory it takes.
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"),
        *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "metrics"),
        *("sample_prompts", "sample_max_new_tokens", "sample_temperature"),
        # Which machine computes, and how its processes share out state and gradients.
        *("use_cpu", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "fsdp", "fsdp_config"),
        *("deepspeed", "parallelism_config"),
        # Memory against time, with the same result.
        *("gradient_checkpointing", "activation_checkpointing", "activation_offloading"),
        *("torch_empty_cache_steps", "use_cache", "skip_memory_metrics"),
        # How fast batches come.
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        "dataset_num_proc",
        # What is told of a run.
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"),
        *("logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "debug"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        # Where, when and how it is saved.
        *("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("save_on_each_node", "enable_jit_checkpoint", "save_weights", "save_timeout_seconds"),
        *("save_interval_seconds", "max_save_overhead", "save_min_seconds", "async_save"),
        *("keep_every_n_steps", "keep_total_bytes"),
        *("min_free_bytes", "max_lost_minutes", "on_save_error", "max_failed_saves"),
        *("last_save_retry_seconds", "time_limit", "deadline"),
        *("stop_margin_seconds", "peer_timeout_seconds", "hang_timeout_seconds"),
        "hang_min_seconds",
        # What follows a step that spoils the run: which rows are left out is in the manifest.
        *("on_nonfinite", "on_spike", "spike_sigma", "spike_window", "max_rewinds"),
        # Where it goes on.
        *("resume_from_checkpoint", "resume_weights_only", "verify_on_resume", "allow_drift"),
        *("allow_batch_change", "max_attempts_without_progress", "ignore_data_skip"),
        "restore_callback_states_from_checkpoint",
        # Publishing.
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "hub_require", "publish_min_seconds"),
        *("publish_timeout_seconds", "card"),
        # The mirror.
        *("mirror", "mirror_min_seconds", "mirror_timeout_seconds", "mirror_total_limit"),
        *("mirror_bytes_per_second", "mirror_every", "node_local"),
        # Not used: `keepstep.train` always trains and evaluates; a leave to run code is no code.
        *("do_train", "do_eval", "do_predict", "trust_remote_code", "ignore_bias_buffers"),
    }
)

# A schedule that an evaluation's value moves depends on when there is one, and of what.
EVALUATED = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model")
PLATEAUS = ("reduce_lr_on_plateau", "greedy")


def settings(training: Any, model: Any, data: Any) -> dict[str, Any]:
    """Every field of the recipe's three parts that determines the trajectory, as JSON holds it.

    What cannot matter is left out: an adapter's fields without one, quantization's without it.
    """
    values = {
        f.name: getattr(part, f.name) for part in (training, model, data) for f in fields(part)
    }
    kept = [name for name in values if name not in HARMLESS]
    if word(training.lr_scheduler_type) in PLATEAUS:
        kept += [*EVALUATED, "greater_is_better"]
    chosen = {name: plain(values[name]) for name in kept if _matters(name, model)}
    if chosen["data_seed"] == chosen["seed"]:
        chosen["data_seed"] = None
    # Not said: compared once it is decided (`policy.kernels`), with the attention.
    chosen = {n: v for n, v in chosen.items() if v is not None or n not in (LIGER, PADDING_FREE)}
    if "eval_packing" in chosen and chosen["eval_packing"] is None:
        chosen["eval_packing"] = chosen["packing"]
    return chosen


def _matters(name: str, model: Any) -> bool:
    if name.startswith("lora_") or name in ("use_rslora", "use_dora"):
        return bool(model.use_peft)
    if name.startswith("bnb_4bit_") or name == "use_bnb_nested_quant":
        return bool(model.load_in_4bit)
    return True


def plain(value: Any) -> Any:
    """A value as JSON holds it, for everybody to read: no tokens, and of a path only the name (a
    run that was moved is the same run)."""
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        items = {str(name): plain(item) for name, item in value.items()}
        return {name: item for name, item in items.items() if not name.endswith("token")}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return PurePath(value).name if value.startswith(("/", "~", "./", "../")) else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def word(value: Any) -> str:
    """An enumeration's value, or the value, as text."""
    return str(plain(value))

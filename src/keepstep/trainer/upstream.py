"""Every part of another library that is not promised to stay, and that keepstep relies on.

A library that renames a method has the stock behavior come back in silence: an override that
overrides nothing is never called, an attribute that is written is never read. So all of them stand
in this one table; `upstream_check` compares it with the installed libraries whenever a Trainer's
class is made, and docs/upstream.md is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What the tests pass with (constraints.txt).
TESTED = {
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "huggingface_hub": "2.4.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}

TRAINER = "transformers.Trainer"
SFT_TRAINER = "trl.SFTTrainer"
ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
PARTITIONED = "deepspeed.runtime.zero.partition_parameters.Init"
DEEPSPEED_FILES = "deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine"
CALLBACK = "transformers.TrainerCallback"
REPORTS = "transformers.integrations.integration_utils"
GROUPS = "torch.distributed.distributed_c10d"
STREAM = "datasets.IterableDataset"
STREAM_STEP = "datasets.iterable_dataset._BaseExamplesIterable"

# Who calls what is overridden there.
CALLERS = {CALLBACK: TRAINER, DEEPSPEED_FILES: ENGINE, STREAM_STEP: STREAM}

Kind = Literal["overridden", "replaced", "called", "read"]


@dataclass(frozen=True)
class Hook:
    """A part of another library.

    Attributes:
        owner: the module or the class that has it, by a dotted name.
        name: of the method, function or attribute.
        kind: `overridden` in a subclass; `replaced` on an object, or written; `called`; `read`.
        why: keepstep relies on it.
        parameters: the first ones (without `self`), that are named or counted on by position.
        called: whether the library calls it itself; only then does an override have an effect.
    """

    owner: str
    name: str
    kind: Kind
    why: str
    parameters: tuple[str, ...] = ()
    called: bool = True

    @property
    def library(self) -> str:
        return self.owner.split(".")[0]

    @property
    def signature(self) -> str:
        """As it is written in messages and in the documents."""
        return f"({', '.join(self.parameters)}{', ' if self.parameters else ''}…)"


def _hooks(owner: str, kind: Kind, *rows: tuple[str, str, str]) -> list[Hook]:
    """Rows of (name, parameters, why)."""
    return [Hook(owner, name, kind, why, tuple(given.split())) for name, given, why in rows]


HOOKS: list[Hook] = [
    *(
        Hook(
            TRAINER,
            "__init__",
            "overridden",
            "keepstep's own arguments are taken out",
            ("model",),
            False,
        ),
        Hook(
            TRAINER,
            "train",
            "overridden",
            "the checkpoint is chosen by keepstep",
            ("resume_from_checkpoint",),
            False,
        ),
    ),
    *_hooks(
        TRAINER,
        "overridden",
        (
            "_save_checkpoint",
            "model trial",
            "the stock one writes straight into checkpoint-N, and rotates by age",
        ),
        (
            "_save",
            "output_dir state_dict",
            "the stock one stores its arguments, paths and Hub token included",
        ),
        (
            "_prepare_for_training",
            "max_steps train_dataloader resume_from_checkpoint",
            "state is restored, and a save rehearsed, before the first step",
        ),
        (
            "_inner_training_loop",
            "batch_size args resume_from_checkpoint",
            "`keepstep evaluate` evaluates in its place, with an engine that is built for training",
        ),
        (
            "_finalize_training",
            "trial num_train_samples start_time",
            "the last save has to arrive before the best is chosen",
        ),
        ("store_flos", "", "the stock one adds them up over the devices, and waits for those"),
        ("push_to_hub", "", "the stock one pushes the run folder, and the newest weights"),
        ("_load_best_model", "", "other processes may have written the best checkpoint"),
        (
            "_load_from_checkpoint",
            "resume_from_checkpoint model",
            "weights come from DeepSpeed's shards",
        ),
        (
            "_load_rng_state",
            "checkpoint",
            "what another number of processes wrote is no rank's own",
        ),
        ("_load_callback_state", "", "callbacks go on counting, with today's arguments"),
        (
            "_init_training_state",
            "max_steps num_update_steps_per_epoch num_train_epochs",
            "where in the data a run goes on",
        ),
        (
            "set_initial_training_values",
            "args dataloader",
            "steps that are left when the rows of a step have changed",
        ),
        (
            "_run_epoch",
            "model epoch train_dataloader",
            "the sampler is told its epoch; a missed evaluation is made up",
        ),
        (
            "_evaluate",
            "trial ignore_keys_for_eval",
            "a stop does not wait for its end; it changes no random numbers",
        ),
        (
            "evaluate",
            "eval_dataset ignore_keys metric_key_prefix",
            "a sum of several metrics ranks",
        ),
        (
            "evaluation_loop",
            "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
            "what an evaluation says of tokens is exact",
        ),
        ("_determine_best_metric", "metrics trial", "an infinite metric must not win"),
        ("get_train_dataloader", "", "the rows of a step do not depend on the number of processes"),
        (
            "get_eval_dataloader",
            "eval_dataset",
            "an evaluation draws nothing from training's random numbers",
        ),
        ("get_batch_samples", "epoch_iterator", "each batch is progress for the watchdog"),
        ("training_step", "model inputs", "progress, and whether the loss is finite"),
        ("_get_grad_norm", "model grad_norm", "whether the gradient norm is finite"),
        ("compute_loss", "model inputs", "a step's loss is the mean over its rows"),
        (
            "create_scheduler",
            "num_training_steps optimizer",
            "some schedules ask DeepSpeed's optimizers for `defaults`",
        ),
        ("log", "logs start_time", "the last loss stands in the manifest"),
    ),
    *_hooks(
        SFT_TRAINER,
        "overridden",
        (
            "_prepare_dataset",
            "dataset processing_class args packing formatting_func dataset_name",
            "rows are counted; an error of one rank is everybody's",
        ),
    ),
    *_hooks(
        CALLBACK,
        "overridden",
        ("on_train_begin", "args state control", "measurements begin; the bar is shown"),
        ("on_step_begin", "args state control", "how long a step stands still is learnt"),
        ("on_step_end", "args state control", "all ranks agree whether to save or to stop"),
        ("on_epoch_end", "args state control", "what was put off for an evaluation is saved"),
        (
            "on_prediction_step",
            "args state control",
            "a stop does not wait for an evaluation; the bar says how far it is",
        ),
        (
            "on_save",
            "args state control",
            "a save is none of a step's time; it is offered to the Hub",
        ),
        ("on_evaluate", "args state control", "its line"),
        ("on_log", "args state control", "its line"),
        ("on_train_end", "args state control", "the bar is over"),
    ),
    *_hooks(
        "transformers.TrainingArguments",
        "replaced",
        ("_VALID_DICT_FIELDS", "", "`card` is a dictionary on the command line, too"),
    ),
    *_hooks(
        TRAINER,
        "called",
        ("_get_train_sampler", "", "the order of rows"),
        ("_save_rng_state", "output_dir", "random numbers, as the stock Trainer stores them"),
        ("_load_optimizer_and_scheduler", "checkpoint", "the stock Trainer's part of a resume"),
        ("_load_scaler", "checkpoint", "the loss scale of fp16"),
        (
            "prediction_step",
            "model inputs prediction_loss_only",
            "a batch, to rehearse a user's metrics with",
        ),
        ("_wrap_model", "model training", "the model that evaluations call"),
        ("compute_loss_context_manager", "", "completions in the precision of evaluations"),
        (
            "save_model",
            "output_dir _internal_call",
            "gathers the weights where they cannot be stored in slices",
        ),
    ),
    *_hooks(
        TRAINER,
        "read",
        ("model_wrapped", "", "DDP's or DeepSpeed's module"),
        ("current_gradient_accumulation_steps", "", "written before a pass without effect"),
        ("is_in_train", "", "an evaluation by hand is no part of training"),
        ("lr_scheduler", "", "its state is stored and given back"),
    ),
    *_hooks(
        SFT_TRAINER,
        "read",
        ("_total_train_tokens", "", "tokens of all attempts together"),
        ("_metrics", "", "put back after a pass without effect"),
        ("aux_loss_enabled", "", "whether a router's loss is learned from"),
    ),
    *_hooks(
        "trl.trainer.utils.FusedCausalLMOutput",
        "read",
        ("label_mask", "", "which tokens an evaluation counts"),
        ("log_probs", "", "perplexity, and for a user's metrics"),
        ("entropy", "", "likewise"),
        ("is_top1", "", "accuracy, and for a user's metrics"),
    ),
    *_hooks(
        "trl.trainer.sft_trainer",
        "replaced",
        (
            "global_then_local_main_first",
            "",
            "when the first rank has failed, the others would wait for ever",
        ),
    ),
    *_hooks(
        "accelerate.Accelerator",
        "replaced",
        (
            "deepspeed_ulysses_dl_adapter",
            "dl model",
            "processes that share rows are given them, and exchange none",
        ),
    ),
    *_hooks(
        "accelerate.state.AcceleratorState",
        "replaced",
        ("parallelism_config", "", "sequences are shared where the engine is built alone"),
    ),
    *_hooks(
        ZERO12,
        "replaced",
        ("sequence_parallel_size", "", "what gradients are multiplied by"),
    ),
    *_hooks(
        ZERO3,
        "replaced",
        ("sequence_parallel_size", "", "what gradients are multiplied by"),
    ),
    *_hooks(
        "transformers.PreTrainedConfig",
        "read",
        ("_attn_implementation", "", "the attention that a model computes with"),
    ),
    *_hooks(
        "transformers.PreTrainedModel",
        "read",
        ("_supports_flash_attn", "", "whether flash attention is taken by default"),
    ),
    *_hooks(
        "trl.trainer.sft_trainer.DataCollatorForLanguageModeling",
        "replaced",
        ("padding_free", "", "rows without padding are for training alone"),
    ),
    *_hooks(
        "trl.scripts._hf_argparser",
        "called",
        ("string_to_bool", "", "fields are read as TRL reads them"),
    ),
    *_hooks(
        "transformers.integrations.deepspeed",
        "called",
        (
            "deepspeed_load_checkpoint",
            "deepspeed_engine checkpoint_path load_module_strict",
            "shards of the same layout are loaded as the stock Trainer does",
        ),
    ),
    *_hooks(
        "transformers.GenerationConfig",
        "replaced",
        ("_original_object_hash", "", "generation_config.json is stored as it came"),
    ),
    *(
        hook
        for kind in ("Wandb", "Trackio", "MLflow", "SwanLab", "Comet")
        for hook in _hooks(
            f"{REPORTS}.{kind}Callback",
            "called",
            ("setup", "args state model", "a tracker's run is continued, by its id"),
        )
    ),
    *(
        hook
        for kind in ("Wandb", "Trackio", "SwanLab", "Comet")
        for hook in _hooks(
            f"{REPORTS}.{kind}Callback",
            "called",
            ("on_log", "args state control", "a tracker is told of a step once it is saved"),
        )
    ),
    *_hooks(
        f"{REPORTS}.MLflowCallback",
        "called",
        ("on_train_end", "args state control", "its end waits for no server for minutes"),
    ),
    *_hooks(
        f"{REPORTS}.TensorBoardCallback",
        "called",
        ("on_log", "args state control logs", "each value once"),
    ),
    *_hooks(
        f"{REPORTS}.TensorBoardCallback",
        "replaced",
        ("tb_writer", "", "one that takes back what was not saved"),
        ("logging_dir", "", "one folder for all attempts"),
    ),
    *_hooks(
        f"{REPORTS}.TensorBoardCallback",
        "read",
        ("_SummaryWriter", "", "PyTorch's, or tensorboardX's"),
    ),
    *_hooks(f"{REPORTS}.WandbCallback", "read", ("_wandb", "", "the run that is open")),
    *_hooks(
        f"{REPORTS}.TrackioCallback",
        "read",
        ("_trackio", "", "keepstep's own figures"),
        ("_space_id", "", "whether the store is here"),
    ),
    *_hooks(f"{REPORTS}.MLflowCallback", "read", ("_ml_flow", "", "its client")),
    *_hooks(f"{REPORTS}.SwanLabCallback", "read", ("_swanlab", "", "keepstep's own figures")),
    *_hooks(f"{REPORTS}.CometCallback", "read", ("_experiment", "", "keepstep's own figures")),
    *_hooks(
        "transformers.EarlyStoppingCallback",
        "replaced",
        ("early_stopping_patience_counter", "", "counts anew when another metric ranks"),
    ),
    *_hooks(
        "transformers.trainer_pt_utils.LengthGroupedSampler",
        "replaced",
        ("batch_size", "", "it orders by a step's rows, whoever has them"),
        ("generator", "", "seeded for each epoch"),
    ),
    *_hooks(
        "transformers.utils.chat_template_utils",
        "called",
        (
            "_compile_jinja_template",
            "chat_template",
            "a chat template's mistakes are told before training",
        ),
    ),
    *_hooks(
        "accelerate.data_loader.DataLoaderShard",
        "read",
        ("synchronized_generator", "", "seeded, so that its order does not depend on dropout"),
    ),
    *_hooks(
        "accelerate.data_loader.DataLoaderAdapter",
        "read",
        ("base_dataloader", "", "the loader inside"),
    ),
    *_hooks(
        ENGINE,
        "called",
        (
            "save_checkpoint",
            "save_dir tag client_state save_latest exclude_frozen_parameters",
            "its shards, through keepstep's checkpoint engine",
        ),
        ("zero_load_from_fp32_weights", "", "whether 16-bit weights can be made from the masters"),
        ("zero_nvme_offload_optimizer", "", "then a rehearsal would copy large files"),
        ("module_state_dict", "", "16-bit weights that a checkpoint leaves out"),
        ("_optimizer_has_ckpt_event_prologue", "", "its shards, without barriers of the device"),
        ("_optimizer_has_ckpt_event_epilogue", "", "its shards, without barriers of the device"),
        (
            "_save_checkpoint",
            "save_dir tag client_state exclude_frozen_parameters",
            "its shards, without barriers of the device",
        ),
        ("_save_zero_checkpoint", "save_path tag", "its shards, without barriers of the device"),
    ),
    *_hooks(
        ENGINE,
        "replaced",
        ("checkpoint_engine", "", "DeepSpeed saves and loads through keepstep"),
        ("_copy_recovery_script", "save_path", "no program belongs in a checkpoint"),
        ("global_steps", "", "counted on after a resume"),
        ("global_samples", "", "counted on after a resume"),
        ("skipped_steps", "", "counted on after a resume"),
    ),
    *_hooks(
        ENGINE,
        "read",
        ("_config", "", "whether weights are gathered for a save"),
        ("param_names", "", "names of the parameters in the flat buffers"),
        ("has_moe_layers", "", "experts cannot be resharded, and are stored in more files"),
        ("save_zero_checkpoint", "", "whether this rank stores a shard"),
        ("zenflow", "", "steps where no hook precedes them"),
    ),
    *_hooks(
        "deepspeed.runtime.compiler",
        "replaced",
        ("compile", "", "an optimizer that is not used costs a start no compiler"),
    ),
    *_hooks(
        "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
        "replaced",
        ("gather_16bit_weights_on_model_save", "", "where weights cannot be stored in slices"),
    ),
    *_hooks(
        DEEPSPEED_FILES,
        "overridden",
        ("create", "info", "the staging folder is there already"),
        ("makedirs", "path exist_ok", "a Part makes its folders"),
        ("preserves_storage_sharing", "", "no clones are needed"),
        ("save", "state_dict path", "snapshot and digest in place of a file written at once"),
        ("load", "path map_location", "what was left out is put back"),
        ("commit", "info", "a checkpoint is committed by keepstep"),
    ),
    *_hooks(
        ZERO12,
        "called",
        (
            "load_state_dict",
            "state_dict_list load_optimizer_states load_from_fp32_weights",
            "a resharded shard, as if it came from a file",
        ),
        ("update_lp_params", "", "16-bit weights from the masters"),
    ),
    *_hooks(
        ZERO12,
        "read",
        ("single_partition_of_fp32_groups", "", "the fp32 masters"),
        ("groups_padding", "", "elements behind the masters"),
        ("partition_size", "", "elements of a rank in each group"),
        ("bit16_groups", "", "parameters of each group, in their order"),
        ("bit16_groups_flat", "", "elements of each group"),
        ("round_robin_bit16_groups", "", "parameters of each flat buffer"),
        ("round_robin_bit16_offsets", "", "where each of them begins"),
        ("round_robin_bit16_padding", "", "what aligns them"),
        ("clip_grad", "", "a part of its shard"),
        ("loss_scaler", "", "a part of its shard"),
        ("dynamic_loss_scale", "", "a part of its shard"),
    ),
    *_hooks(
        ZERO3,
        "called",
        (
            "load_state_dict",
            "state_dict_list load_optimizer_states load_from_fp32_weights",
            "a resharded shard, as if it came from a file",
        ),
        ("checkpoint_event_prologue", "", "every parameter is partitioned"),
        ("checkpoint_event_epilogue", "", "persistent parameters are whole again"),
        ("_set_fp32_optimizer_param_groups", "", "the optimizer's groups as they are stored"),
        ("_clear_fp32_optimizer_param_groups", "", "and as they were"),
    ),
    *_hooks(
        ZERO3,
        "replaced",
        ("_overflow_clean_up", "prev_scale", "persistent parameters are whole after it, too"),
    ),
    *_hooks(
        ZERO3,
        "read",
        (
            "fp32_partitioned_groups_flat",
            "",
            "the fp32 masters; what tells stage 3 from the others",
        ),
        ("fp16_groups", "", "parameters of each sub-group"),
        ("sub_group_to_group_id", "", "which group a sub-group is part of"),
        ("swap_optimizer", "", "state on NVMe cannot be resharded"),
        ("partial_offload", "", "then the optimizer steps in two places"),
        ("loss_scaler", "", "a part of its shard"),
        ("dynamic_loss_scale", "", "a part of its shard"),
    ),
    *_hooks(
        PARTITIONED,
        "read",
        ("ds_tensor", "", "a rank's slice of a parameter"),
        ("ds_numel", "", "its elements"),
        ("ds_shape", "", "its shape"),
        ("partition_numel", "", "elements of a slice"),
    ),
    *_hooks(
        "deepspeed.utils.tensor_fragment",
        "called",
        ("fragment_address", "numel start", "places in shards that are written anew"),
    ),
    *_hooks(
        "torch.optim.lr_scheduler.LRScheduler",
        "replaced",
        ("_last_lr", "", "a changed learning rate takes effect"),
        ("base_lrs", "", "a changed learning rate takes effect"),
    ),
    *_hooks(
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "called",
        ("_reset", "", "its best value was of another metric"),
    ),
    *_hooks(
        GROUPS,
        "called",
        (
            "_get_default_store",
            "",
            "a rank is stuck; a machine's part is not mirrored: who waits hears it",
        ),
    ),
    *_hooks(GROUPS, "read", ("_world", "", "how many collectives have been begun")),
    *_hooks(
        "torch.distributed.ProcessGroup",
        "read",
        ("_device_types", "", "the control group waits as long as the default group"),
    ),
    *_hooks(
        "torch.distributed.ProcessGroup",
        "called",
        ("_get_backend", "", "the control group waits as long as the default group"),
        ("_get_sequence_number_for_group", "", "how many collectives have been begun"),
    ),
    *_hooks(
        STREAM,
        "read",
        ("_ex_iterable", "", "whether each step of a stream goes on exactly where it was"),
        ("_info", "", "a stream with exact steps in the place of its own"),
        ("_split", "", "likewise"),
        ("_formatting", "", "likewise"),
        ("_distributed", "", "likewise"),
        ("_token_per_repo_id", "", "likewise"),
    ),
    *_hooks(
        "datasets.iterable_dataset",
        "read",
        ("_BaseExamplesIterable", "", "steps that are exact are made over it"),
    ),
    *_hooks(
        "datasets.iterable_dataset.BufferShuffledExamplesIterable",
        "read",
        ("buffer_size", "", "rows of a block"),
        ("generator", "", "their order"),
    ),
    *_hooks(
        "datasets.iterable_dataset.InterleavedShardsExamplesIterable",
        "read",
        ("max_input_shards", "", "files that are read in turn"),
    ),
    *_hooks(
        STREAM_STEP,
        "overridden",
        ("_init_state_dict", "", "where a step of a stream is"),
        ("shuffle_data_sources", "generator", "files have another order in each pass"),
        ("shard_data_sources", "num_shards index contiguous", "files are dealt out to parts"),
        ("reshard_data_sources", "", "files are divided"),
        ("num_shards", "", "those of the step below"),
        ("features", "", "those of the step below"),
        ("is_typed", "", "as the step below"),
    ),
    *_hooks(
        "huggingface_hub.utils._http",
        "called",
        ("default_client_factory", "", "the client that gets a time-out for each request"),
    ),
]

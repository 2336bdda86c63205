"""keepstep's own fields, for any Trainer's arguments, and what follows from them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from keepstep.output.terminal import complain
from keepstep.output.units import parse_bytes, parse_duration, parse_moment
from keepstep.policy.auto_interval import AUTO, AutoInterval
from keepstep.policy.batch import Batch
from keepstep.policy.metric import greater_is_better, in_full
from keepstep.policy.mirror import VARIABLE as MIRROR
from keepstep.policy.mirror import url_of
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Policy
from keepstep.policy.schedule import Schedule
from keepstep.ranks import signals
from keepstep.ranks.compile_locks import remove_stale_locks
from keepstep.recipe.trajectory import word
from keepstep.save.saver import Mode

RESHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # `optim`, as tested

if TYPE_CHECKING:
    from transformers import TrainingArguments as Combined
else:
    # A subclass of TrainingArguments would inherit its defaults (`learning_rate`, …) as fields of
    # its own, and dataclasses would let them win over those of the config it is combined with.
    Combined = object


def sequence_size_of(parallel: Any) -> int:
    """Accelerate's `sp_size`: of a `parallelism_config`, else of the launch."""
    named = parallel if isinstance(parallel, dict) else vars(parallel) if parallel else {}
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    found = os.environ.get("PARALLELISM_CONFIG_SP_SIZE") if launched else named.get("sp_size")
    return int(found or 1)


@dataclass
class CheckpointArguments(Combined):
    """keepstep's fields, beside those of any Trainer, and defaults that keep a run safe.

    Two lines combine it with the config of a Trainer that has `CheckpointMixin`; it comes first:

    ```python
    @dataclass
    class MyConfig(CheckpointArguments, DPOConfig): ...
    ```

    Attributes: the fields below, each with one sentence (`docs/configuration.md` lists them), and
    what follows from them, decided in one place: `policy()`, `schedule()`, `save_mode`, `batch`, …
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "The run folder: everything of one run lies in it."}
    )
    resume_from_checkpoint: str = field(
        default="auto",
        metadata={
            "help": "Where to start: `auto` (the newest valid checkpoint, else the beginning), "
            "`latest`, `best`, a step, a checkpoint's path, or `never` (the beginning). Asked for "
            "once: launched again, an unfinished run carries on from its newest checkpoint."
        },
    )
    resume_weights_only: bool = field(
        default=False,
        metadata={"help": "Take the checkpoint's weights only: step 0, a new optimizer."},
    )
    verify_on_resume: Literal["auto", "digests", "sizes", "off"] = field(
        default="auto",
        metadata={
            "help": "How a checkpoint is compared with its manifest before it is loaded: every "
            "byte (`digests`), sizes, or not at all; `auto`: every byte, below 30 GB."
        },
    )
    allow_drift: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings that may differ from those the checkpoint was made with."},
    )
    allow_batch_change: bool = field(
        default=False,
        metadata={
            "help": "Where these processes cannot share out the rows of a step evenly: go on with "
            "the nearest number that they can."
        },
    )
    max_attempts_without_progress: int = field(
        default=3,
        metadata={
            "help": "So often one checkpoint is resumed without a new one coming of it; the next "
            "attempt steps back one checkpoint."
        },
    )
    keep_ranking: Literal["metric", "recency"] = field(
        default="metric",
        metadata={
            "help": "What `save_total_limit` keeps beside the newest checkpoint: the best by "
            "`metric_for_best_model`, or the most recent."
        },
    )
    save_total_limit: int | None = field(
        default=3, metadata={"help": "How many checkpoints stay on disk; null: all of them."}
    )
    keep_every_n_steps: int | None = field(
        default=None, metadata={"help": "Checkpoints at multiples of it stay as well."}
    )
    keep_total_bytes: str | None = field(
        default=None,
        metadata={"help": "What all checkpoints together may take, as in `200GB`; null: no bound."},
    )
    metric_for_best_model: str | None = field(
        default="eval_loss",
        metadata={
            "help": "The evaluation metric that ranks checkpoints (`eval_loss`, `eval_perplexity`, "
            "`eval_mean_token_accuracy`, …), or a sum of several with weights: "
            "`0.7*eval_math_loss + 0.3*eval_code_loss`."
        },
    )
    eval_strategy: str = field(
        default="steps",
        metadata={"help": "When to evaluate.", "choices": ["no", "steps", "epoch"]},
    )
    async_save: Literal["auto", "lazy", "snapshot", "off"] = field(
        default="auto",
        metadata={
            "help": "How checkpoints are written: from a snapshot in host memory, in the "
            "background, copied at once (`snapshot`) or during the next forward and backward "
            "(`lazy`); or in the foreground (`off`). `auto`: `lazy` on CPU, `snapshot` elsewhere."
        },
    )
    save_weights: Literal["every", "best", "never"] = field(
        default="every",
        metadata={
            "help": "Which checkpoints get a weights file that `from_pretrained` reads: 2 bytes "
            "per parameter in bf16, beside 12 of state. `best`: those that were the best when they "
            "were saved. Without DeepSpeed it is part of the state, and always there. `keepstep "
            "export` makes one from any checkpoint."
        },
    )
    save_timeout_seconds: float = field(
        default=1200.0,
        metadata={
            "help": "A save that takes longer has failed: the disk or a rank is stuck. Less than "
            "`ddp_timeout`, for which the ranks would wait for each other."
        },
    )
    save_interval_seconds: float | str | None = field(  # `auto`; HfArgumentParser's way
        default=None,
        metadata={
            "help": "Save when so many seconds have passed since the last save, too. `auto`: as "
            "often as it costs next to nothing, see `max_save_overhead` and `save_min_seconds`."
        },
    )
    max_save_overhead: float = field(
        default=0.01,
        metadata={
            "help": "With `save_interval_seconds: auto`: the share of an attempt's time, at most, "
            "that training may stand still for saves; 0.01 is 1 %."
        },
    )
    save_min_seconds: float = field(
        default=10.0,
        metadata={
            "help": "With `save_interval_seconds: auto`: from the beginning of one save to that of "
            "the next, at least."
        },
    )
    time_limit: str | None = field(
        default=None,
        metadata={
            "help": "How long an attempt may take, as in `3h30m` (where a run goes back, all "
            "attempts of one launch together); it saves and stops in time, as preempted. In a "
            "Slurm job the job's end (SLURM_JOB_END_TIME) is known without it."
        },
    )
    deadline: str | None = field(
        default=None, metadata={"help": "The same as a moment: `2026-11-25T08:00`, local time."}
    )
    stop_margin_seconds: float = field(
        default=30.0,
        metadata={"help": "What is to be left of the time when the last save is committed."},
    )
    hub_require: bool = field(
        default=False,
        metadata={"help": "A run whose best checkpoint is not published ends with an error."},
    )
    publish_min_seconds: float = field(
        default=900.0,
        metadata={"help": "From the beginning of one push to the next one's, at least."},
    )
    publish_timeout_seconds: float = field(
        default=1800.0,
        metadata={"help": "A push that takes longer is ended; the last one is waited for so long."},
    )
    card: dict | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser's way
        default=None,
        metadata={
            "help": "Metadata of the model card: `license`, `base_model`, `datasets`, `language`, "
            "…; what is not given is inherited, or left out."
        },
    )
    mirror: str | None = field(
        default=None,
        metadata={
            "help": "Where checkpoints are copied to, and carried on from when the disk is gone: "
            "`s3://bucket/prefix`, `gs://…`, `az://…`, `hf://buckets/owner/name`, "
            "`file:///other/disk`; the run lies there "
            "below its folder's name. Else the environment's `KEEPSTEP_MIRROR`."
        },
    )
    mirror_min_seconds: float = field(
        default=0.0,
        metadata={"help": "From the beginning of one copy to the next one's, at least."},
    )
    mirror_every: int = field(
        default=1,
        metadata={
            "help": "Of so many saves one is copied, beginning with an attempt's first; the best "
            "and the last always."
        },
    )
    mirror_timeout_seconds: float = field(
        default=3600.0,
        metadata={"help": "A copy that takes longer is ended; the last one is waited for so long."},
    )
    mirror_total_limit: int | None = field(
        default=None,
        metadata={
            "help": "How many checkpoints stay on the mirror, chosen as `save_total_limit` says; "
            "null: as many as in the run folder."
        },
    )
    mirror_bytes_per_second: str | None = field(
        default=None,
        metadata={"help": "What copies may take of the network, as in `50MB`; null: no bound."},
    )
    node_local: bool = field(
        default=False,
        metadata={
            "help": "`output_dir` lies on each machine's own disk, and no other machine sees it: "
            "each keeps what its processes have written, and the `mirror` puts it together."
        },
    )
    peer_timeout_seconds: float = field(
        default=25.0,
        metadata={"help": "A rank that gives no sign of life for so long is dead or frozen."},
    )
    hang_timeout_seconds: float = field(
        default=1800.0,
        metadata={
            "help": "When no rank gets on for so long (a step, a batch evaluated, a save), the run "
            "hangs: it names the rank that is behind, and ends. Sooner where the attempt's own "
            "steps have taught it: see `hang_min_seconds`."
        },
    )
    hang_min_seconds: float = field(
        default=60.0,
        metadata={
            "help": "The least of the learnt bounds. Once 50 steps (5 evaluations, 5 saves) are "
            "made, the next one hangs after 10 times the standstill that 99 % of them stay below, "
            "and twice the longest; after so many seconds at least, in a save 5 times so many. As "
            "large as `hang_timeout_seconds`: nothing is learnt."
        },
    )
    min_free_bytes: str | None = field(
        default=None,
        metadata={
            "help": "What is to be left free on the disk of `output_dir`, for others, as in "
            "`50GB`: a save that would take it is not begun; null: nothing."
        },
    )
    max_lost_minutes: float = field(
        default=60.0,
        metadata={"help": "A warning is told when a failure would lose more work than that."},
    )
    on_save_error: Literal["continue", "stop"] = field(
        default="continue",
        metadata={"help": "What follows a save that failed (disk full, say): go on, or stop."},
    )
    max_failed_saves: int | None = field(
        default=5,
        metadata={
            "help": "So many saves in a row that failed end the run: what it would lose grows with "
            "each; null: it goes on for ever."
        },
    )
    on_nonfinite: Literal["stop", "rewind", "ignore"] = field(
        default="stop",
        metadata={
            "help": "What follows a loss (of any rank) or a gradient norm that is NaN or infinite: "
            "the run ends, naming step, rank and rows, and nothing of that step is saved (`stop`); "
            "it goes back to the newest checkpoint from before, and leaves those rows out from "
            "there on (`rewind`); or it goes on (`ignore`)."
        },
    )
    on_spike: Literal["stop", "rewind", "ignore"] = field(
        default="ignore",
        metadata={
            "help": "What follows a spike of the loss or of the gradient norm (see `spike_sigma`), "
            "in the words of `on_nonfinite`; `ignore` tells of it."
        },
    )
    spike_sigma: float | None = field(
        default=None,
        metadata={
            "help": "A step's loss (the mean over all ranks) or gradient norm is a spike when it "
            "lies more than so many standard deviations above the mean of the steps before, as in "
            "6; null: spikes are not looked for."
        },
    )
    spike_window: int = field(
        default=100,
        metadata={
            "help": "Of how many steps that mean is, spikes left out; before there are so many, "
            "none is seen."
        },
    )
    max_rewinds: int = field(
        default=3,
        metadata={
            "help": "How often a run may go back, in all its attempts together; then it stops, and "
            "names what was tried."
        },
    )
    last_save_retry_seconds: float = field(
        default=60.0,
        metadata={
            "help": "At the end of training, or at a stop, a last save that failed is tried again "
            "for so long: at once, then after longer and longer pauses."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Train in bfloat16; null: as the launch says (mixed_precision), else where the "
            "hardware has it; not with fp16."
        },
    )
    fp16: bool = field(
        default=False, metadata={"help": "Train in float16, with a loss scaler, instead."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=None,
        metadata={
            "help": "DDP only: look for parameters without a gradient at every step; null: of "
            "vision-language models, which may leave out a part of what sees."
        },
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps between evaluations; null: `save_steps`."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better metric."},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run's early stopping goes on counting."}
    )
    disable_tqdm: bool = field(
        default=True, metadata={"help": "False: the Trainer's own bars instead of keepstep's."}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have TrainingArguments read `card` as it reads its own mappings: from JSON, too."""
        super().__init_subclass__(**kwargs)
        known = list(getattr(cls, "_VALID_DICT_FIELDS", []))
        if "card" not in known:
            cls._VALID_DICT_FIELDS = [*known, "card"]

    def __post_init__(self) -> None:
        self.direction_is_given = self.greater_is_better is not None  # Trainer guesses else
        if not self.direction_is_given and self.metric_for_best_model:
            self.greater_is_better: bool | None = greater_is_better(self.metric_for_best_model)
        launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
        if launched_on_cpu or not torch.accelerator.is_available():
            self.use_cpu = True  # without it DeepSpeed's batch size is resolved for one process
        self.precision_is_given = self.fp16 or self.bf16 is not None
        if not self.precision_is_given:  # the launcher's, whose word Accelerate takes anyway
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            self.fp16 = launched == "fp16"
            here = not self.use_cpu and torch.cuda.is_bf16_supported()
            self.bf16 = launched == "bf16" or (here and not self.fp16)
        self.bf16 = bool(self.bf16)
        if self.eval_steps is None and self.eval_strategy == "steps":
            self.eval_steps = self.save_steps  # every checkpoint has its metric
        if isinstance(self.save_interval_seconds, str):  # HfArgumentParser's; `auto` stays
            with contextlib.suppress(ValueError):  # preflight tells of it
                self.save_interval_seconds = float(self.save_interval_seconds)
        named = self.output_dir
        remove_stale_locks(complain)  # the process group is made next, with DeepSpeed's extension
        super().__post_init__()
        if not named:  # TrainingArguments would train into a folder of its own choice
            self.output_dir = None

    def schedule(self) -> Schedule:
        """When to save beside `save_steps`, and when to stop."""
        wall, steady = signals.started()
        moments = [float(end) for end in [os.environ.get("SLURM_JOB_END_TIME")] if end]
        if self.deadline:
            moments.append(parse_moment(str(self.deadline)))
        moment = min(moments, default=None)
        deadlines = [] if moment is None else [steady + moment - wall]
        if self.time_limit:
            deadlines.append(steady + parse_duration(str(self.time_limit)))
        deadline = min(deadlines, default=None)
        return Schedule(self.save_interval, deadline, self.stop_margin_seconds, moment)

    @property
    def save_interval(self) -> float | AutoInterval | None:
        """`save_interval_seconds`, and what `auto` depends on."""
        if self.save_interval_seconds == AUTO:
            return AutoInterval(self.max_save_overhead, self.save_min_seconds)
        return None if self.save_interval_seconds is None else float(self.save_interval_seconds)

    @property
    def ranking_metric(self) -> str | None:
        """`metric_for_best_model` by its full name; None: nothing is ranked."""
        metric = self.metric_for_best_model
        if not metric or self.eval_strategy == "no":
            return None
        return in_full(metric)

    def policy(self) -> Policy:
        """What retention is asked to do."""
        return Policy(
            limit=self.save_total_limit,
            ranking=self.keep_ranking,
            metric=self.ranking_metric,
            greater_is_better=bool(self.greater_is_better),
            every_n_steps=self.keep_every_n_steps,
            total_bytes=parse_bytes(self.keep_total_bytes) if self.keep_total_bytes else None,
        )

    @property
    def rows_seed(self) -> int:
        """What rows are drawn and ordered with."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def mirror_url(self) -> str | None:
        """Where this run is mirrored, None: nowhere."""
        asked = self.mirror or os.environ.get(MIRROR)
        return url_of(asked, self.output_dir) if asked else None

    def mirror_policy(self) -> Policy:
        """What retention is asked to do on the mirror."""
        policy = self.policy()
        return replace(policy, limit=self.mirror_total_limit or policy.limit)

    @property
    def mirror_rate(self) -> int:
        """`mirror_bytes_per_second` as a number; 0: no bound."""
        return parse_bytes(self.mirror_bytes_per_second or 0)

    @property
    def min_free(self) -> int:
        """`min_free_bytes` as a number."""
        return parse_bytes(self.min_free_bytes or 0)

    @property
    def save_mode(self) -> Mode:
        """`async_save`, decided: `lazy` is the default where it has been measured."""
        if self.async_save != "auto":
            return self.async_save
        return "lazy" if self.use_cpu else "snapshot"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 where nothing is sharded: also DDP or a single process."""
        return int(self.deepspeed_plugin.zero_stage) if self.deepspeed_plugin else 0

    @property
    def parallel_layout(self) -> ParallelLayout:
        """How many processes there are, and how state is shared out among them."""
        has_deepspeed = self.deepspeed_plugin is not None
        return ParallelLayout(self.world_size, self.zero_stage, has_deepspeed)

    def offloaded(self, what: Literal["optimizer", "param"]) -> str:
        """Where DeepSpeed keeps it: `none` (on the device), `cpu`, `nvme`."""
        zero = self.deepspeed_settings.get("zero_optimization", {})
        return str((zero.get(f"offload_{what}") or {}).get("device") or "none")

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def card_data(self) -> dict[str, Any]:
        """`card`, of which HfArgumentParser has made a mapping."""
        return dict(self.card or {})  # type: ignore[arg-type]

    @property
    def sequence_size(self) -> int:
        """How many processes share out each row's tokens (DeepSpeed ALST/Ulysses)."""
        return sequence_size_of(self.parallelism_config)

    @property
    def batch(self) -> Batch:
        """How the rows of one optimizer step are shared out; processes that share sequences count
        as one."""
        per_device, times = self.per_device_train_batch_size, self.gradient_accumulation_steps
        return Batch(per_device, times, max(1, self.world_size // self.sequence_size))

    @property
    def rows_are_dealt(self) -> bool:
        """Whether keepstep deals the rows of a step; else the Trainer's sampler does."""
        return word(self.train_sampling_strategy) != "batch_rebalance"

    @property
    def deepspeed_settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration, the live one; empty without DeepSpeed."""
        return self.deepspeed_plugin.deepspeed_config if self.deepspeed_plugin else {}

    @property
    def rigid(self) -> str | None:
        """Why this attempt can only resume what as many processes with its ZeRO stage have written;
        None: it can resume any."""
        if "nvme" in (self.offloaded("optimizer"), self.offloaded("param")):
            return "an optimizer or parameters on NVMe are not resharded"
        if not self.average_tokens_across_devices:
            return "average_tokens_across_devices: false makes the loss depend on that number"
        if self.zero_stage and word(self.optim) not in RESHARDED_OPTIMIZERS:
            return f"optim: {word(self.optim)} has not been tested with another number"
        if word(self.train_sampling_strategy) == "batch_rebalance":
            return "train_sampling_strategy: batch_rebalance deals out rows by that number"
        return None

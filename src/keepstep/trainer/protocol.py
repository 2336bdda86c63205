"""What saving, pacing, restoring and reporting need of a trainer.

They are written against these protocols, not against `CheckpointMixin`, which is made of them: a
circle would let each reach into everything of the other. What comes from transformers (`model`,
`accelerator`, `state`, …) has no types there, and is `Any` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

from keepstep.data.rows import Count
from keepstep.policy.batch import Batch
from keepstep.policy.manifest import Manifest
from keepstep.policy.standstill import Phase
from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.writer import Saved
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part
from keepstep.trainer.resharded import Resharded
from keepstep.trainer.row_plan import RowPlan
from keepstep.trainer.speed import Speed


class CheckpointContents(Protocol):
    """What a trainer's checkpoints consist of (`state.Contents`)."""

    @property
    def engine(self) -> Any: ...

    def plan(self) -> None: ...

    def store(self, part: Part) -> None: ...

    def optimizer(self) -> Optimizer | None: ...

    def steps_made(self) -> float | None: ...

    def group_names(self) -> list[list[str]]: ...

    def stored_names(self) -> dict[str, str]: ...


class StepTimes(Protocol):
    """The main process's measurements (`pacer.Pacer`)."""

    def save_begins(self) -> Mapping[str, Any]: ...

    def save_ended(self, facts: dict[str, Any]) -> None: ...

    def save_failed(self) -> None: ...


class StepHealth(Protocol):
    """Whether all steps so far were finite, and no spikes (`health.Health`)."""

    def settle(self) -> None: ...

    def bad_losses(self) -> int: ...


class StepHook(Protocol):
    """What happens at every step's end (`pacing.EveryStep`)."""

    @property
    def health(self) -> StepHealth: ...

    @property
    def pacer(self) -> StepTimes | None: ...

    @property
    def speed(self) -> Speed: ...

    def progress(self, at: Phase | None = None) -> None: ...

    def lost_work_bound(self) -> float | None: ...


class Saves(Protocol):
    """The trainer's saves (`saving.Saving`)."""

    def note_steps(self) -> bool: ...

    @property
    def complete(self) -> bool: ...


class CheckpointedTrainer(Protocol):
    """A transformers Trainer with `CheckpointMixin`, as its parts see it.

    Attributes:
        manager: commits its checkpoints.
        start: the checkpoint whose state training goes on with, None for the beginning.
        asked: how the rows of a step are to be shared out; `args.batch` is how it is done.
        resharded: what was done to give the state of `start` to these processes, or None.
        evaluation_due_at: the newest step with an evaluation, None before the first.
        preempted: why training stopped before its end, None when it did not.
        sources, renamed, counts: `training` and `evaluation`: where the rows come from, how columns
            of other names were understood, and what became of them when they were made into tokens.
        rows: which rows the steps have.
        settings: what a resume compares.
        is_without_rows: all rows of the step that is computed are left out.
    """

    # Of transformers.
    args: Any
    model: Any
    model_wrapped: Any
    deepspeed: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    callback_handler: Any
    state: Any
    control: Any
    is_in_train: bool
    train_dataset: Any
    eval_dataset: Any
    current_gradient_accumulation_steps: int

    @property
    def is_deepspeed_enabled(self) -> bool: ...

    def add_callback(self, callback: Any) -> None: ...

    def save_model(self, output_dir: str, _internal_call: bool) -> None: ...

    def store_flos(self) -> None: ...

    def _save_checkpoint(self, model: Any, trial: Any) -> None: ...

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None: ...

    def _load_scaler(self, checkpoint: str) -> None: ...

    # Of CheckpointMixin.
    manager: CheckpointManager
    start: Checkpoint | None
    asked: Batch
    resharded: Resharded | None
    evaluation_due_at: int | None
    preempted: str | None
    sources: Mapping[str, str]
    renamed: Mapping[str, str]
    counts: Mapping[str, Count]
    rows: RowPlan
    settings: Mapping[str, Any]
    is_without_rows: bool

    @property
    def contents(self) -> CheckpointContents: ...

    @property
    def every_step(self) -> StepHook: ...

    @property
    def saving(self) -> Saves: ...

    @property
    def last_saved(self) -> Saved | None: ...

    @property
    def is_evaluated(self) -> bool: ...

    @property
    def try_again(self) -> bool: ...

    def describe(self) -> Manifest: ...

    def stores_weights(self) -> bool: ...

    def saved_step(self) -> int | None: ...

    def saves_on_its_way(self) -> bool: ...

    def hear(self) -> None: ...

    def tell_committed(self, checkpoint: Checkpoint) -> None: ...

    def planned_steps(self) -> int: ...

    def parameter_counts(self) -> tuple[int, int]: ...

    def tokens_seen(self) -> int: ...

    def remarks(self) -> Sequence[str]: ...

    def load_weights_as_stock(self, checkpoint: str) -> None: ...

    def pass_without_effect(self, batch: Any) -> None: ...

    def rows_of(self, step: int, cells: Mapping[int, Sequence[int]] | None) -> list[int]: ...

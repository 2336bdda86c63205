"""Sequences that several processes share (DeepSpeed's ALST/Ulysses), of rows that the run deals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from keepstep.preflight.sequences import check_attention
from keepstep.ranks import collectives
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.trainer.dealing import IGNORED
from keepstep.trainer.mixin import CheckpointMixin

PADDING = {"labels": IGNORED}  # of all else 0


class SequenceMixin(CheckpointMixin):
    """Neighboring processes are given the same rows, and each computes a part of their tokens;
    attention alone is exchanged (`UlyssesSPAttentionHF`, deepspeed 0.19.8).

    For all else a part is a batch like any other: its loss is a sum over its labels, divided by
    their number in the whole step. So Accelerate's word of it (`parallelism_config`) counts while
    the engine is built, and not where Trainer and SFTTrainer take other ways for it: there a step
    has other rows, a micro-batch's loss is a mean of its own, and loaders exchange rows
    (`UlyssesSPDataLoaderAdapter`), which gloo does not do for rows of two lengths.

    Evaluations share out rows, not sequences, as Accelerate has it: each process has whole ones.

    Overridden (transformers 5.18 to 5.24): `_prepare_for_training`.
    """

    shares_sequences = True
    sequences: Any = None  # Accelerate's ParallelismConfig, where sequences are shared

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.sequence_size == 1:
            return
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            what = "rows with images, and a data_collator of one's own"
            raise ConfigError([_refused(what)])
        if self.aux_loss_enabled:
            raise ConfigError([_refused("a router's loss (router_aux_loss_coef)")])
        if faults := list(check_attention(self.model.config, self.args.sequence_size)):
            raise ConfigError(faults)
        state = self.accelerator.state
        self.sequences, state.parallelism_config = state.parallelism_config, None
        if self.sequences is None:
            raise ConfigError([_refused("a second trainer in one process")])
        # Which Accelerate counts a step's rows by: else somebody would have to write it down.
        self.sequences.dp_shard_size = 1
        self.sequences.dp_replicate_size = self.args.world_size // self.args.sequence_size
        self.model_accepts_loss_kwargs = True  # Trainer has said no, because of them

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._told_of_sequences():
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self.sequences is not None:
            # Stages 1 and 2, and one of stage 3's two ways, multiply gradients by it, the other
            # does not (deepspeed 0.19.8). The loss is multiplied by the number of processes, and
            # what they sum is divided by it.
            self.model_wrapped.optimizer.sequence_parallel_size = 1
        return prepared

    @contextlib.contextmanager
    def _told_of_sequences(self) -> Iterator[None]:
        accelerator: Any = self.accelerator
        if self.sequences is None:
            yield
            return
        # Which Accelerate (1.15) does for ZeRO-3 alone, and Ulysses asks for.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        accelerator.state.parallelism_config = self.sequences
        accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader
        try:
            yield
        finally:
            accelerator.state.parallelism_config = None
            del accelerator.deepspeed_ulysses_dl_adapter

    def _taken(self, batch: Any) -> Any:
        inputs = super()._taken(batch)
        if self.sequences is None:
            return inputs
        size, rows = self.args.sequence_size, self.args.per_device_train_batch_size
        return part_of(inputs, collectives.rank() % size, size, rows)


def part_of(inputs: dict[str, Any], place: int, size: int, rows: int) -> dict[str, Any]:
    """One process's part of a micro-batch: as many tokens of each row as the others have.

    Args:
        inputs: what the collator gives.
        place: of the process among those that share the rows.
        size: how many they are.
        rows: that the attention is made for: others are added, of which nothing is learned.
    """
    given, length = inputs["input_ids"].shape
    share = math.ceil(length / size)
    here = slice(place * share, (place + 1) * share)
    whole = {}
    for name, value in inputs.items():
        whole[name] = value.new_full((rows, share * size), PADDING.get(name, 0))
        whole[name][:given, :length] = value
    whole["position_ids"] = torch.arange(share * size).expand(rows, -1)
    labels = whole["labels"]  # which are asked for, to be counted; what counts is beside it
    whole["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return {name: value[:, here].contiguous() for name, value in whole.items()}


def _refused(what: str) -> Problem:
    told = f"{what}: not with sequence parallelism (sp_size)"
    return Problem(told, "a launch without it", "launch")

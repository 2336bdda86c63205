"""Gives a checkpoint's state back to the Trainer, whichever processes wrote it.

The counterpart of contents.py. A checkpoint of the same layout goes through DeepSpeed's (or
torch's) own loader as it is; any other is resharded on the way (checkpoint/reshard.py).
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from keepstep.policy.metric import in_full
from keepstep.ranks import collectives
from keepstep.ranks.collectives import on_all
from keepstep.run_folder.reader import Checkpoint
from keepstep.sharding.flat_buffers import LayoutError
from keepstep.sharding.reshard import fits, load_shard, restore_torch, shard_for
from keepstep.sharding.shards import zero_source
from keepstep.sharding.sources import (
    NAMES_FILE,
    ReshardError,
    Source,
    TorchSource,
    stored_optimizer,
)
from keepstep.trainer.protocol import CheckpointedTrainer
from keepstep.trainer.resharded import Resharded


def restore(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> Resharded | None:
    """Load weights, optimizer, scheduler and loss scaler. Ranks: all (collective).

    Returns: what was resharded; None when this attempt's processes can load it as it is.

    Raises:
        ReshardError: on every rank: the state cannot be given to these processes. What else one
            rank meets, as an OSError, is everybody's, too.
    """
    started = time.perf_counter()
    engine = trainer.contents.engine
    before, now = checkpoint.manifest.parallel_layout, trainer.args.parallel_layout
    if now.is_sharded and not before.is_sharded:
        trainer.contents.plan()  # collective: which weight of the file is which of the model
    source = on_all("opening the checkpoint", lambda: _foreign_source(trainer, checkpoint))
    if all(collectives.any_of(source is None, source is not None)):
        raise ReshardError(f"{checkpoint.path.name} is not the same for every rank")
    if source is None and engine is not None:
        _load_shards_as_they_are(trainer, checkpoint)
    elif source is None and trainer.is_deepspeed_enabled:
        on_all("loading the weights", lambda: trainer.load_weights_as_stock(str(checkpoint.path)))
    elif source is not None and engine is not None:
        shard = on_all("resharding", lambda: shard_for(engine, source))
        load_shard(engine, shard, source.counters)
    elif source is not None:
        optimizer = trainer.contents.optimizer()
        assert optimizer is not None  # the Trainer has made it
        on_all("resharding", lambda: restore_torch(trainer.model, optimizer, source))
    on_all("loading the schedule", lambda: _load_schedule(trainer, checkpoint, source))
    if source is None:
        return None
    seconds = time.perf_counter() - started
    reports = collectives.gather((source.bytes_read, seconds))
    return Resharded(
        step=checkpoint.step,
        before=before,
        now=now,
        bytes=sum(count for count, _ in reports),
        seconds=round(max(seconds for _, seconds in reports), 4),
    )


def _foreign_source(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> Source | None:
    """What the checkpoint holds; None when these processes can load it as it is. Ranks: any."""
    before, now = checkpoint.manifest.parallel_layout, trainer.args.parallel_layout
    if not before.is_sharded:
        # Unsharded here, too, it is whole on every rank, however many there are.
        return _torch_source(trainer, checkpoint) if now.is_sharded else None
    same = before == now
    try:
        source = zero_source(checkpoint.path)
        if source is None:
            raise ReshardError(f"{checkpoint.path.name} holds no shards of DeepSpeed")
        return None if same and fits(trainer.deepspeed, source) else source
    except (ReshardError, LayoutError, KeyError, AttributeError):
        if not same:
            raise
        return None  # of a kind that DeepSpeed knows, and the resharder does not


def _torch_source(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> TorchSource:
    names = checkpoint.path / NAMES_FILE
    groups = json.loads(names.read_text()) if names.is_file() else trainer.contents.group_names()
    weights = trainer.contents.stored_names()
    return TorchSource(checkpoint.path, groups, weights, checkpoint.step)


def _load_shards_as_they_are(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> None:
    """As `Trainer._prepare_for_training` resumes. Ranks: all (collective)."""
    strict = not isinstance(trainer.model, PeftModel)
    deepspeed_load_checkpoint(trainer.deepspeed, str(checkpoint.path), load_module_strict=strict)
    if trainer.args.zero_stage in (1, 2):  # 16-bit weights are not stored beside the masters
        trainer.deepspeed.optimizer.update_lp_params()


def _load_schedule(
    trainer: CheckpointedTrainer, checkpoint: Checkpoint, source: Source | None
) -> None:
    """The scheduler; where nothing is sharded loss scaler and, as it is, optimizer. Ranks: any."""
    schedule, scaler = trainer.lr_scheduler, trainer.accelerator.scaler
    if scaler is not None:  # DeepSpeed has one of its own
        trainer._load_scaler(str(checkpoint.path))
    if source is None and trainer.contents.engine is not None:
        trainer._load_optimizer_and_scheduler(str(checkpoint.path))
    else:
        if source is None:
            _load_optimizer(trainer, checkpoint)
        stored = torch.load(checkpoint.path / "scheduler.pt", weights_only=True)
        groups = len(schedule.optimizer.param_groups)
        schedule.load_state_dict(schedule_for(groups, stored))
    if source is not None and source.loss_scale is not None and scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": source.loss_scale})
    stored_settings, args = checkpoint.manifest.settings, trainer.args
    before = stored_settings.get("learning_rate")
    if before and before != args.learning_rate:
        _rescale(schedule, args.learning_rate / before)
    if ranked_otherwise(stored_settings, args):
        schedule._reset()  # of a plateau or a greedy one: its best value was of another metric


def ranked_otherwise(stored: Mapping[str, Any], args: Any) -> bool:
    """Whether another metric ranks than when these settings were stored: as the recipe had it,
    where a Trainer's `args` have its full name."""
    metric, greater = args.metric_for_best_model, args.greater_is_better
    before = stored.get("metric_for_best_model", metric)
    full = [None if name is None else in_full(name) for name in (before, metric)]
    return full[0] != full[1] or stored.get("greater_is_better", greater) != greater


def _load_optimizer(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> None:
    """torch's optimizer, whole on every rank, from what DDP or DeepSpeed's stage 0 has written."""
    optimizer = trainer.contents.optimizer()
    assert optimizer is not None  # the Trainer has made it
    stored = copy.deepcopy(stored_optimizer(checkpoint.path))  # out of the mapped file
    groups = iter([group for group in stored["param_groups"] if group["params"]])
    live = optimizer.state_dict()["param_groups"]  # DeepSpeed drops groups that are empty
    stored["param_groups"] = [next(groups) if group["params"] else group for group in live]
    optimizer.load_state_dict(stored)
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.global_steps = checkpoint.step


def random_numbers() -> list[Any]:
    """The states of this process's generators, and of its device's. Ranks: any."""
    on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.get_rng_state() if on_device else None
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), device]


def set_random_numbers(states: list[Any]) -> None:
    """What `random_numbers` gave. Ranks: any."""
    numbers, arrays, tensors, device = states
    random.setstate(numbers)
    np.random.set_state(arrays)
    torch.set_rng_state(tensors)
    if device is not None:
        torch.cuda.set_rng_state(device)


@contextlib.contextmanager
def random_numbers_apart() -> Iterator[None]:
    """What is drawn within leaves this rank's random numbers as they were. Ranks: any."""
    states = random_numbers()
    try:
        yield
    finally:
        set_random_numbers(states)


def settle_gradients(trainer: CheckpointedTrainer, batches: Iterable[Any]) -> None:
    """A backward pass that nothing comes of, so that the next is like those of the run before it.

    DDP lays its gradients out anew after the first pass of a process's life, and with that changes
    in which order three of them are summed (torch 2.13, `Reducer::rebuild_buckets`; two commute).
    Before the RNG states are restored. Ranks: all (collective).
    """
    model = trainer.model_wrapped
    if not isinstance(model, DistributedDataParallel) or trainer.args.world_size < 3:
        return
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    batch = next(iter(batches))
    trainer.pass_without_effect(getattr(batch, "inputs", batch))  # of a stream, it holds more
    model.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)


def _rescale(schedule: Any, factor: float) -> None:
    """A changed learning rate that was accepted: without this, the stored one would go on."""
    for name in ("base_lrs", "_last_lr"):
        rates = getattr(schedule, name, [])  # a plateau's schedule has no base
        setattr(schedule, name, [rate * factor for rate in rates])
    for group in schedule.optimizer.param_groups:
        for name in {"lr", "initial_lr"} & group.keys():
            group[name] *= factor


def schedule_for(groups: int, stored: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state for as many parameter groups: DeepSpeed drops those that are empty.

    Raises:
        ReshardError: the groups' schedules differ, so that it is not known which is whose.
    """
    state = dict(stored)
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        values = state.get(name)
        if values is None or len(values) == groups:
            continue
        if any(value != values[0] for value in values):
            raise ReshardError(f"{len(values)} parameter groups of different schedules are stored")
        state[name] = values[:1] * groups
    return state

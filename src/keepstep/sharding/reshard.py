"""Gives a run's state to other processes than wrote it: another number, or another ZeRO stage.

Each rank copies just the slices that it owns out of the stored files into a shard of its own
layout, by parameter name, and hands that to DeepSpeed's own loader: no file is written, nothing is
gathered. Masters are filled in place, so that a rank needs no memory beyond its own state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
import xxhash

from keepstep.ranks import collectives
from keepstep.sharding.flat_buffers import flats, groups, is_stage3, masters, slices
from keepstep.sharding.shards import UniversalSource
from keepstep.sharding.sources import MASTER, ReshardError, Source, copy_slice

# Of what optimizers these are the state: step, exp_avg, exp_avg_sq.
TESTED = ("Adam", "AdamW", "DeepSpeedCPUAdam")
# How an optimizer computes, not what: those of the live one stay.
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable", "params")


def rng_seed(seed: int, step: int, rank: int) -> int:
    """What a rank's random generators are seeded with after a change of the number of processes:
    then no rank has a stream of its own to go on with."""
    return int(xxhash.xxh32_intdigest(f"{seed} {step} {rank}".encode()))


def fits(engine: Any, source: Source) -> bool:
    """Whether this rank's stored shard is laid out as the engine's: DeepSpeed can load it as it is.

    (Sub-groups depend on sizes in DeepSpeed's configuration, the optimizer's state on offloading.)
    """
    names = [[engine.param_names[p] for p in group] for group in groups(engine)]
    if names != source.groups or isinstance(source, UniversalSource):
        return False
    first = next((name for group in names for name in group), None)
    if first is None or not source.moments:
        return True
    counts = isinstance(source.step(first), int)
    return counts == _counts_with_int(engine.optimizer.optimizer)


def shard_for(engine: Any, source: Source) -> dict[str, Any]:
    """This rank's shard for `load_shard`; masters, frozen parameters and buffers are filled in
    place. Ranks: any, each for itself; all have to.

    Raises:
        ReshardError: the state is not of this model, or of an optimizer that was not tested.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False) or getattr(engine, "has_moe_layers", False):
        raise ReshardError("an optimizer swapped to NVMe, mixture of experts: not supported")
    if engine.lr_scheduler is not None:
        raise ReshardError(
            "a scheduler of DeepSpeed's configuration is not supported; set lr_scheduler_type"
        )
    _check_optimizer(optimizer.optimizer)
    names = [[engine.param_names[p] for p in group] for group in groups(engine)]
    _check(source, {engine.param_names[p]: _elements(p) for g in groups(engine) for p in g})
    if is_stage3(engine):
        optimizer.checkpoint_event_prologue()  # every parameter partitioned
    _restore_module(engine.module, source)
    base = _base_state(engine, source, names)
    shard = {
        "loss_scaler": _scaler(source, optimizer.loss_scaler),
        "dynamic_loss_scale": optimizer.dynamic_loss_scale,
        "overflow": False,
    }
    if is_stage3(engine):
        return shard | {"optimizer_state_dict": base, "fp32_flat_groups": flats(engine)}
    if collectives.is_gloo():
        for parameter, name in engine.param_names.items():
            if name in source.sizes:
                _fill(source, name, MASTER, parameter.data)
    return shard | {
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": masters(engine),
        "clip_grad": optimizer.clip_grad,
        "group_paddings": optimizer.groups_padding,
        "param_alignment_paddings": optimizer.round_robin_bit16_padding,
        "ds_version": version("deepspeed"),
    }


def load_shard(engine: Any, shard: dict[str, Any], counters: dict[str, int]) -> None:
    """Have DeepSpeed load its shard, as if it had come from a file. Ranks: all (collective)."""
    optimizer = engine.optimizer
    shards = [shard if r == collectives.rank() else None for r in range(collectives.world_size())]
    optimizer.load_state_dict(shards, load_optimizer_states=True, load_from_fp32_weights=True)
    if is_stage3(engine):
        optimizer.checkpoint_event_epilogue()
    elif not collectives.is_gloo():
        # The 16-bit parameters, whole on every rank, from the masters; on CPU each rank has read
        # them for itself: gloo gathers ten times slower than a mapped file is read.
        optimizer.update_lp_params()
    for name, count in counters.items():
        setattr(engine, name, count)


def restore_torch(model: Any, optimizer: torch.optim.Optimizer, source: Source) -> None:
    """Load a model and torch's optimizer, whole on every rank, from `source`. Ranks: any.

    Raises:
        ReshardError: as `shard_for`.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    _check(source, {names[p]: p.numel() for p in trained})
    _check_optimizer(optimizer)
    halves = [names[p] for p in trained if p.dtype != torch.float32]
    if halves and source.stage:
        raise ReshardError(
            "without DeepSpeed, parameters of half precision have no fp32 masters: launch with a "
            "ZeRO config (on one process, too), or with dtype: float32"
        )
    _restore_module(model, source)
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(trained):
        name = names[parameter]
        _fill(source, name, MASTER, parameter.data)
        if source.moments:
            state[number] = {"step": _step(source, [name], optimizer)}
        for key in source.moments:
            state[number][key] = torch.empty_like(parameter.data)
            _fill(source, name, key, state[number][key])
    settings = _settings(
        source,
        optimizer.state_dict()["param_groups"],
        [[names[p] for p in group["params"]] for group in optimizer.param_groups],
    )
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def _base_state(engine: Any, source: Source, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Fill the masters; the wrapped optimizer's state dict, as its `load_state_dict` wants it."""
    optimizer = engine.optimizer
    fp32, whole = masters(engine), flats(engine)
    moments = [{key: torch.zeros_like(flat.data) for key in source.moments} for flat in whole]
    for parameter, begin, group, first, count in slices(
        engine, collectives.rank(), collectives.world_size()
    ):
        name = engine.param_names[parameter]
        for key, flat in [(MASTER, fp32[group].data), *moments[group].items()]:
            if count:
                copy_slice(source, source.pieces(name, key), begin, flat[first:][:count])
    if is_stage3(engine):
        optimizer._set_fp32_optimizer_param_groups()
        live = optimizer.optimizer.state_dict()["param_groups"]
        optimizer._clear_fp32_optimizer_param_groups()
    else:
        live = optimizer.optimizer.state_dict()["param_groups"]
    # Buffers are numbered as they come, group by group.
    members = [[n for i in group["params"] for n in names[i]] for group in live]
    state = {
        i: {"step": _step(source, names[i], optimizer.optimizer), **moments[i]}
        for i in range(len(whole))
        if source.moments
    }
    return {"state": state, "param_groups": _settings(source, live, members)}


def _settings(
    source: Source, live: Iterable[dict[str, Any]], members: Iterable[Sequence[str]]
) -> list[dict[str, Any]]:
    """The live parameter groups with the stored hyper-parameters of their members."""
    result = []
    for group, names in zip(live, members, strict=True):
        stored = [
            {
                key: value
                for key, value in source.settings(name).items()
                if key in group and key not in IMPLEMENTATION
            }
            for name in names
        ]
        if any(settings != stored[0] for settings in stored):
            raise ReshardError("parameters of one group were stored with different settings")
        result.append(group | (stored[0] if stored else {}))
    return result


def _restore_module(module: Any, source: Source) -> None:
    """Buffers, and parameters that are not trained, as far as they are stored."""
    for name, buffer in module.named_buffers():
        if name in source.buffers:
            buffer.data.copy_(source.buffers[name])
    for name, parameter in module.named_parameters():
        pieces = None if parameter.requires_grad else list(source.frozen(name))
        if not pieces:
            continue
        if not hasattr(parameter, "ds_tensor"):
            copy_slice(source, iter(pieces), 0, parameter.data.view(-1))
            continue
        if not parameter.ds_tensor.is_floating_point():
            raise ReshardError(f"{name} is frozen and quantized: not supported")
        size = parameter.ds_tensor.ds_numel
        begin = collectives.rank() * size
        count = max(0, min(size, parameter.ds_numel - begin))
        if count:
            copy_slice(source, iter(pieces), begin, parameter.ds_tensor.data[:count])


def _fill(source: Source, name: str, key: str, out: torch.Tensor) -> None:
    flat = out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype)
    copy_slice(source, source.pieces(name, key), 0, flat)
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


def _check(source: Source, wanted: dict[str, int]) -> None:
    """Every trained parameter is there, in its size, and no other."""
    for name in sorted(wanted.keys() ^ source.sizes.keys()):
        where = "the checkpoint" if name in source.sizes else "this model"
        raise ReshardError(f"{name} is trained in {where} only")
    for name, elements in wanted.items():
        if source.sizes[name] != elements:
            raise ReshardError(f"{name} has {elements} elements, {source.sizes[name]} are stored")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    if kind not in TESTED:
        raise ReshardError(f"{kind} has not been tested; these have: {', '.join(TESTED)}")


def _elements(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _counts_with_int(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps its step as a plain number, where torch's keep a tensor."""
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def _step(source: Source, names: Sequence[str], optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's steps with these parameters, in the form that it keeps them."""
    steps = {float(source.step(name)) for name in names}
    if len(steps) > 1:
        raise ReshardError(f"parameters of one group were stored with different steps: {steps}")
    (step,) = steps
    return int(step) if _counts_with_int(optimizer) else torch.tensor(step)


def _scaler(source: Source, live: Any) -> Any:
    """The stored loss scaler, if it is of the live one's kind; at least its scale (fp16)."""
    if type(source.scaler) is type(live):
        return source.scaler
    if live.dynamic and source.loss_scale is not None:
        live.cur_scale = source.loss_scale
    return live

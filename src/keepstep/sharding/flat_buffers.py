"""Where each parameter lies in this rank's flat buffers, as DeepSpeed's ZeRO shares them out.

Layouts (deepspeed 0.19.8): stage 3 (zero/stage3.py) cuts every parameter into `world_size` slices
of ceil(n / world_size) elements, one after the other in each sub-group's flat buffer; stages 1 and
2 (zero/stage_1_and_2.py) lay a group's parameters out in one flat buffer, cut into equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from keepstep.errors import KeepstepError


class LayoutError(KeepstepError, ValueError):
    """Parameters that are shared out or stored in a way that keepstep does not know."""


class Slice(NamedTuple):
    """`elements` of `parameter` from `begin`: those of `group`'s flat buffer from `first`."""

    parameter: torch.nn.Parameter
    begin: int
    group: int
    first: int
    elements: int


def is_stage3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def flats(engine: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 masters, one per parameter group or sub-group, padding included.

    Raises:
        LayoutError: the optimizer is none of DeepSpeed's ZeRO-1, 2 or 3.
    """
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise LayoutError(f"{type(optimizer).__name__} keeps no fp32 masters that keepstep knows")


def masters(engine: Any) -> list[torch.Tensor]:
    """The same without padding. Raises: LayoutError."""
    found = flats(engine)
    paddings = [0] * len(found) if is_stage3(engine) else engine.optimizer.groups_padding
    return [f[: f.numel() - padding] for f, padding in zip(found, paddings, strict=True)]


def groups(engine: Any) -> list[list[torch.nn.Parameter]]:
    """The trained parameters of each flat buffer, in their order in it."""
    optimizer = engine.optimizer
    found = optimizer.fp16_groups if is_stage3(engine) else optimizer.round_robin_bit16_groups
    return [list(group) for group in found]


def slices(engine: Any, rank: int, world_size: int) -> Iterator[Slice]:
    """What a rank has of every trained parameter (0 elements: nothing).

    Raises:
        LayoutError: see `masters`; or parameters are shared out among a part of the ranks.
    """
    return (_stage3 if is_stage3(engine) else _stage12)(engine, rank, world_size)


def _stage3(engine: Any, rank: int, world_size: int) -> Iterator[Slice]:
    for i, (group, flat) in enumerate(zip(groups(engine), masters(engine), strict=True)):
        position = 0
        for parameter in group:
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            total = parameter.ds_numel  # type: ignore[attr-defined]
            if size != -(-total // world_size):
                raise LayoutError("parameters are partitioned among a part of the ranks")
            begin = rank * size
            yield Slice(parameter, begin, i, position, max(0, min(size, total - begin)))
            position += size
        if position != flat.numel():
            raise LayoutError("the fp32 masters are not in host or device memory")


def _stage12(engine: Any, rank: int, world_size: int) -> Iterator[Slice]:
    optimizer, offsets = engine.optimizer, engine.optimizer.round_robin_bit16_offsets
    for i, (group, flat) in enumerate(zip(groups(engine), masters(engine), strict=True)):
        size = optimizer.partition_size[i]
        if size * world_size != len(optimizer.bit16_groups_flat[i]):
            raise LayoutError("parameters are partitioned among a part of the ranks")
        low, high = rank * size, rank * size + flat.numel()
        for parameter, offset in zip(group, offsets[i], strict=True):
            begin, end = max(low, offset), min(high, offset + parameter.numel())
            yield Slice(parameter, begin - offset, i, begin - low, max(0, end - begin))

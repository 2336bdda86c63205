"""A file that several ranks write together, each its own extents: is it whole, and its digest.

The weights in Hugging Face layout are such a file. No rank has seen all of it, so the main process
reads it back once: every rank's extents must hold what that rank had in memory, and together they
must cover the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from keepstep.errors import KeepstepError
from keepstep.run_folder.files import read_blocks


@dataclass(frozen=True)
class Share:
    """What one rank wrote of a joint file.

    Attributes:
        size: bytes of the whole file.
        extents: (offset, bytes), rising, not touching.
        xxh3_128: digest of the extents' contents, one after the other, in hex.
    """

    size: int
    extents: tuple[tuple[int, int], ...]
    xxh3_128: str


class JointError(KeepstepError, OSError):
    """The file does not hold what the ranks say they wrote."""


def merged(extents: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Extents (offset, bytes) in rising order, those that touch made one."""
    result: list[tuple[int, int]] = []
    for offset, size in extents:
        if result and sum(result[-1]) == offset:
            result[-1] = (result[-1][0], result[-1][1] + size)
        elif size:
            result.append((offset, size))
    return tuple(result)


def digest_of_joint(path: Path, shares: Mapping[int, Share]) -> str:
    """xxh3-128 of the whole file, once every rank's share (by rank) has been found in it.

    Raises:
        JointError: a gap, an overlap, or content that is not what a rank wrote.
    """
    size, *others = {share.size for share in shares.values()}
    if others:
        raise JointError(f"{path.name}: the ranks do not agree on its size", path=path)
    pieces = sorted((*extent, rank) for rank, share in shares.items() for extent in share.extents)
    position = 0
    for offset, length, rank in pieces:
        if offset != position:
            raise JointError(
                f"{path.name}: rank {rank} wrote at byte {offset}, not {position}",
                path=path,
                ranks=(rank,),
            )
        position += length
    if position != size or path.stat().st_size != size:
        raise JointError(f"{path.name}: {position} of {size} bytes were written", path=path)
    if len(pieces) == 1:
        return shares[pieces[0][2]].xxh3_128  # one writer has seen the whole file
    whole, of_rank = xxhash.xxh3_128(), {rank: xxhash.xxh3_128() for rank in shares}
    remaining = [(length, rank) for _, length, rank in reversed(pieces)]
    for block in read_blocks(path):
        whole.update(block)
        while block.nbytes and remaining:
            length, rank = remaining.pop()
            of_rank[rank].update(block[:length])
            if length > block.nbytes:
                remaining.append((length - block.nbytes, rank))
            block = block[length:]
    for rank, share in shares.items():
        if of_rank[rank].hexdigest() != share.xxh3_128:
            raise JointError(
                f"{path.name} does not hold what rank {rank} wrote", path=path, ranks=(rank,)
            )
    return str(whole.hexdigest())

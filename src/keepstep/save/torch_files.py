"""Standard torch files, made without holding them up by a copy or by the disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.serialization import config

from keepstep.run_folder.files import BLOCK, DigestingFile

Memory = tuple[int, int, torch.dtype, tuple[int, ...]]

# Laid out so that O_DIRECT can write the tensors. The digest in the manifest does what the
# checksums inside of the zip file would do, at thirty times their speed.
FILE_LAYOUT = {"save.storage_alignment": BLOCK, "save.compute_crc32": False}


class Recorder:
    """Stands in for the file that torch.save writes to: notes instead of writing.

    What comes from a snapshot is noted as a reference (its content may not have been copied yet);
    everything else, the pickled objects among it, is taken as it is now.
    """

    def __init__(self) -> None:
        self._contents: list[bytes | memoryview] = []
        self._snapshots: dict[int, memoryview] = {}

    def expect(self, tensor: torch.Tensor) -> None:
        self._snapshots[tensor.data_ptr()] = bytes_of(tensor)

    def write(self, data: memoryview) -> int:
        view = memoryview(data).cast("B")
        address = np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0
        known = self._snapshots.get(address)
        if known is not None and known.nbytes != view.nbytes:
            raise RuntimeError("torch.save writes a storage in another way than was tested")
        self._contents.append(bytes(view) if known is None else known)
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def replay(self, file: DigestingFile) -> None:
        for content in self._contents:
            file.write(content)


class Nowhere:
    """A file that keeps nothing: whether torch.save can store something."""

    def write(self, data: memoryview) -> int:
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""


def with_tensors(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure of dicts, lists and tuples, with every tensor changed.

    An empty one is made anew: it may be what is left of a larger storage.
    """
    if type(state) in (torch.Tensor, torch.nn.Parameter):  # others have an inner life: torch's own
        return change(state) if state.numel() else torch.empty(state.shape, dtype=state.dtype)
    if isinstance(state, dict):
        changed = copy.copy(state)
        changed.update((name, with_tensors(value, change)) for name, value in state.items())
        return changed
    if type(state) in (list, tuple):
        return type(state)(with_tensors(value, change) for value in state)
    return state


def owned(state: Any) -> Any:
    """The same state, every tensor with a storage of its own: torch.save stores whole storages.

    Tensors of the same memory share one, as they do in a snapshot.
    """
    known: dict[Memory, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        key = memory_of(tensor)
        if key not in known:
            known[key] = _with_own_storage(tensor.detach().contiguous())
        return known[key].view(tensor.shape)

    return with_tensors(state, own)


def memory_of(tensor: torch.Tensor) -> Memory:
    """What makes two tensors the same elements, in the same order."""
    order = () if tensor.is_contiguous() else tensor.stride()
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, order


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, on whichever device, seen as a storage that ends where the tensor ends."""
    whole: torch.Tensor = torch.utils.dlpack.from_dlpack(tensor.reshape(-1).view(torch.uint8))
    return whole.view(tensor.dtype)


def torch_save(state: object, file: DigestingFile | Recorder | Nowhere) -> None:
    with config.patch(**FILE_LAYOUT):  # type: ignore[attr-defined]
        torch.save(state, file)  # type: ignore[arg-type]  # needs only write() and flush()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous host tensor's memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]

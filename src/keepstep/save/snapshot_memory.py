"""Host memory for a snapshot: allocated and touched once, filled again at every save.

Copying into memory that is there already runs at memory speed; fresh pages cost ten times as much.
On CUDA the memory is pinned and the copies run on a stream of their own.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from keepstep.run_folder.files import BLOCK, CHUNK

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
TOUCHED_AT_ONCE = 1 << 26  # bytes: a fraction of a second, for whoever waits for the end of it


class Arena:
    """One rank's snapshot memory. Between `start()` and the end of that save it must stay as it is.

    Attributes:
        size: bytes.
        used: bytes of it that the newest snapshot takes.
        bounce: page-aligned, for pieces that are cast on their way to the disk.
        copied: set once nothing is pending any more (copied, or given up).
    """

    def __init__(self, size: int) -> None:
        self.size = max(-(-size // BLOCK) * BLOCK, BLOCK)
        self._memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a fork would make every write a copy
            with contextlib.suppress(AttributeError, OSError):
                self._memory.madvise(getattr(mmap, advice))
        self.bounce = aligned(CHUNK + BLOCK)
        self.used = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Where training is on CPU, a GPU that is there is left alone.
        on_device = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if on_device else None
        self._stream: torch.cuda.Stream | None = None
        self._device_copy: torch.cuda.Event | None = None
        self._host_copy = False
        self.copied = threading.Event()
        self.copied.set()
        self._closed = False
        self._unpin: weakref.finalize[[int], Arena] | None = None
        self._warm = threading.Thread(target=self._touch, daemon=True, name="keepstep-arena")
        self._warm.start()

    def close(self) -> None:
        """Nobody takes a snapshot any more. Python aborts (SIGABRT) when it ends while a thread is
        inside of torch, as that which touches the memory may be where no step was made.

        The memory is pinned no longer: where it is freed and mapped anew, at the same address, the
        device would go on copying into the pages that were there before.
        """
        self._closed = True
        self._warm.join()
        if self._device_copy is not None and not self.copied.is_set():
            self._device_copy.synchronize()  # else a writer has waited for it
        if self._unpin is not None:
            self._unpin()

    def start(self) -> None:
        """Forget the snapshot before this one."""
        self._warm.join()
        self.used = 0
        self._pending = []
        self._device_copy, self._host_copy = None, False
        self.copied.clear()

    def put(self, tensor: torch.Tensor, deferred: bool) -> torch.Tensor:
        """A place of its own for this tensor: contiguous, in host memory.

        Its content is copied now or, `deferred`, by `copy()`.
        """
        size = tensor.nbytes
        begin, end = self.used, self.used + size
        if size == 0 or end > self.size:  # cold memory: slower, as right
            place = _fresh(tensor)
        else:
            self.used = -(-end // BLOCK) * BLOCK
            place = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=begin)
            place = place.view(tensor.dtype).view(tensor.shape)
        if deferred:
            self._pending.append((place, tensor.detach()))
            self._host_copy = self._host_copy or not tensor.is_cuda
        else:
            place.copy_(tensor.detach())
        return place

    def begin_copy(self) -> None:
        """On CUDA: queue what is pending behind the work that makes it. Elsewhere: nothing."""
        on_device = [pair for pair in self._pending if pair[1].is_cuda]
        self._pending = [pair for pair in self._pending if not pair[1].is_cuda]
        if on_device:
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for place, source in on_device:
                    place.copy_(source, non_blocking=True)
                self._device_copy = self._stream.record_event()

    def copy(self) -> None:
        """Copy what is pending, or wait until the device has. Any one thread."""
        try:
            for place, source in self._pending:
                place.copy_(source)
            if self._device_copy is not None and self._device is not None:
                torch.cuda.set_device(self._device)  # this may be a thread that has none yet
                self._device_copy.synchronize()
        finally:
            self._pending = []
            self.copied.set()

    def hold(self) -> None:
        """Before what is pending changes: wait for its copy.

        For what the device copies, the device waits; the host goes on.
        """
        if self._device_copy is not None:
            torch.cuda.current_stream().wait_event(self._device_copy)
        if self._host_copy:
            self.copied.wait()

    def _touch(self) -> None:
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        for begin in range(0, self.size, TOUCHED_AT_ONCE):
            if self._closed:
                return
            whole[begin : begin + TOUCHED_AT_ONCE].zero_()
        self.bounce.zero_()
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a new thread would make a context on the first
            # Registered, not torch's pinned allocator, which rounds up to powers of two.
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            error = int(runtime.cudaHostRegister(whole.data_ptr(), self.size, 0))
            if error:
                logger.warning("snapshot memory is not pinned (CUDA error %s)", error)
            else:
                self._unpin = weakref.finalize(self, _unregister, whole.data_ptr())
                self._unpin.atexit = False  # the process's end frees it, too


def _unregister(address: int) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostUnregister(address))
    if error:
        logger.warning("snapshot memory stays pinned (CUDA error %s)", error)


def _fresh(like: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype)
    except RuntimeError as error:  # torch's word for it
        raise MemoryError(f"{like.nbytes} bytes for a snapshot") from error


def aligned(size: int) -> torch.Tensor:
    """Bytes of host memory that begin at a page, for O_DIRECT."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def free_host_memory() -> int:
    """Bytes that this process can still take: the machine's, or its control group's if less."""
    return min([psutil.virtual_memory().available, *_cgroup_room()])


def _cgroup_room() -> Iterator[int]:
    """What each control group (v2) above this process leaves: Slurm and containers set them."""
    with contextlib.suppress(OSError, ValueError):
        line = Path("/proc/self/cgroup").read_text().splitlines()[-1]
        folder = CGROUP / line.split("::", 1)[-1].lstrip("/")
        while folder.is_relative_to(CGROUP):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = (folder / "memory.stat").read_text().split()
                cache = int(stat[stat.index("inactive_file") + 1])
                yield limit - used + cache
            if folder == CGROUP:
                break
            folder = folder.parent

"""What a launch was measured to do: a callback for any Trainer. It knows nothing of keepstep."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

# What the host waits for: calls of the CUDA runtime, and copies to memory that the host reads next.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPY = "Memcpy DtoH"


@dataclass
class Report:
    """What one launch was measured to do.

    Attributes:
        seconds: of all measured steps together, until the device was done with them.
        steps: how many.
        tokens: that they learnt from.
        allocated: bytes of the device's memory at their height; `reserved`: with torch's cache.
        estimate: what preflight expects for `allocated`.
        matrices: parameters without the input embedding.
        layers, hidden, length: of the model, and tokens of a row.
        waits: by name, how often the host waited for the device in all measured steps.
        first_step: when the first step was done, in seconds since the epoch.
        step_seconds: of each measured step, from end to end as the host sees them.
        cpu_seconds: of the processor, all ranks and measured steps together.
        resident: bytes of host memory that a rank held at its height, its start included.
    """

    arm: str
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    allocated: int = 0
    reserved: int = 0
    estimate: int = 0
    matrices: int = 0
    layers: int = 0
    hidden: int = 0
    length: int = 0
    waits: dict[str, int] = field(default_factory=dict)
    first_step: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    resident: int = 0


def count_waits(names: Iterable[str]) -> dict[str, int]:
    """Of the events of a profile, by name: what waits for the device."""
    counts = dict.fromkeys((*WAITS, COPY), 0)
    for name in names:
        for known in counts:
            counts[known] += name == known or (known == COPY and name.startswith(COPY))
    return counts


def settle() -> None:
    """Wait for the device, so that a clock tells of work that is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Meter(TrainerCallback):
    """Measures steps, from the end of the last warm one to that of the last of all."""

    def __init__(self, report: Report, warm: int, steps: int, count: bool) -> None:
        self.report, self.warm, self.steps, self.count = report, warm, steps, count
        self.trainer: Any = None
        self._began, self._tokens = 0.0, 0
        self._cpu, self._last = 0.0, 0.0
        self._profile: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.report.first_step = time.time()
        if state.global_step > self.warm:
            now = time.perf_counter()
            self.report.step_seconds.append(now - self._last)
            self._last = now
        if state.global_step == self.warm:
            self._begin()
        elif state.global_step == self.warm + self.steps:
            self._end()

    def _begin(self) -> None:
        settle()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if self.count:
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=kinds)
            self._profile.start()
        self._tokens = int(self.trainer._total_train_tokens)
        self._cpu = time.process_time()
        self._began = self._last = time.perf_counter()

    def _end(self) -> None:
        if self._profile is not None:  # before `settle`, which would be counted
            self._profile.stop()
            self.report.waits = count_waits(event.name for event in self._profile.events())
        settle()
        self.report.seconds = time.perf_counter() - self._began
        self.report.cpu_seconds = time.process_time() - self._cpu
        self.report.steps = self.steps
        self.report.tokens = int(self.trainer._total_train_tokens) - self._tokens
        if torch.cuda.is_initialized():
            self.report.allocated = torch.cuda.max_memory_allocated()
            self.report.reserved = torch.cuda.max_memory_reserved()


def finish(report: Report, path: Path) -> None:
    """Put together what each rank has measured, and write it. Ranks: all (collective)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grouped = dist.is_available() and dist.is_initialized()
    of_ranks: list[Any] = [None] * (dist.get_world_size() if grouped else 1)
    if grouped:
        dist.all_gather_object(of_ranks, (report.cpu_seconds, peak))
    else:
        of_ranks = [(report.cpu_seconds, peak)]
    report.cpu_seconds = sum(seconds for seconds, _ in of_ranks)
    report.resident = max(peak for _, peak in of_ranks)
    if not grouped or dist.get_rank() == 0:
        path.write_text(json.dumps(asdict(report)))

"""Why a save failed, as data: it goes through threads, ranks and JSON."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from keepstep.errors import KeepstepError
from keepstep.output.printable import first_few
from keepstep.policy.manifest import ManifestError

FULL = (errno.ENOSPC, errno.EDQUOT)
# What may pass, or be mended outside: the disk, the memory. ManifestError: a staged file is gone
# or cut short. SafetensorError: how safetensors 0.8 tells every error of the disk.
ENVIRONMENT = (OSError, MemoryError, torch.OutOfMemoryError, ManifestError, SafetensorError)

SHOWN = 8  # causes that are told one by one: thousands of ranks may meet the same full disk
LONGEST_TRACE = 4000  # characters, of its end


@dataclass(frozen=True)
class Cause:
    """What one rank met.

    Attributes:
        rank: who met it.
        text: in words.
        kind: the error's type; empty where none was raised, as when a writer is stuck.
        errno: the system's number; None where it gave none.
        path: the file, where the system named one.
        environment: whether it may pass. Else it is a mistake in a program, and stays one.
        trace: where in the program; empty for what the environment did.
    """

    rank: int
    text: str
    kind: str = ""
    errno: int | None = None
    path: str | None = None
    environment: bool = True
    trace: str = ""

    @staticmethod
    def of(error: BaseException, rank: int) -> Cause:
        """What `error`, met by `rank`, says."""
        environment = isinstance(error, ENVIRONMENT) and not isinstance(
            error, io.UnsupportedOperation
        )
        number = error.errno if isinstance(error, OSError) else None
        path = error.filename if isinstance(error, OSError) else None
        trace = "" if environment else "".join(traceback.format_exception(error))[-LONGEST_TRACE:]
        hint = " (no inodes are left: df -i)" if no_inodes(number, path) else ""
        kind = type(error).__name__
        return Cause(
            *(rank, f"{error}{hint}", kind, number),
            path=None if path is None else str(path),
            environment=environment,
            trace=trace,
        )

    def __str__(self) -> str:
        return f"rank {self.rank}: {f'{self.kind}: ' if self.kind else ''}{self.text}"


def no_inodes(number: int | None, path: str | bytes | None) -> bool:
    """Whether a disk has room, and none for one more file: the system's error says the same."""
    if number != errno.ENOSPC or path is None:
        return False
    place = Path(os.fsdecode(path))
    for there in (place, *place.parents):
        with contextlib.suppress(OSError):  # not made yet
            seen = os.statvfs(there)
            return seen.f_files > 0 and seen.f_favail == 0
    return False


def in_words(causes: Sequence[Cause]) -> str:
    """What some ranks have met, on one line; of many the first few."""
    return first_few([str(cause) for cause in causes], "; ", SHOWN)


class StaleError(KeepstepError, RuntimeError):
    """What was written as a step's state is that of another step, byte for byte.

    Attributes:
        step: whose it is.
    """

    def __init__(self, step: int, files: Sequence[str]) -> None:
        super().__init__(
            f"the optimizer has made steps since checkpoint-{step}, and what was written of it is "
            f"the same, byte for byte: {first_few(files, ', ')}. It is a copy from before: "
            "nothing is committed",
            step=step,
        )


class SaveError(KeepstepError, RuntimeError):
    """A checkpoint could not be written: the same error on every rank, naming those that could not.

    Attributes:
        causes: what they met.
        step: of the checkpoint; None: it is not about one.
        ranks: that could not write, in the order of the causes.
        path, errno: the file and the system's number of the first cause that has them.
    """

    def __init__(self, what: str, causes: Sequence[Cause], step: int | None = None) -> None:
        paths = [Path(cause.path) for cause in causes if cause.path is not None]
        numbers = [cause.errno for cause in causes if cause.errno is not None]
        super().__init__(
            f"{what}: {in_words(causes)}",
            step=step,
            path=next(iter(paths), None),
            ranks=tuple(dict.fromkeys(cause.rank for cause in causes)),
            errno=next(iter(numbers), None),
        )
        self.causes = tuple(causes)
        for cause in causes[:SHOWN]:
            if cause.trace:
                self.add_note(f"On rank {cause.rank}:\n{cause.trace}")

    @property
    def disk_full(self) -> bool:
        """Whether there was no room for it (or no quota), on any rank."""
        return any(cause.errno in FULL for cause in self.causes)

    @property
    def in_the_way(self) -> bool:
        """Whether the name that the checkpoint is to have belongs to something else."""
        return any(cause.errno == errno.EEXIST for cause in self.causes)

    @property
    def environment(self) -> bool:
        """Whether it may pass, on all of them."""
        return all(cause.environment for cause in self.causes)

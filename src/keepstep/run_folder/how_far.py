"""How far a process is, where another one can look: three numbers in memory that both have."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Any

from keepstep.output.progress import Phase

FORM = struct.Struct("<qqq")


class HowFar:
    """A few bytes of memory with a file descriptor, which a process hands on to what it starts.

    Who tells never waits, whether anybody looks or not; and nothing depends on it: where there is
    none, nothing is told.

    Attributes:
        descriptor: None: this machine gives none.
    """

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    @classmethod
    def made(cls) -> HowFar:
        """One in which nothing stands."""
        try:
            return cls(os.memfd_create("keepstep-how-far"))
        except OSError:  # a container may forbid it
            return cls(None)

    @classmethod
    def of(cls, job: dict[str, Any]) -> HowFar:
        """The one that a job's process was handed."""
        return cls(job.get("how_far"))

    @property
    def handed_on(self) -> tuple[int, ...]:
        """For subprocess: `pass_fds`."""
        return () if self.descriptor is None else (self.descriptor,)

    def tell(self, number: int, done: int = 0, total: int = 0) -> None:
        """That it is in this phase, and how far: bytes; a total of 0 is not known."""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # no memory for it
                os.pwrite(self.descriptor, FORM.pack(number, done, total), 0)

    def read(self) -> Phase:
        """What was told last."""
        if self.descriptor is None:
            return Phase()
        content = os.pread(self.descriptor, FORM.size, 0)
        return Phase(*FORM.unpack(content)) if len(content) == FORM.size else Phase()

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

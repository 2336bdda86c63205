"""A counted file system: which requests a rank makes of the disk, and how many bytes they move.

Counted is where Python asks the system, so that nothing is missed, whoever asks: looks (stat),
listings, opens, reads, writes, syncs, and changes of names. On a network file system each is a
message to a server, or may be one.
"""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

KINDS = {  # function of `os` → kind of request
    **dict.fromkeys(("stat", "lstat", "readlink", "statvfs"), "look"),
    **dict.fromkeys(("scandir", "listdir"), "list"),
    **dict.fromkeys(("mkdir", "symlink", "link"), "make"),
    **dict.fromkeys(("unlink", "remove", "rmdir"), "remove"),
    **{"rename": "rename", "replace": "rename", "fsync": "sync"},
    **dict.fromkeys(("chmod", "ftruncate"), "attribute"),
}


class Requests:
    """What was asked of the disk, by whom.

    Attributes:
        counts: (who, kind) → how often.
        read, written: who → bytes.
    """

    def __init__(self, who: Callable[[], Any]) -> None:
        self.counts: Counter[tuple[Any, str]] = Counter()
        self.read: Counter[Any] = Counter()
        self.written: Counter[Any] = Counter()
        self._who = who

    def of(self, who: Any) -> Counter[str]:
        """Kind → how often, of one of them."""
        return Counter({kind: n for (other, kind), n in self.counts.items() if other == who})

    def forget(self) -> None:
        """Count from here on."""
        for counter in (self.counts, self.read, self.written):
            counter.clear()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, all of this process is counted."""
        with ExitStack() as patches:

            def replace(module: Any, name: str, make: Callable[[Any], Any]) -> None:
                function = make(getattr(module, name))
                patches.enter_context(mock.patch.object(module, name, function))

            for name, kind in KINDS.items():
                replace(os, name, partial(self._counting, kind=kind))
            replace(os, "open", lambda real: self._counting(real, "open"))
            replace(os, "pwrite", self._counting_writes)
            replace(os, "preadv", self._counting_reads)
            replace(builtins, "open", self._counting_opens)
            replace(io, "open", self._counting_opens)
            yield

    def _count(self, kind: str) -> None:
        self.counts[self._who(), kind] += 1

    def _counting(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._count(kind)
            return real(*args, **options)

        return call

    def _counting_writes(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, content: Any, offset: int) -> int:
            self._count("write")
            written = real(descriptor, content, offset)
            self.written[self._who()] += written
            return written

        return call

    def _counting_reads(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
            self._count("read")
            count = real(descriptor, buffers, offset, *flags)
            self.read[self._who()] += count
            return count

        return call

    def _counting_opens(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A file is opened (unless it is by number) and read or written: all of it, once."""

        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not isinstance(file, int) and options.get("opener") is None:
                self._count("open")
            stream = real(file, mode, *args, **options)
            if "r" in mode and "+" not in mode:
                self._count("read")
                self.read[self._who()] += os.fstat(stream.fileno()).st_size
            else:
                self._count("write")
            return stream

        return call

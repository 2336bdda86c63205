"""How many bytes have left for the Hub, as those count them that send them.

Facts of huggingface_hub 2.4: an upload has no public place to ask. hf_xet counts the bytes of all
its files that are there or on the wire (what the Hub has already is counted with what it stands
beside), and hands that on ten times a second to whatever draws its bars, if bars are wanted at all.
An upload by LFS reads `CommitOperationAdd.as_file(with_tqdm=True)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd

from keepstep.output.progress import Tell, nobody

MODULE, BARS = "huggingface_hub.utils._xet_progress_reporting", "XetUploadProgressReporter"
# For the process that sends: bars are wanted, and none is drawn (tqdm's own switch).
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "TQDM_DISABLE": "1"}
ODD = (AttributeError, TypeError, ValueError)  # of a count that another version has otherwise


class Sending:
    """What is sent in one commit.

    A count that is not to be had is not told; no upload fails of it.
    """

    def __init__(self, tell: Tell = nobody) -> None:
        """
        Args:
            tell: is told of the bytes that have left, and of all; from any thread.
        """
        self._tell = tell
        self._read: dict[str, int] = {}  # by LFS: name → how far its file has been read
        self._total = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Around the commit."""
        self._read.clear()
        self._total = 0
        try:
            module, bars = import_module(MODULE), getattr(import_module(MODULE), BARS)
        except (ImportError, AttributeError):  # another version: nothing is told of Xet
            yield
            return
        setattr(module, BARS, lambda *args, **options: _Bars(self._tell))
        try:
            yield
        finally:
            setattr(module, BARS, bars)

    def add(self, name: str, path: Path) -> CommitOperationAdd:
        """A file that is to be there."""
        operation = CommitOperationAdd(name, path)
        self._total += path.stat().st_size
        opened = operation.as_file

        @contextlib.contextmanager
        def as_file(with_tqdm: bool = False) -> Iterator[BinaryIO]:
            with opened() as file:
                if with_tqdm:  # it is read to be sent
                    file.read = self._telling(name, file, file.read)  # type: ignore[method-assign]
                yield file

        operation.as_file = as_file  # type: ignore[method-assign]
        return operation

    def _telling(
        self, name: str, file: BinaryIO, read: Callable[..., bytes]
    ) -> Callable[..., bytes]:
        def told(size: int = -1) -> bytes:
            self._read[name] = file.tell()  # what was read before has been sent
            self._tell(sum(list(self._read.values())), self._total)
            return read(size)

        return told


class _Bars:
    """In the place of hf_xet's bars."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def update_progress(self, all_files: Any, each: Any) -> None:
        with contextlib.suppress(*ODD):
            self._tell(int(all_files.total_bytes_completed), int(all_files.total_bytes))

    def close(self) -> None:
        """They are not drawn."""

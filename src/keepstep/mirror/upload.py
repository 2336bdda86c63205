"""Copies a checkpoint to a mirror: its objects, a receipt of them, its manifest last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat

from xxhash import xxh3_128, xxh3_128_hexdigest

from keepstep.mirror.listing import is_whole, receipts_of
from keepstep.mirror.owners import DeposedError, Owner, check, there
from keepstep.mirror.store import Entry, Store, StoreError
from keepstep.output.progress import Tell, nobody
from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME, Manifest
from keepstep.policy.mirror import (
    HISTORY,
    PART_BYTES,
    Copied,
    Part,
    folder_of,
    is_receipt_of,
    parts_of,
    read_receipt,
    receipt_of,
    what_is_missing,
)
from keepstep.policy.strict import TextError
from keepstep.run_folder.checkpoint import Checkpoint

AT_ONCE = 4  # objects under way; each is held in memory


@dataclass
class Sent:
    """What an upload was.

    Attributes:
        bytes: that were sent.
        copied: that the store copied from an earlier checkpoint, since they are the same.
        found: that were there from an earlier try.
    """

    bytes: int = 0
    copied: int = 0
    found: int = 0


class Upload:
    """One checkpoint on its way.

    Attributes:
        sent: so far.
    """

    def __init__(
        self,
        store: Store,
        owner: Owner,
        frozen: Checkpoint,
        rate: float = 0.0,
        node: int = 0,
        nodes: int = 1,
        tell: Tell = nobody,
    ) -> None:
        """
        Args:
            frozen: with all its files, which nobody changes or removes meanwhile; or, of several
                machines, this one's part.
            rate: bytes a second at most; 0: as fast as it goes.
            node: this machine's number. The first one writes the manifest.
            nodes: how many machines upload, each its part.
            tell: how many of so many bytes are there by now, in this thread.
        """
        self.sent = Sent()
        self._store, self._owner, self._frozen, self._rate = store, owner, frozen, rate
        self._node, self._nodes, self._tell = node, nodes, tell
        self._folder = folder_of(frozen.step, owner.number, owner.token)
        self._began = time.monotonic()

    def run(self, history: Mapping[str, bytes]) -> None:
        """
        Args:
            history: files of the run that a new machine needs beside the checkpoint.

        Raises:
            StoreError, DeposedError: it is not there, and nobody takes it for being there.
            OSError: its files cannot be read, or are not what was written.
        """
        names = self._store.names()
        part = self._frozen.manifest.is_part
        text = (self._frozen.path / (WHOLE_NAME if part else MANIFEST_NAME)).read_bytes()
        counted = there(self._store, names)
        if self._is_there(names, counted, text):
            self.sent.found = self._frozen.manifest.total_bytes
        else:
            try:
                self._make(names, counted, text)
            except FileNotFoundError:
                self._check()  # what it writes is gone again: the owner has removed it
                raise
        if self._node == 0:
            for name, content in history.items():
                self._store.put(f"{HISTORY}/{self._owner.number:06d}/{name}", content)

    def _make(self, names: Mapping[str, Entry], counted: list[Copied], text: bytes) -> None:
        """This machine's objects, and a receipt of them; on the first machine, once all receipts
        are there, the manifest."""
        of = xxh3_128_hexdigest(text)
        parts = self._send(names, self._known(names, counted))
        self._store.put(f"{self._folder}/receipt-{self._node}.json", receipt_of(parts, of))
        if self._node > 0:
            return
        for node in range(1, self._nodes):
            parts += self._wait_for_receipt(node, of)
        missing = what_is_missing(Manifest.from_json(text.decode()), parts)
        if missing:
            told = f"{self._folder}: {missing[0]} has changed size, or no machine has sent it"
            raise StoreError(told, fatal=False)
        self._check()
        self._store.put(f"{self._folder}/{MANIFEST_NAME}", text)

    def _wait_for_receipt(self, node: int, of: str) -> list[Part]:
        """What another machine has sent, once it has; until this process's time is over."""
        for pause in chain((0.2, 0.5, 1.0, 2.0), repeat(5.0)):
            try:
                text = self._store.get(f"{self._folder}/receipt-{node}.json")
                if is_receipt_of(text, of):
                    return read_receipt(text)
            except FileNotFoundError:
                pass
            time.sleep(pause)
        raise AssertionError("it waits for ever")

    def _check(self) -> None:
        """Whoever is not the owner any more takes along what nobody counts."""
        try:
            check(self._store, self._owner)
        except DeposedError:
            with suppress(StoreError):  # the owner removes it, too
                self._store.delete(sorted(self._store.names(self._folder)))
            raise

    def _is_there(self, names: Mapping[str, Entry], counted: list[Copied], text: bytes) -> bool:
        """Whether it is on the mirror already, all of it: brought from there, or before a
        restart."""
        same = [one for one in counted if one.step == self._frozen.step]
        try:
            if not same or self._store.get(f"{same[0].folder}/{MANIFEST_NAME}") != text:
                return False
        except FileNotFoundError:
            return False  # a listing may show what was deleted
        manifest = Manifest.from_json(text.decode())
        return is_whole(self._store, same[0].folder, manifest, names)

    def _known(
        self, names: Mapping[str, Entry], counted: list[Copied]
    ) -> dict[tuple[str, int], str]:
        """Objects of the newest checkpoint there: digest and size → name."""
        if not counted:
            return {}
        folder = counted[-1].folder
        try:
            parts = receipts_of(self._store, folder, names)
        except (FileNotFoundError, TextError):
            return {}  # damaged there: everything is sent
        return {(part.xxh3_128, part.bytes): f"{folder}/{part.name}" for part in parts}

    def _send(self, names: Mapping[str, Entry], known: Mapping[tuple[str, int], str]) -> list[Part]:
        entries = self._frozen.manifest.files.items()
        files = {name: entry.bytes for name, entry in entries if name != WHOLE_NAME}
        done: list[Part] = []
        there, total = 0, sum(files.values())
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ahead: list[Future[Part]] = []

            def take() -> None:
                nonlocal there
                done.append(ahead.pop(0).result())
                there += done[-1].bytes
                self._tell(there, total)

            try:
                for part, content in self._read(files):
                    ahead.append(pool.submit(self._put, part, content, names, known))
                    if len(ahead) >= AT_ONCE:
                        take()
                while ahead:
                    take()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return done

    def _read(self, files: Mapping[str, int]) -> Iterator[tuple[Part, bytes]]:
        """All parts, in order, with their content; a file is compared with its digest."""
        for name, size in files.items():
            digest = xxh3_128()
            with open(self._frozen.path / name, "rb") as file:
                for part in parts_of({name: size}, PART_BYTES):
                    content = file.read(part.bytes)
                    digest.update(content)
                    yield replace(part, xxh3_128=xxh3_128_hexdigest(content)), content
                rest = file.read(1)
            wanted = self._frozen.manifest.files[name].xxh3_128
            if rest or digest.hexdigest() != wanted:
                raise OSError(f"{self._frozen.path.name}: {name} is not what was written")

    def _put(
        self,
        part: Part,
        content: bytes,
        names: Mapping[str, Entry],
        known: Mapping[tuple[str, int], str],
    ) -> Part:
        target = f"{self._folder}/{part.name}"
        source = known.get((part.xxh3_128, part.bytes))
        if self._store.holds(names.get(target), content):
            self.sent.found += part.bytes
        elif source is not None and self._store.holds(names.get(source), content):
            self._store.copy(source, target)
            self.sent.copied += part.bytes
        else:
            self._store.put(target, content)
            self.sent.bytes += part.bytes
            if self._rate:
                time.sleep(max(0.0, self._began + self.sent.bytes / self._rate - time.monotonic()))
        return part

"""A run as its mirror has it, to be looked at as a run folder is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xxhash import xxh3_128, xxh3_128_hexdigest

from keepstep.mirror.owners import there
from keepstep.mirror.reading import in_order
from keepstep.mirror.store import Entry, Store, StoreError
from keepstep.policy.completeness import differences
from keepstep.policy.manifest import LONGEST_MANIFEST, MANIFEST_NAME, folder_name
from keepstep.policy.mirror import (
    FOLDER,
    RECEIPT,
    Copied,
    Part,
    distinct,
    evaluations_of,
    read_receipt,
)
from keepstep.policy.mirrored import RETENTION, history_in, listed_sizes, read_retention
from keepstep.policy.retention import Policy
from keepstep.policy.selection import UnreadableError
from keepstep.policy.strict import TextError, shown
from keepstep.run_folder.checkpoint import Checkpoint, Unfit, look_at
from keepstep.run_folder.evaluations import EVALUATIONS_NAME, first_believed
from keepstep.run_folder.reader import RunFolder

HISTORY = ("run.json", "events.jsonl")  # as far as it is looked at here
OBJECT = 2 * LONGEST_MANIFEST  # bytes that one of its texts may have


class MirroredRun(RunFolder):
    """Its manifests and its history lie in a temporary folder, all else is on the store.

    What it keeps is what the mirror's retention keeps, where that has been written down. `faults`
    looks at objects: at their sizes, as they were listed once, and with `deep` at all their bytes.

    Attributes:
        store: the run's.
        names: of all objects, as they were listed.
        there: step → where its objects are.
        progress: told of each part that `faults` has read, in bytes.
    """

    def __init__(self, store: Store, names: Mapping[str, Entry], folder: Path) -> None:
        """
        Raises:
            StoreError: of the store.
        """
        super().__init__(folder)
        self.store, self.names = store, names
        self.there: dict[int, Copied] = {one.step: one for one in there(store, names)}
        self._texts: dict[str, bytes] = {}
        self._read_texts()
        self._write_down()

    def parts(self, step: int) -> list[Part]:
        """The objects of a checkpoint, as its receipts tell; each file's in their order.

        Raises:
            TextError: they are not what was written.
        """
        folder = self.there[step].folder
        told = [text for name, text in self._texts.items() if _is_receipt(name, folder)]
        parts = distinct(part for text in told for part in read_receipt(text))
        listed = self.checkpoint_at(step).manifest.files
        for part in parts:
            if part.file not in listed:
                raise TextError(f"a receipt names {shown(part.file)}, which is not listed")
        return sorted(parts, key=lambda part: (part.file, part.begin))

    def checkpoint_at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, of whichever run.

        Raises:
            KeyError: there is none that can be had.
        """
        found = look_at(self.path / folder_name(step))
        if not isinstance(found, Checkpoint):
            raise KeyError(step)
        return found

    def faults(self, checkpoint: Checkpoint, deep: bool | None = False) -> list[str]:
        manifest, folder = checkpoint.manifest, self.there[checkpoint.step].folder
        try:
            parts = self.parts(checkpoint.step)
        except TextError as error:
            return [str(error)]
        if not parts:
            return ["it has no receipt of what was uploaded"]
        sizes = {name: entry.bytes for name, entry in self.names.items()}
        found = differences(manifest, listed_sizes(manifest, parts, folder, sizes))
        try:
            if deep and not found:
                found = list(self._changed(checkpoint, folder, parts))
        except StoreError as error:
            told = f"{checkpoint.path.name} cannot be read: {error}"
            raise UnreadableError(told, step=checkpoint.step, path=checkpoint.path) from error
        return found

    def state_of(self, checkpoint: Checkpoint, deep: bool | None = False) -> list[str]:
        try:
            return self.faults(checkpoint, deep)
        except UnreadableError as error:
            return [str(error)]

    def policy(self) -> Policy:
        return self._retention()[0] or super().policy()

    def pinned(self) -> set[int]:
        return self._retention()[1]

    def mirrored(self) -> dict[int, tuple[int, str]]:
        attempts = {c.step: c.manifest.attempt for c in self.checkpoints()}
        return {step: (attempt, self.store.url) for step, attempt in attempts.items()}

    def unfinished(self) -> list[str]:
        """Names of checkpoints of which there are objects, and no manifest: they are on their way,
        or nobody has ended that."""
        found = {match[1] for name in self.names if (match := FOLDER.match(name))}
        return [folder_name(step) for step in sorted(map(int, found)) if step not in self.there]

    def _changed(self, checkpoint: Checkpoint, folder: str, parts: list[Part]) -> Iterator[str]:
        """Files whose bytes are not those of the manifest. All are read, a few objects ahead."""
        files, digest, lost, odd = checkpoint.manifest.files, xxh3_128(), "", False
        contents = in_order(self.store, [f"{folder}/{part.name}" for part in parts])
        for part, content in zip(parts, contents, strict=True):
            if part.begin == 0:
                digest, odd = xxh3_128(), False
            if isinstance(content, FileNotFoundError):
                if lost != part.file:
                    yield f"{part.file} is missing"
                lost = part.file
                continue
            digest.update(content)
            odd = odd or xxh3_128_hexdigest(content) != part.xxh3_128
            self.progress(len(content))
            if part.file == lost or part.begin + part.bytes < files[part.file].bytes:
                continue
            if digest.hexdigest() != files[part.file].xxh3_128:
                yield f"{part.file}: content has changed (xxh3-128 differs)"
            elif odd:
                yield f"{part.file}: its receipt has another digest"

    def _retention(self) -> tuple[Policy | None, set[int]]:
        text = self._texts.get(history_in(self.names).get(RETENTION, ""))
        try:
            return (None, set()) if text is None else read_retention(text.decode(errors="replace"))
        except TextError:  # another version wrote it
            return None, set()

    def _read_texts(self) -> None:
        """All that is small and told of checkpoints: a few requests each, several at once."""
        history = history_in(self.names)
        wanted = [history[name] for name in (*HISTORY, RETENTION) if name in history]
        for one in self.there.values():
            wanted.append(f"{one.folder}/{MANIFEST_NAME}")
            wanted += [name for name in self.names if _is_receipt(name, one.folder)]
            wanted += evaluations_of(one.folder, self.names)
        wanted = [n for n in wanted if self.names[n].bytes <= OBJECT or n in history.values()]
        for name, text in zip(wanted, in_order(self.store, wanted), strict=True):
            if not isinstance(text, FileNotFoundError):  # pruned in this moment
                self._texts[name] = text

    def _write_down(self) -> None:
        self.private.mkdir()
        history = history_in(self.names)
        for name in HISTORY:
            text = self._texts.get(history.get(name, ""))
            if text is not None:
                (self.private / name).write_bytes(text)
        for step, one in self.there.items():
            text = self._texts.get(f"{one.folder}/{MANIFEST_NAME}")
            if text is None:
                continue
            folder = self.path / folder_name(step)
            folder.mkdir()
            (folder / MANIFEST_NAME).write_bytes(text)
            found = look_at(folder)
            if found is not None and not isinstance(found, Unfit):
                self._write_evaluations(one, found)

    def _write_evaluations(self, one: Copied, found: Checkpoint) -> None:
        texts = [self._texts[name] for name in evaluations_of(one.folder, self._texts)]
        text = first_believed(texts, found.manifest)
        if text is not None:
            (found.path / EVALUATIONS_NAME).write_bytes(text)


def _is_receipt(name: str, folder: str) -> bool:
    above, _, last = name.rpartition("/")
    return above == folder and RECEIPT.fullmatch(last) is not None


@contextmanager
def seen(store: Store, names: Mapping[str, Entry] | None = None) -> Iterator[MirroredRun]:
    """The run at a store, as it is now.

    Args:
        names: of all objects there; None: they are listed.

    Raises:
        StoreError: of the store.
    """
    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:
        yield MirroredRun(store, store.names() if names is None else names, Path(scratch))

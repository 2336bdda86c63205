"""What a command does with a mirror's address in the place of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from keepstep.cli.common import console, fail
from keepstep.cli.common import is_address as is_address
from keepstep.cli.rows import MirroredRunRow
from keepstep.output.printable import first_few
from keepstep.output.terminal import progress_bar
from keepstep.policy.manifest import MANIFEST_NAME, Manifest, ManifestError, folder_name, step_of
from keepstep.policy.mirror import Copied, address_fault
from keepstep.policy.mirrored import runs_in
from keepstep.policy.strict import TextError
from keepstep.run_folder.checkpoint import Checkpoint, DamagedError
from keepstep.run_folder.reader import RunFolder

if TYPE_CHECKING:
    from keepstep.mirror.store import Entry, Store
    from keepstep.mirror.view import MirroredRun

WORDS = ("best", "latest")  # as the links of a run folder are called


def split(url: str) -> tuple[str, str | None]:
    """The address of a run, or of something else, and what of it was asked for: `checkpoint-N`,
    `best` or `latest`; None: all."""
    url = url.rstrip("/")
    above, _, last = url.rpartition("/")
    asked = step_of(last) is not None or last in WORDS
    return (above, last) if asked and urlsplit(url).path.strip("/") else (url, None)


@dataclass(frozen=True)
class Found:
    """What is at an address.

    Attributes:
        url: the run's, or what was asked for where there is none.
        run: that is there; None: it is no run's own address, but those of `below` are.
        step: of the checkpoint that was asked for; None: all of them.
    """

    url: str
    store: Store
    names: Mapping[str, Entry]
    run: MirroredRun | None
    step: int | None
    below: Mapping[str, Sequence[Copied]]

    @property
    def name(self) -> str | None:
        """Of the checkpoint that was asked for."""
        return None if self.step is None else folder_name(self.step)

    def one_run(self) -> MirroredRun:
        """The run, which has to be one."""
        if self.run is None:
            told = first_few([f"{self.url}/{name}" for name in self.below])
            fail(f"{self.url} is no run's own address; below it there are {told}")
        return self.run

    def checkpoint(self) -> Checkpoint:
        """The one that was asked for, or the newest; it is whole, by sizes."""
        run = self.one_run()
        latest = run.latest()
        step = latest.step if self.step is None and latest is not None else self.step
        if step is None:
            fail(f"{self.url}: no committed checkpoint")
        try:
            found = run.checkpoint_at(step)
        except KeyError:
            name = folder_name(step)
            fail(f"{self.url}/{name}: {run.unreadable().get(name, 'it was pruned')}", status=1)
        faults = run.faults(found)
        if faults:
            raise DamagedError(found, faults)
        return found

    def rows(self) -> list[MirroredRunRow]:
        """Those below it."""
        from keepstep.mirror.reading import in_order

        newest = [
            f"{name}/{there[-1].folder}/{MANIFEST_NAME}" for name, there in self.below.items()
        ]
        rows = []
        texts = in_order(self.store, newest)
        for (name, there), text in zip(self.below.items(), texts, strict=True):
            size = sum(e.bytes for n, e in self.names.items() if n.startswith(f"{name}/"))
            steps, saved_at = tuple(one.step for one in there), None
            if isinstance(text, bytes):
                with suppress(ManifestError):  # `keepstep ls` of the run says what is wrong
                    saved_at = Manifest.from_json(text.decode(errors="replace")).saved_at
            rows.append(MirroredRunRow(f"{self.url}/{name}", steps, size, saved_at))
        return rows


@contextmanager
def looking(url: str) -> Iterator[Found]:
    """What is at an address, for as long as the block goes on. What cannot be read, or is not
    there, ends the command."""
    from keepstep.mirror.store import StoreError
    from keepstep.mirror.view import seen

    fault = address_fault(url)
    if fault is not None:
        fail(fault)
    address, word = split(url)
    try:
        store, names, below = _listed(address)
        if word in WORDS and word in below:  # a run of that name
            address, word = url.rstrip("/"), None
            store, names, below = _listed(address)
        if not names:
            fail(f"there is nothing at {address}")
        if not any(name.startswith(("owners/", "checkpoint-")) for name in names):
            if word is not None or not below:
                fail(f"{address} is no run on a mirror")
            yield Found(address, store, names, None, None, below)
            return
        with seen(store, names) as run:
            step = None if word is None else _step_of(word, run, address)
            yield Found(address, store, names, run, step, below)
    except StoreError as error:
        fail(*str(error).split("\n"), status=2 if error.fatal else 1)
    except (DamagedError, ManifestError, TextError) as error:
        fail(f"{url}: {error}", status=1)


def _listed(address: str) -> tuple[Store, Mapping[str, Entry], Mapping[str, Sequence[Copied]]]:
    from keepstep.mirror.reading import open_existing

    store = open_existing(address)
    with console.waiting(f"listing {address} …"):
        names = store.names()
    return store, names, runs_in(names)


def _step_of(word: str, run: MirroredRun, address: str) -> int:
    if word in WORDS:
        found = run.best() if word == "best" else run.latest()
        step = None if found is None else found.step
    else:
        step = step_of(word)
    if step is None or step not in run.there:
        there = ", ".join(map(str, run.there)) or "none"
        fail(f"{address}: no such checkpoint; there: {there}")
    return step


@contextmanager
def reading(run: RunFolder, total: int, what: str) -> Iterator[None]:
    """Tell how many of so many bytes have been read."""
    with progress_bar(console, what) as tell, run.reading(total, tell):
        yield


def tell_unfinished(run: MirroredRun) -> None:
    """Uploads that have not ended."""
    for name in run.unfinished():
        console.tell(f"{name}: on its way, or an upload that was not ended: it has no manifest")

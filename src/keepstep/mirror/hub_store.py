"""A bucket of the Hugging Face Hub: `hf://buckets/owner/name[/prefix]`.

By huggingface_hub's buckets API, which takes token and address of the Hub from the environment, as
all its calls do. What is written goes by Xet, in chunks: those that the Hub has are not sent again.
Facts of huggingface_hub 2.4 and hf_xet 1.8: nothing is written on condition; a batch may be done in
part; errors of Xet are a `ConnectionError` whose text holds the status.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    BucketBatchError,
    BucketNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_backoff,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from keepstep.hub.client import FATAL, MISTAKES, NO_TOKEN, brief, connect, offline
from keepstep.mirror.claims import create_by_claim
from keepstep.mirror.store import Entry, Store, StoreError

T = TypeVar("T")
# For how long Xet tries a request again (by itself 6 minutes), and waits for an answer (5): that is
# counted from the first byte of up to 64 MB that it sends, which takes a slow network minutes.
# And that it tells nobody of each transfer.
XET = {
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "120s",
    "HF_XET_CLIENT_READ_TIMEOUT": "600s",
    "HF_XET_TELEMETRY_ENABLED": "false",
}
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ([A-Za-z ]*)\)")
BATCH_TRIES = 3  # of operations that a batch has left undone
PAUSES = wait_random(0.5, 2)  # seconds


class HubStore(Store):
    conditional = False

    def __init__(self, url: str) -> None:
        """
        Args:
            url: an address that has no fault.
        """
        self.url = url.rstrip("/")
        owner, name, *rest = urlsplit(self.url).path.strip("/").split("/")
        self._bucket = f"{unquote(owner)}/{unquote(name)}"
        self._prefix = "".join(f"{unquote(part)}/" for part in rest)
        for variable, value in XET.items():
            os.environ.setdefault(variable, value)
        self._api = connect()

    def names(self, below: str = "") -> dict[str, Entry]:
        prefix = f"{self._prefix}{below}/" if below else self._prefix
        entries: dict[str, Entry] = {}
        try:
            with self._told(f"listing {below or 'it'}"):
                listed = self._api.list_bucket_tree(
                    self._bucket, prefix.rstrip("/") or None, recursive=True
                )
                for file in listed:  # also of folders whose names begin with the prefix
                    if file.type == "file" and file.path.startswith(prefix):
                        name = file.path.removeprefix(self._prefix)
                        entries[name] = Entry(file.size, file.xet_hash)
        except FileNotFoundError:
            pass
        return entries

    def get(self, name: str) -> bytes:
        path = quote(self._path(name), safe="")
        address = f"{self._api.endpoint}/buckets/{self._bucket}/resolve/{path}"
        headers = {**build_hf_headers(library_name="keepstep"), "Accept-Encoding": "identity"}
        with self._told(f"reading {name}"):
            answer = http_backoff("GET", address, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            return bytes(answer.content)

    def put(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with self._told(f"writing {name}"):
            self._patiently(lambda: self._batch(add=[(content, path)]))
            there = self._infos([path])
        if not self.holds(there.get(path), content):
            raise StoreError(f"{self.url}/{name} is not what was written there", fatal=False)

    def create(self, name: str, content: bytes) -> bool:
        return create_by_claim(self, name, content)

    def copy(self, source: str, target: str) -> None:
        path = self._path(source)
        with self._told(f"copying {source}"):
            entry = self._infos([path]).get(path)
            if entry is None:
                raise FileNotFoundError(f"{self.url}/{source}")
            known = ("bucket", self._bucket, entry.tag, self._path(target))
            self._patiently(lambda: self._batch(copy=[known]))

    def delete(self, names: Iterable[str]) -> None:
        paths = [self._path(name) for name in names]

        def those_there() -> None:  # another try, or another machine, may have been there
            if there := list(self._infos(paths)):
                self._batch(delete=there)

        with self._told("deleting"):
            self._patiently(those_there)

    def holds(self, entry: Entry | None, content: bytes) -> bool:
        return entry is not None and entry == Entry(len(content), _xet_hash(content))

    def _path(self, name: str) -> str:
        return self._prefix + name

    def _infos(self, paths: list[str]) -> dict[str, Entry]:
        """What is at these paths; one where nothing is is left out."""
        found = self._api.get_bucket_paths_info(self._bucket, paths)
        return {file.path: Entry(file.size, file.xet_hash) for file in found}

    def _batch(self, **operations: Any) -> None:
        with _quiet():
            self._api.batch_bucket_files(self._bucket, **operations)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Again, when the Hub has left something of a batch undone. (All else is tried again by
        the clients: for half a minute by that of the API, for two minutes by Xet's.)"""
        retrying = Retrying(
            retry=retry_if_exception_type(BucketBatchError),
            stop=stop_after_attempt(BATCH_TRIES),
            wait=PAUSES,
            reraise=True,
        )
        return retrying(action)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"{self.url}: {what}") from error
        except (FileNotFoundError, *MISTAKES):
            raise
        except Exception as error:
            cause, fatal = _cause(error)
            raise StoreError(f"{self.url}: {what}: {cause}", fatal=fatal) from error


def _cause(error: Exception) -> tuple[str, bool]:
    """What to say of an error, and whether it would be the same again."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{offline() or 'HF_HUB_OFFLINE'} is set: unset it", True
    if isinstance(error, BucketNotFoundError | RepositoryNotFoundError):
        hint = "is the name right, and the token's access?" if get_token() else NO_TOKEN
        return f"there is no such bucket, and none is made: {hint}", True
    if isinstance(error, BucketBatchError):
        failed = error.failures[0]
        return f"{len(error.failures)} not done: {failed['path']}: {failed['error']}", False
    xet = XET_STATUS.search(str(error))
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, brief(error)
    elif xet is not None:
        status, said = int(xet[1]), xet[2]
    else:
        away = type(error).__name__ == "ConnectError"  # of the HTTP library, whichever it is
        named = f"{constants.ENDPOINT} cannot be reached: " if away else ""
        return f"{named}{brief(error)}", False
    hint = {
        401: "the token is not accepted: export HF_TOKEN=…" if get_token() else NO_TOKEN,
        403: "the token may not do that there: one with write access is needed",
        413: "the Hub takes no more there: has the account room left? (`mirror_total_limit`)",
    }.get(status, said)
    return f"{status}: {hint}" + ("" if hint == said else f" ({said})"), status in FATAL


def _xet_hash(content: bytes) -> str:
    """The Hub's name of a content: what its chunks are, and their order."""
    from hf_xet import hash_files  # type: ignore[import-untyped]

    file = os.memfd_create("keepstep")
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(content)
        return str(hash_files([f"/proc/self/fd/{file}"])[0].hash)
    finally:
        os.close(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of uploads between the lines of a run."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

"""Objects on S3, Google Cloud Storage or Azure, or in a folder of another disk.

By obstore, which signs, retries with a back-off, and takes its credentials from the environment as
each store's own tools do (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import LocalStore, from_url
from xxhash import xxh3_128_hexdigest

from keepstep.mirror import credentials
from keepstep.mirror.answers import NO_BUCKET, read_answer
from keepstep.mirror.store import Entry, Store, StoreError

# A request is tried again for so long: beyond that the next checkpoint catches up. The number of
# tries bounds nothing: by it a store that restarts would be given up within two seconds.
RETRIES: Any = {
    "max_retries": 1000,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
}
PERSON_WAITS = {"retry_timeout": timedelta(seconds=15)}  # for a command: the address may be wrong
# A connection that says nothing for so long is dead: the store does not wait to tell what it has.
# (While it is written to, it says nothing; on a slow network, for minutes.)
READS: Any = {"connect_timeout": "20s", "read_timeout": "60s", "timeout": "600s"}
WRITES: Any = {"connect_timeout": "20s", "timeout": "600s"}
MD5 = re.compile(r'"([0-9a-f]{32})"')  # what S3 answers for an object that was put at once
# Tried again these are the same.
FATAL = (
    *(exceptions.PermissionDeniedError, exceptions.UnauthenticatedError),
    *(exceptions.NotSupportedError, exceptions.UnknownConfigurationKeyError),
)


class ObjectStore(Store):
    conditional = True

    def __init__(self, url: str, person_waits: bool = False) -> None:
        """
        Args:
            url: an address that has no fault.
            person_waits: a store that is away is given up soon.

        Raises:
            StoreError: it cannot be opened.
        """
        self.url, self._scheme = url.rstrip("/"), urlsplit(url).scheme
        self._retries = RETRIES | (PERSON_WAITS if person_waits else {})
        self._local = Path(unquote(urlsplit(url).path)) if self._scheme == "file" else None
        with self._told("opening it"):
            if self._local is not None:
                self._reads: Any = LocalStore(prefix=self._local, mkdir=True)
                self._writes: Any = self._reads
            else:
                self._reads, self._writes = self._client(READS), self._client(WRITES)

    def _client(self, timeouts: Any) -> Any:
        more: Any = {}
        if self._scheme == "s3":
            more = {"config": {"checksum_algorithm": "sha256"}}
            if (provider := credentials.of_a_profile()) is not None:
                more["credential_provider"] = provider
        options = timeouts | {"allow_http": _plain_http()}
        return from_url(self.url, client_options=options, retry_config=self._retries, **more)

    def names(self, below: str = "") -> dict[str, Entry]:
        with self._told(f"listing {below or 'it'}"):
            found = [entry for page in obstore.list(self._reads, below or None) for entry in page]
        return {unquote(e["path"]): Entry(e["size"], e["e_tag"] or "") for e in found}

    def get(self, name: str) -> bytes:
        with self._told(f"reading {name}"):
            return bytes(obstore.get(self._reads, name).bytes())

    def put(self, name: str, content: bytes) -> None:
        with self._told(f"writing {name}"):
            put = obstore.put(self._writes, name, content, use_multipart=False)
            self._sync(name)
        self._check(name, content, put["e_tag"] or "")

    def create(self, name: str, content: bytes) -> bool:
        try:
            with self._told(f"creating {name}"):
                obstore.put(self._writes, name, content, mode="create", use_multipart=False)
                self._sync(name)
        except FileExistsError:
            # The answer of an earlier try may have been lost.
            return self.get(name) == content
        return True

    def copy(self, source: str, target: str) -> None:
        with self._told(f"copying {source}"):
            obstore.copy(self._writes, source, target)
            self._sync(target)

    def delete(self, names: Iterable[str]) -> None:
        if self._scheme == "s3":  # a thousand in one request
            if names := list(names):
                with self._told(f"deleting {names[0]} …"):
                    obstore.delete(self._writes, names)
            return
        for name in names:
            try:
                with self._told(f"deleting {name}"):
                    obstore.delete(self._writes, name)
            except FileNotFoundError:
                pass

    def holds(self, entry: Entry | None, content: bytes) -> bool:
        known = MD5.fullmatch(entry.tag) if entry else None
        return bool(known and known[1] == _md5(content))

    def _check(self, name: str, content: bytes, tag: str) -> None:
        """By the tag, where it is a digest (S3), else by reading it again."""
        known = MD5.fullmatch(tag)
        if known and known[1] == _md5(content):
            return
        if xxh3_128_hexdigest(self.get(name)) != xxh3_128_hexdigest(content):
            raise StoreError(f"{self.url}/{name} is not what was written there", fatal=False)

    def _sync(self, name: str) -> None:
        """A store has it when it answers; a disk, when it was synced."""
        if self._local is None:
            return
        path = self._local / name
        for place in (path, *(p for p in path.parents if p.is_relative_to(self._local))):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise FileExistsError(str(error)) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            opening = what == "opening it"
            # No settings of a client that can be wrong; a disk that is not mounted may be later.
            refused = isinstance(error, FATAL) or (opening and self._local is None)
            answer = read_answer(self._scheme, what, str(error), refused)
            absent = isinstance(error, FileNotFoundError) and not opening
            if absent and not NO_BUCKET.search(str(error)):
                raise
            raise StoreError(f"{self.url}: {answer.told}", fatal=answer.fatal) from error


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _plain_http() -> bool:
    """Whether the environment names a store without TLS, as one in the same room."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL")
    return any(os.environ.get(name, "").startswith("http://") for name in names)

"""Xet's storage as far as a client sees it: shards say which chunks of which xorbs make a file.

A xorb is a run of compressed chunks; a shard is a table of files. Both come from the client.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = 48  # bytes; a shard is a header of that size, then records
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
DECODER_SECONDS = 60
DECODE = """
import sys, hf_xet
endpoint, file_hash, size, target = sys.argv[1:]
group = hf_xet.XetSession().new_file_download_group(
    endpoint=endpoint, token="own", token_expiry_unix_secs=2**40)
with group:
    group.start_download_file(hf_xet.XetFileInfo(file_hash, int(size)), target)
"""


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (without it) of a xorb."""

    xorb: str
    size: int
    start: int
    end: int

    @property
    def chunks(self) -> dict[str, int]:
        return {"start": self.start, "end": self.end}


@dataclass(frozen=True)
class XetFile:
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


def hexadecimal(digest: bytes) -> str:
    """A hash as Xet prints it: four little-endian integers."""
    return "".join(digest[start : start + 8][::-1].hex() for start in range(0, 32, 8))


def files_of_shard(data: bytes) -> dict[str, XetFile]:
    """The files that a shard describes, by their Xet hash."""
    files: dict[str, XetFile] = {}
    position = RECORD
    while data[position : position + 32] != b"\xff" * 32:
        file_hash = hexadecimal(data[position : position + 32])
        flags, count = struct.unpack_from("<II", data, position + 32)
        position += RECORD
        terms = []
        for _ in range(count):
            size, start, end = struct.unpack_from("<III", data, position + 36)
            terms.append(Term(hexadecimal(data[position : position + 32]), size, start, end))
            position += RECORD
        if flags & HAS_VERIFICATION:
            position += RECORD * count
        sha256 = ""
        if flags & HAS_SHA256:
            sha256 = hexadecimal(data[position : position + 32])
            position += RECORD
        files[file_hash] = XetFile(sha256, tuple(terms))
    return files


def chunk_offsets(xorb: Path) -> list[int]:
    """Where each chunk of a xorb begins, and where the last ends.

    A chunk's header is 8 bytes: version, packed size in three bytes, scheme, size in three bytes.
    """
    data, offsets = xorb.read_bytes(), [0]
    while offsets[-1] + 8 <= len(data) and data[offsets[-1]] == 0:
        header = data[offsets[-1] : offsets[-1] + 8]
        offsets.append(offsets[-1] + 8 + int.from_bytes(header[1:4], "little"))
    return offsets


class XetStore:
    def __init__(self, folder: Path) -> None:
        self.xorbs, self._shards = folder / "xorbs", folder / "shards"
        self._files: dict[str, XetFile] = {}
        self._lock = threading.Lock()
        for part in (self.xorbs, self._shards):
            part.mkdir(parents=True, exist_ok=True)
        for shard in self._shards.iterdir():
            self._files |= files_of_shard(shard.read_bytes())

    def add_shard(self, data: bytes) -> None:
        (self._shards / hashlib.sha256(data).hexdigest()).write_bytes(data)
        with self._lock:
            self._files |= files_of_shard(data)

    def find(self, file_hash: str) -> XetFile | None:
        with self._lock:
            return self._files.get(file_hash)

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of the file with this content."""
        with self._lock:
            found = (name for name, file in self._files.items() if file.sha256 == sha256)
            return next(found, None)

    def plan(self, file: XetFile, first: int, last: int, addresses: dict[str, str]) -> Any:
        """How to rebuild bytes `first` to `last`. `addresses` says where each xorb is."""
        terms: list[Term] = []
        position, skipped = 0, 0
        for term in file.terms:
            if position + term.size > first and position <= last:
                skipped = skipped if terms else first - position
                terms.append(term)
            position += term.size
        fetches: dict[str, list[Any]] = {}
        for term in terms:
            offsets = chunk_offsets(self.xorbs / term.xorb)
            inside = {"start": offsets[term.start], "end": offsets[term.end] - 1}
            fetch = {"range": term.chunks, "url": addresses[term.xorb], "url_range": inside}
            fetches.setdefault(term.xorb, []).append(fetch)
        told = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": term.chunks}
            for term in terms
        ]
        return {"offset_into_first_range": skipped, "terms": told, "fetch_info": fetches}


def decode(endpoint: str, file_hash: str, size: int, target: Path) -> None:
    """Rebuild a file with the client's own code, in a process of its own.

    Its threads, its log and its cache would otherwise be those of the tests.
    """
    subprocess.run(
        [sys.executable, "-c", DECODE, endpoint, file_hash, str(size), str(target)],
        env={**os.environ, "HF_HOME": f"{target}-home"},
        check=True,
        timeout=DECODER_SECONDS,
    )

"""Xet's storage as far as a client sees it: shards say which chunks of which xorbs make a file.

A xorb is a run of compressed chunks; a shard is a table of files. Both come from the client.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = 48  # bytes; a shard is a header of that size, then records
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


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

    def content(self, file: XetFile) -> bytes:
        """What its chunks are, in order."""
        whole = bytearray()
        for term in file.terms:
            data = (self.xorbs / term.xorb).read_bytes()
            offsets = chunk_offsets(self.xorbs / term.xorb)
            for chunk in range(term.start, term.end):
                whole += chunk_content(data[offsets[chunk] : offsets[chunk + 1]])
        return bytes(whole)


def chunk_content(chunk: bytes) -> bytes:
    """A chunk's bytes: as they are, or LZ4, or LZ4 of every fourth byte, then the next ones."""
    scheme, packed = chunk[4], chunk[8:]
    if scheme == 0:
        return packed
    unpacked = lz4_frame(packed)
    if scheme == 1:
        return unpacked
    whole, position = bytearray(len(unpacked)), 0
    for first in range(4):
        count = len(range(first, len(unpacked), 4))
        whole[first::4] = unpacked[position : position + count]
        position += count
    return bytes(whole)


def lz4_frame(data: bytes) -> bytes:
    """What an LZ4 frame holds. (No library of the environment reads them.)"""
    flags, position, whole = data[4], 7, bytearray()
    position += 8 if flags & 0x08 else 0  # the size of the content
    while size := int.from_bytes(data[position : position + 4], "little"):
        begin = position + 4
        end = begin + (size & 0x7FFFFFFF)
        if size >> 31:
            whole += data[begin:end]
        else:
            lz4_block(data[begin:end], whole)
        position = end + (4 if flags & 0x10 else 0)  # the block's checksum
    return bytes(whole)


def lz4_block(data: bytes, whole: bytearray) -> None:
    """Adds what a block holds: runs of bytes, each with a copy of earlier ones behind it."""
    position = 0

    def length(start: int) -> int:
        nonlocal position
        if start == 15:
            while True:
                start += data[position]
                position += 1
                if data[position - 1] != 255:
                    break
        return start

    while position < len(data):
        token = data[position]
        position += 1
        literal = length(token >> 4)
        whole += data[position : position + literal]
        position += literal
        if position >= len(data):
            return
        offset = int.from_bytes(data[position : position + 2], "little")
        position += 2
        count = length(token & 15) + 4
        pattern = whole[-offset:][:count]
        whole += (pattern * (count // len(pattern) + 1))[:count]

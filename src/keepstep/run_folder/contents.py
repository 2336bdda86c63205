"""What lies below a folder: names, sizes, digests. Nothing is changed; no torch is needed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from keepstep.run_folder.files import CHUNK, naming

ABSENT = (FileNotFoundError, NotADirectoryError)


def digest_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """xxh3-128 of a file's content, in hex; `progress` is told of the bytes, chunk by chunk."""
    digest = xxhash.xxh3_128()
    with naming("read", path), open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def sizes_under(folder: Path) -> dict[str, int]:
    """Every regular file below `folder`: path relative to it (with `/`) → bytes."""
    return {name: entry.stat(follow_symlinks=False).st_size for name, entry in _files(folder)}


def names_under(folder: Path) -> set[str]:
    """The same files' names: no file is looked at, only folders are listed."""
    return {name for name, _ in _files(folder)}


def _files(folder: str | Path, above: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path, f"{above}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    yield above + entry.name, entry
    except (*ABSENT, PermissionError):  # as a folder without files
        return


def sizes_of(folder: Path, names: Iterable[str]) -> dict[str, int | None]:
    """These files below `folder`, as far as they exist: name → bytes; None of what is no regular
    file, or lies behind a link: nothing outside of `folder` is looked at, and no pipe is opened."""
    sizes: dict[str, int | None] = {}
    folders: dict[str, bool] = {"": True}  # each, and whether it is one
    top = f"{folder}/"
    for name in names:
        try:
            status = os.lstat(top + name)
            regular = stat.S_ISREG(status.st_mode) and _within(folder, name, folders)
            sizes[name] = status.st_size if regular else None
        except ABSENT:
            pass
    return sizes


def _within(folder: Path, name: str, known: dict[str, bool]) -> bool:
    """Whether all folders on the way to a file are folders, not links."""
    above = name.rpartition("/")[0]
    if above not in known:
        status = os.lstat(os.path.join(folder, above))
        known[above] = stat.S_ISDIR(status.st_mode) and _within(folder, above, known)
    return known[above]

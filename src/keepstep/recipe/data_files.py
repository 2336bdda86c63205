"""Which names are files of rows, and how they are read."""

from __future__ import annotations

from pathlib import Path, PurePath

# The last known suffix decides: `x.txt.jsonl` is JSONL.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def builder_of(name: str) -> str | None:
    """The builder of `datasets` that reads a file of that name; None where no suffix is known."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    return next((BUILDERS[s] for s in reversed(suffixes) if s in BUILDERS), None)


def is_data_file(name: str) -> bool:
    """Whether a name ends as files of rows do, compressed or not: it is no name on the Hub."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in BUILDERS


def looks_local(name: str) -> bool:
    """Whether a model or dataset name means a path here rather than `owner/name` on the Hub."""
    here = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return here or is_data_file(name)

"""How a checkpoint lies on an object store, where nothing is renamed, and when it is there. Pure.

    checkpoint-40/000002-9f2c1ae07b31/model.safetensors        objects that never change: a file,
    checkpoint-40/000002-9f2c1ae07b31/optim.pt.part-00000      or the parts of a large one
    checkpoint-40/000002-9f2c1ae07b31/receipt-0.json           what was uploaded, with digests
    checkpoint-40/000002-9f2c1ae07b31/manifest.json            written last: it is there now
    checkpoint-40/000002-9f2c1ae07b31/evaluations-000001.json  what was measured of it afterwards;
                                                               of several the newest is believed

The middle name is the owner's that wrote it: its number, and its token. Who begins an upload again
finds what is there already; who dies in one leaves objects that nobody counts, and that the next
upload removes.

    owners/000002.json          the second owner: the highest number that somebody could create
    owners/000002.found.json    the checkpoints that it found: of earlier owners no other counts
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from urllib.parse import quote, urlsplit

from keepstep.policy.manifest import MANIFEST_NAME, Manifest, folder_name
from keepstep.policy.strict import TextError, build, parse

# A file is uploaded whole up to this size, and in parts of it beyond. There are no multipart
# uploads, of which a killed process would leave paid for halves: what is lost of an upload that
# fails is one part, several are sent at once, and each is an object with a digest of its own.
PART_BYTES = 64 * 2**20
RECEIPT = re.compile(r"receipt-(0|[1-9][0-9]*)\.json")
FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]*)/([0-9]{6})-([^/]+)")
EVALUATIONS = re.compile(r"evaluations-([0-9]{6})\.json")
OWNER = re.compile(r"owners/([0-9]{6})\.json")
FOUND = re.compile(r"owners/([0-9]{6})\.found\.json")
VARIABLE = "KEEPSTEP_MIRROR"  # of the environment, where the recipe names no mirror
SCHEMES = ("s3", "gs", "az", "hf", "file")
HUB_BUCKET = re.compile(r"buckets(/(?!\.\.?(/|$))[\w.-]+){2}(/(?!\.\.?(/|$))[^/]+)*/?", re.ASCII)
CLAIMS = "claims"  # where a store creates nothing for one of many: who wants to
HISTORY = "history"  # of the run: what run.json and events.jsonl held at the last upload


@dataclass(frozen=True)
class Part:
    """One object: a file, or a part of one.

    Attributes:
        name: of the object, below the checkpoint's folder.
        file: of the checkpoint.
        begin: where in the file it begins, in bytes.
        bytes: how many they are.
        xxh3_128: their digest; empty where it is not known yet.
    """

    name: str
    file: str
    begin: int
    bytes: int
    xxh3_128: str = ""


@dataclass(frozen=True)
class Copied:
    """A checkpoint on a mirror.

    Attributes:
        step: optimizer steps completed.
        owner: number of the owner that wrote it.
        folder: its name, below the run's prefix.
    """

    step: int
    owner: int
    folder: str


@dataclass(frozen=True)
class Found:
    """What an owner found when it took over.

    Attributes:
        owner: its number.
        folders: the checkpoints that were there.
    """

    owner: int = 0
    folders: frozenset[str] = frozenset()


def address_fault(mirror: str) -> str | None:
    """Why that is no address of a mirror; None: it is one."""
    parts = urlsplit(mirror)
    if parts.scheme != "file" and "@" in parts.netloc:  # and they are not said once more
        return f"{parts.scheme}://…: credentials are the environment's, and no part of an address"
    if "?" in mirror or "#" in mirror:  # a signature, maybe
        shown = re.split("[?#]", mirror)[0]
        return f"{shown}?…: it names a folder; a ? or # in a name is written %3F or %23"
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{name}://…" for name in SCHEMES)
        return f"{mirror}: a mirror is one of {known}"
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        return f"{mirror}: a folder's address has three slashes, as in file:///mnt/mirror"
    if parts.scheme != "file" and not parts.netloc:
        return f"{mirror}: it names no bucket"
    if parts.scheme == "hf" and not HUB_BUCKET.fullmatch(parts.netloc + parts.path):
        return f"{mirror}: a bucket of the Hub is hf://buckets/owner/name, or a folder below that"
    if re.search(r"/\.{0,2}/", parts.path.removesuffix("/") + "/"):
        return f"{mirror}: no folder is called by nothing, . or .."
    return None


def url_of(mirror: str, output_dir: str | None) -> str:
    """Where a run is mirrored: below the address that is asked for, by its folder's name."""
    return f"{mirror.rstrip('/')}/{quote(os.path.basename(os.path.abspath(output_dir or '')))}"


def folder_of(step: int, owner: int, token: str) -> str:
    """Where an owner puts the checkpoint of a step."""
    return f"{folder_name(step)}/{owner:06d}-{token}"


def parts_of(files: Mapping[str, int], size: int = PART_BYTES) -> Iterator[Part]:
    """The objects that files (name → bytes) become."""
    for name, total in files.items():
        if total <= size:
            yield Part(name, name, 0, total)
            continue
        for number, begin in enumerate(range(0, total, size)):
            bytes_ = min(size, total - begin)
            yield Part(f"{name}.part-{number:05d}", name, begin, bytes_)


def receipt_of(parts: Sequence[Part], of: str) -> bytes:
    """What a machine says that it has uploaded.

    Args:
        of: a digest of the checkpoint's manifest: another state of the same step has another.
    """
    return json.dumps({"of": of, "parts": [asdict(part) for part in parts]}).encode()


def is_receipt_of(text: bytes, of: str) -> bool:
    """Whether it is one of the checkpoint of that manifest.

    Raises:
        TextError: it is none at all.
    """
    told = parse(text.decode(errors="replace"))
    return isinstance(told, dict) and told.get("of") == of


def read_receipt(text: bytes) -> list[Part]:
    """
    Raises:
        TextError: it is none.
    """
    told = parse(text.decode(errors="replace"))
    if not isinstance(told, dict) or not isinstance(told.get("parts"), list):
        raise TextError("it is no receipt of an upload")
    return [build(Part, part) for part in told["parts"]]


def evaluations_of(folder: str, names: Iterable[str]) -> list[str]:
    """The objects that tell what was measured of a checkpoint afterwards: the newest first."""
    prefix = f"{folder}/"
    own = [n for n in names if n.startswith(prefix) and EVALUATIONS.fullmatch(n[len(prefix) :])]
    return sorted(own, reverse=True)


def next_evaluations(folder: str, known: Sequence[str]) -> str:
    """The name of the object after these (as `evaluations_of` has them)."""
    match = EVALUATIONS.search(known[0]) if known else None
    return f"{folder}/evaluations-{int(match[1]) + 1 if match else 1:06d}.json"


def distinct(parts: Iterable[Part]) -> list[Part]:
    """Each object once: two machines may have sent the same file of a checkpoint."""
    return list({part.name: part for part in parts}.values())


def what_is_missing(manifest: Manifest, parts: Iterable[Part]) -> list[str]:
    """Files of a checkpoint that these objects are not: its uploads are not all done."""
    reached = dict.fromkeys(manifest.files, 0)
    for part in sorted(parts, key=lambda part: part.begin):
        if reached.get(part.file) == part.begin:
            reached[part.file] += part.bytes
    return [name for name, entry in manifest.files.items() if reached[name] != entry.bytes]


def copied(names: Iterable[str], found: Found = Found()) -> list[Copied]:
    """The checkpoints that are there, by the names of all objects below the run's prefix: of a step
    the newest owner's. The oldest step first.

    Args:
        found: by the newest owner that has said so: of earlier ones nothing else counts, as what
            one of them has added since.
    """
    newest: dict[int, Copied] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        match = FOLDER.fullmatch(folder)
        if match is None or file != MANIFEST_NAME:
            continue
        step, owner = int(match[1]), int(match[2])
        if owner < found.owner and folder not in found.folders:
            continue
        known = newest.get(step)
        if known is None or (owner, folder) > (known.owner, known.folder):
            newest[step] = Copied(step, owner, folder)
    return [newest[step] for step in sorted(newest)]


def left_behind(names: Iterable[str], owner: int, whole: Iterable[Copied]) -> dict[str, list[str]]:
    """What nobody counts, by folder, its manifest first: uploads that never ended (of this owner:
    that were given up), checkpoints whose manifest went before them, those that a newer owner has
    replaced, and what came of owners that were none any more.

    Args:
        whole: the checkpoints that count.
    """
    counted = {one.folder for one in whole}
    behind: dict[str, list[str]] = {}
    for name in names:
        match = FOLDER.match(name)
        if match is not None and match[0] not in counted and int(match[2]) <= owner:
            behind.setdefault(match[0], []).append(name)
    return {
        folder: sorted(objects, key=lambda name: (not name.endswith(f"/{MANIFEST_NAME}"), name))
        for folder, objects in sorted(behind.items())
    }


def claims_left(names: Collection[str], owner: int) -> list[str]:
    """Claims (mirror/claims.py) of who has died with one: to be an owner before this one, or of an
    object that is there."""
    found = []
    for name in names:
        claimed = name.removeprefix(f"{CLAIMS}/").rpartition("/")[0]
        match = OWNER.fullmatch(claimed)
        if name.startswith(f"{CLAIMS}/") and (
            claimed in names or (match is not None and int(match[1]) < owner)
        ):
            found.append(name)
    return found


def owner_name(number: int) -> str:
    """The object that makes somebody an owner."""
    return f"owners/{number:06d}.json"


def found_name(number: int) -> str:
    """The object in which an owner says what it found."""
    return f"owners/{number:06d}.found.json"


def found_of(folders: Iterable[str]) -> bytes:
    """What is in it."""
    return json.dumps({"found": sorted(folders)}).encode()


def read_found(owner: int, text: bytes) -> Found:
    """
    Raises:
        TextError: it is none.
    """
    told = parse(text.decode(errors="replace"))
    folders = told.get("found") if isinstance(told, dict) else None
    if not isinstance(folders, list) or not all(isinstance(name, str) for name in folders):
        raise TextError(f"{found_name(owner)} does not say what its owner found")
    return Found(owner, frozenset(folders))


def newest_owner(names: Iterable[str]) -> int:
    """The number of the newest owner, by the names of all objects; 0: there is none."""
    matches = (OWNER.fullmatch(name) for name in names)
    return max((int(match[1]) for match in matches if match), default=0)


def owners_that_found(names: Iterable[str]) -> list[int]:
    """Numbers of the owners that have said what they found, the newest first."""
    matches = (FOUND.fullmatch(name) for name in names)
    return sorted((int(match[1]) for match in matches if match), reverse=True)

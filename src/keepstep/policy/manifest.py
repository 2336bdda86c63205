"""What a checkpoint is, and when it is complete. Pure: no disk, no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from keepstep.errors import KeepstepError
from keepstep.policy.batch import Dealt
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.strict import TextError, UnknownFieldError, build, names_fault, parse, shown

FORMAT_VERSION = 2
WITHOUT_DIGEST = 1  # the format that has no digest of itself
MANIFEST_NAME = "manifest.json"
# The manifest of the whole, in a checkpoint of which this machine has a part (`node_local`).
WHOLE_NAME = "manifest.whole.json"
LONGEST_MANIFEST = 16 * 2**20  # bytes: room for the files of some ten thousand ranks
MOST = 10**5  # files, and so ranks: every one has a file
BEGINNING = re.compile(r'\{\n "digest": "([0-9a-f]{64})",\n')
XXH3_128 = re.compile(r"[0-9a-f]{32}")
FOLDER_PATTERN = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


# What numbers can be; beyond that they would be believed, and cost a day.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "format_version": (WITHOUT_DIGEST, FORMAT_VERSION),
    "attempt": (0, 10**9),
    "parent": (0, 10**15),
    "global_step": (0, 10**15),
    "epoch": (0, 10**9),
    "samples": (0, 10**18),
    "world_size": (1, MOST),
    "zero_stage": (0, 3),
    "planned_steps": (0, 10**15),
    "save_seconds": (0, 10**9),
}
# Of what is free otherwise: what a resume or a model card reckons with.
INNER: Mapping[str, Mapping[str, Any]] = {
    "settings": {"seed": int, "learning_rate": float | None},
    "health": {
        **{"finite": bool, "loss": float, "grad_norm": float},
        "window": tuple[tuple[float, float | None], ...],
    },
    "about": {
        **{"tokens": int | None, "train_seconds": float, "parameters": int, "trained": int},
        **{"card": dict[str, Any] | None, "base_model": str | None},
    },
}


class ManifestError(KeepstepError, ValueError):
    """A manifest that cannot be read: not what was written, or not of a checkpoint."""


class NewerFormatError(ManifestError):
    """A manifest that a newer keepstep wrote: it is no damage, and cannot be judged by this one."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: the rank that wrote it, its size, its xxh3-128 digest in hex."""

    rank: int
    bytes: int
    xxh3_128: str

    def __reduce__(self) -> tuple[type[FileEntry], tuple[int, int, str]]:
        # As it is made: field by field, dataclasses do it at a third of the speed.
        return FileEntry, (self.rank, self.bytes, self.xxh3_128)


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about one committed checkpoint.

    Attributes:
        run_id: random name of the run, the same in all its checkpoints.
        attempt: which launch of the run wrote it, counted from 1.
        parent: the step of the checkpoint that this attempt resumed from; None: from the start.
        global_step: optimizer steps completed.
        epoch: passes over the training data completed, a fraction.
        samples: training rows drawn, over all ranks, since the start of the run; None: not known.
        metrics: the evaluation at this step (`eval_loss`, …); empty when none was made here.
        world_size: processes that wrote it.
        zero_stage: DeepSpeed's ZeRO stage, 0 for DDP or a single process.
        deepspeed: whether DeepSpeed wrote it; with `zero_stage` 0 it shards nothing.
        dtype: the weights' type, as in `float32`.
        adapter: True when only an adapter (LoRA) is stored, not the base model.
        planned_steps: how many optimizer steps the run was to have; 0: not known.
        settings: what determines the trajectory (learning rate, seed, data, …), to find drift.
        health: `finite`: whether the state is; the last `loss` and `grad_norm` logged; `window`:
            what a spike is seen by.
        versions: of the main libraries.
        saved_at: UTC, ISO 8601.
        save_seconds: how long training stood still for it.
        files: path relative to the checkpoint → `FileEntry`; the manifest itself is not in it.
        origin: where it came from, if not from a run of keepstep (`keepstep adopt`).
        evaluation_due: an evaluation of this step was due, and had not been made to its end when
            the state was stored: a run that goes on from here makes it up first.
        dealt: how the rows of a step were shared out (`Dealt`); empty: not known.
        about: for the model card: base model, data, license, sizes, hardware, tokens, seconds.
        format_version: of the manifest's text.
    """

    run_id: str
    attempt: int
    parent: int | None
    global_step: int
    epoch: float
    samples: int | None
    metrics: dict[str, float]
    world_size: int
    zero_stage: int
    dtype: str
    adapter: bool
    planned_steps: int
    settings: dict[str, Any]
    health: dict[str, Any]
    versions: dict[str, str]
    saved_at: str
    save_seconds: float
    files: dict[str, FileEntry] = field(default_factory=dict)
    origin: str = ""
    evaluation_due: bool = False
    dealt: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    deepspeed: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    @property
    def is_finite(self) -> bool:
        """Whether its state is, as far as it is known."""
        return bool(self.health.get("finite", True))

    @property
    def is_part(self) -> bool:
        """Whether it lists one machine's part of a checkpoint: nothing to go on from alone."""
        return WHOLE_NAME in self.files

    @property
    def parallel_layout(self) -> ParallelLayout:
        """The processes that wrote it."""
        return ParallelLayout(self.world_size, self.zero_stage, self.deepspeed)

    @property
    def has_digest(self) -> bool:
        """Whether the manifest itself could be checked when it was read."""
        return self.format_version != WITHOUT_DIGEST

    def to_json(self) -> str:
        """The manifest as it is stored, with a SHA-256 of its text without the line of that.

        Raises:
            ValueError: it holds what JSON does not: NaN, infinity.
        """
        values = asdict(self) | {"format_version": FORMAT_VERSION}
        text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f'{{\n "digest": "{digest}",\n{text[2:]}'

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            NewerFormatError: a newer keepstep wrote it.
            ManifestError: the text is not what was written, or no manifest; nothing else is raised,
                whatever the text.
        """
        if len(text) > LONGEST_MANIFEST:
            raise ManifestError(f"not a manifest: it has more than {LONGEST_MANIFEST} characters")
        try:
            values = parse(text)
            if not isinstance(values, dict):
                raise TextError("it is no object")
            version = build(int, values.get("format_version"), "format_version")
            if version != WITHOUT_DIGEST:
                _check_digest(text, values)  # every later format begins with it, too
            if version > FORMAT_VERSION:
                raise NewerFormatError(_newer(f"manifest format {version}"))
            manifest: Manifest = build(Manifest, values)
            _check(manifest)
        except UnknownFieldError as error:
            raise NewerFormatError(_newer(f"{error}, that this one does not know")) from error
        except TextError as error:
            raise ManifestError(f"not a manifest: {error}") from error
        return manifest


def _newer(seen: str) -> str:
    return (
        f"written by a newer keepstep: {seen}; this one reads up to format {FORMAT_VERSION}. "
        "Hint: upgrade keepstep"
    )


def _check_digest(text: str, values: dict[str, Any]) -> None:
    """Take the digest out of `values` if it is that of `text`."""
    match = BEGINNING.match(text)
    stated = values.pop("digest", None)
    if match is None or match[1] != stated:
        raise TextError("it does not begin with its digest")
    body = "{\n" + text[match.end() :]
    if hashlib.sha256(body.encode()).hexdigest() != stated:
        raise TextError("its digest differs: it is not what was written")


def _check(manifest: Manifest) -> None:
    """Fields of the right types are those of a checkpoint.

    Raises:
        TextError: they cannot be.
    """
    for name, (low, high) in BOUNDS.items():
        value = getattr(manifest, name)
        if value is not None and not low <= value <= high:
            raise TextError(f"{name} is {value}, not from {low} to {high}")
    for name, kinds in INNER.items():
        values = getattr(manifest, name)
        for inner in kinds.keys() & values.keys():
            build(kinds[inner], values[inner], f"{name}.{inner}")
    dealt, rows = Dealt.from_json(manifest.dealt), manifest.settings.get("rows_per_step")
    if dealt is not None and rows not in (None, dealt.batch.rows):
        raise TextError(f"dealt is {dealt.batch}, and rows_per_step is {shown(str(rows))}")
    _check_files(manifest.files)


def _check_files(files: Mapping[str, FileEntry]) -> None:
    if len(files) > MOST:
        raise TextError(f"files: there are {len(files)}, {MOST} are the most")
    for name, entry in files.items():
        if not (0 <= entry.rank < MOST and 0 <= entry.bytes < 2**63):
            raise TextError(f"files: {shown(name)}: {entry.bytes} bytes of rank {entry.rank}")
        if XXH3_128.fullmatch(entry.xxh3_128) is None:
            raise TextError(f"files: {shown(name)}: its digest is {shown(entry.xxh3_128)}")
    fault = names_fault(files)
    if fault is not None:
        raise TextError(f"files: {fault}")
    if MANIFEST_NAME in files:
        raise TextError(f"files: {MANIFEST_NAME} cannot list itself")


def folder_name(step: int) -> str:
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step in a folder name, None when the name is not exactly `checkpoint-<step>`."""
    match = FOLDER_PATTERN.fullmatch(name)
    return int(match.group(1)) if match else None


def finite_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of an evaluation's report: JSON has no NaN, and NaN never wins."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }

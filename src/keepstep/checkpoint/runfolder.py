"""What a run folder holds: list, verify, explain. Nothing is changed; no torch is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    differences,
    folder_name,
    step_of,
)
from .retention import Decision, Policy, Record, plan_retention
from .selection import Candidate
from .storage import digest_of, sizes_under

PRIVATE = ".keepstep"


@dataclass(frozen=True)
class Committed:
    """One committed checkpoint: where it lies and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.global_step


class RunFolder:
    """A run's folder (`output_dir`), for reading. No rank, no torch, nothing is changed."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.private = self.path / PRIVATE
        self.staging = self.private / "staging"
        self.trash = self.private / "trash"
        self.events = self.private / "events.jsonl"
        self.identity = self.private / "run.json"
        self.status = self.private / "status.json"

    def run_id(self) -> str | None:
        """The run's name, None in a folder that no run has used."""
        try:
            return str(json.loads(self.identity.read_text())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            newest = self.checkpoints(any_run=True)[-1:]
            return newest[0].manifest.run_id if newest else None

    def checkpoints(self, any_run: bool = False) -> list[Committed]:
        """This run's committed checkpoints, oldest step first.

        Folders without a readable manifest of this run are somebody else's: never listed, never
        touched. A link is not followed.
        """
        found = [c for c in map(_read, self._folders()) if isinstance(c, Committed)]
        if not any_run:
            run_id = self.run_id()
            found = [c for c in found if c.manifest.run_id == run_id]
        return sorted(found, key=lambda c: c.step)

    def unreadable(self) -> dict[str, str]:
        """Folders named like checkpoints whose manifest cannot be read: name → what is wrong."""
        read = ((folder.name, _read(folder)) for folder in self._folders())
        return {name: fault for name, fault in read if isinstance(fault, str)}

    def faults(self, checkpoint: Committed, deep: bool = False) -> list[str]:
        """What differs from the manifest: ranks, names and sizes; with `deep`, digests too."""
        found = differences(checkpoint.manifest, sizes_under(checkpoint.path))
        if deep and not found:
            found = [
                f"{name}: content has changed (xxh3-128 differs)"
                for name, entry in sorted(checkpoint.manifest.files.items())
                if digest_of(checkpoint.path / name) != entry.xxh3_128
            ]
        return found

    def candidates(self) -> list[Candidate]:
        """Every committed checkpoint with its faults, for `selection`."""
        return [Candidate(c.step, tuple(self.faults(c))) for c in self.checkpoints()]

    def policy(self) -> Policy:
        """The retention policy of the newest attempt; nothing is ranked in a folder without one."""
        try:
            return Policy(**json.loads(self.identity.read_text())["policy"])
        except (OSError, ValueError, KeyError, TypeError):
            return Policy()

    def attempts(self) -> int:
        """How many times the run has been launched."""
        try:
            with open(self.events) as file:
                return sum('"event": "attempt"' in line for line in file)
        except FileNotFoundError:
            return 0

    def _folders(self) -> list[Path]:
        try:
            entries = sorted(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [
            entry
            for entry in entries
            if step_of(entry.name) is not None and entry.is_dir() and not entry.is_symlink()
        ]


def records_of(checkpoints: list[Committed], policy: Policy) -> list[Record]:
    """What retention looks at, taken from the manifests."""
    return [Record(c.step, c.manifest.metrics.get(policy.metric or "")) for c in checkpoints]


def retention_of(run: RunFolder) -> list[Decision]:
    """The retention plan of a run folder, under the policy that it was last run with."""
    policy = run.policy()
    return plan_retention(records_of(run.checkpoints(), policy), policy)


def _read(folder: Path) -> Committed | str | None:
    """The checkpoint in `folder`; a text when its manifest is bad; None when it has none."""
    try:
        text = (folder / MANIFEST_NAME).read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"{MANIFEST_NAME}: {error}"
    try:
        manifest = Manifest.from_json(text)
    except ManifestError as error:
        return str(error)
    if folder.name != folder_name(manifest.global_step):
        return f"its manifest is of step {manifest.global_step}"
    return Committed(folder, manifest)

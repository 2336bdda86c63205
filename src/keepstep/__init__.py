"""keepstep: fine-tune language models; kill it at any moment, and the same command carries on.

    from keepstep import KeepstepConfig, KeepstepTrainer  # to train: SFTTrainer that carries on
    from keepstep import RunFolder, export                # to look at what a run has saved

`__all__` is the public surface; what is imported from deeper modules may move. A name is looked up
when it is first asked for: `import keepstep` loads no torch, and neither do the names that only
read a run folder, so that `keepstep ls` answers in well under a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_PLACES` says the same (a test compares them)
    from keepstep.convert.adopt import Adopted as Adopted
    from keepstep.convert.adopt import AdoptError as AdoptError
    from keepstep.convert.api import adopt as adopt
    from keepstep.convert.api import export as export
    from keepstep.convert.export import Exported as Exported
    from keepstep.convert.export import ExportError as ExportError
    from keepstep.errors import KeepstepError as KeepstepError
    from keepstep.policy.manifest import Manifest as Manifest
    from keepstep.policy.manifest import ManifestError as ManifestError
    from keepstep.policy.retention import Decision as Decision
    from keepstep.policy.retention import Policy as Policy
    from keepstep.policy.retention import Record as Record
    from keepstep.policy.retention import plan_retention as plan_retention
    from keepstep.policy.selection import SelectionError as SelectionError
    from keepstep.policy.selection import UnreadableError as UnreadableError
    from keepstep.ranks.outcome import Outcome as Outcome
    from keepstep.recipe.arguments import CheckpointArguments as CheckpointArguments
    from keepstep.recipe.config import KeepstepConfig as KeepstepConfig
    from keepstep.recipe.problems import ConfigError as ConfigError
    from keepstep.recipe.problems import Problem as Problem
    from keepstep.run_folder.checkpoint import Checkpoint as Checkpoint
    from keepstep.run_folder.checkpoint import DamagedError as DamagedError
    from keepstep.run_folder.reader import RunFolder as RunFolder
    from keepstep.trainer.mixin import CheckpointMixin as CheckpointMixin
    from keepstep.trainer.sft import KeepstepTrainer as KeepstepTrainer

__version__ = "0.2.0.dev0"

__all__ = [
    "AdoptError",
    "Adopted",
    "Checkpoint",
    "CheckpointArguments",
    "CheckpointMixin",
    "ConfigError",
    "DamagedError",
    "Decision",
    "ExportError",
    "Exported",
    "KeepstepConfig",
    "KeepstepError",
    "KeepstepTrainer",
    "Manifest",
    "ManifestError",
    "Outcome",
    "Policy",
    "Problem",
    "Record",
    "RunFolder",
    "SelectionError",
    "UnreadableError",
    "adopt",
    "export",
    "plan_retention",
]

_PLACES = {  # public name → module:name there
    "AdoptError": "keepstep.convert.adopt:AdoptError",
    "Adopted": "keepstep.convert.adopt:Adopted",
    "Checkpoint": "keepstep.run_folder.checkpoint:Checkpoint",
    "CheckpointArguments": "keepstep.recipe.arguments:CheckpointArguments",
    "CheckpointMixin": "keepstep.trainer.mixin:CheckpointMixin",
    "ConfigError": "keepstep.recipe.problems:ConfigError",
    "DamagedError": "keepstep.run_folder.checkpoint:DamagedError",
    "Decision": "keepstep.policy.retention:Decision",
    "ExportError": "keepstep.convert.export:ExportError",
    "Exported": "keepstep.convert.export:Exported",
    "KeepstepConfig": "keepstep.recipe.config:KeepstepConfig",
    "KeepstepError": "keepstep.errors:KeepstepError",
    "KeepstepTrainer": "keepstep.trainer.sft:KeepstepTrainer",
    "Manifest": "keepstep.policy.manifest:Manifest",
    "ManifestError": "keepstep.policy.manifest:ManifestError",
    "Outcome": "keepstep.ranks.outcome:Outcome",
    "Policy": "keepstep.policy.retention:Policy",
    "Problem": "keepstep.recipe.problems:Problem",
    "Record": "keepstep.policy.retention:Record",
    "RunFolder": "keepstep.run_folder.reader:RunFolder",
    "SelectionError": "keepstep.policy.selection:SelectionError",
    "UnreadableError": "keepstep.policy.selection:UnreadableError",
    "adopt": "keepstep.convert.api:adopt",
    "export": "keepstep.convert.api:export",
    "plan_retention": "keepstep.policy.retention:plan_retention",
}

if not TYPE_CHECKING:  # a type checker takes a module with this for one that has every name

    def __getattr__(name: str) -> Any:
        """A public name, from the module that defines it."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        module, _, inner = _PLACES[name].partition(":")
        value = getattr(importlib.import_module(module), inner)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

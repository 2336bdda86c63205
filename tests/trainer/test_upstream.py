"""The table of foreign hooks is whole, and what does not fit it is refused when a class is made."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from transformers import Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

import keepstep
from keepstep.trainer import upstream_check
from keepstep.trainer.mixin import CheckpointMixin
from keepstep.trainer.sft import KeepstepTrainer
from keepstep.trainer.upstream import HOOKS, TESTED, Hook
from keepstep.trainer.upstream_check import UpstreamError, foreign_fault, foreign_faults, resolve
from tests.helpers.ranks import ROOT

# Private names that are no library's of the table: Python's own, and what no code relies on.
OTHERS = {
    "_actions": "argparse",
    "_exit": "os",
    "_replace": "typing.NamedTuple",
}
# No training needs these, and none is refused for them: tests/cli/test_completion runs them.
OF_COMMANDS = {
    "typer._completion_classes.completion_init",
    "typer._completion_shared.get_completion_script",
}


@pytest.fixture(autouse=True)
def compared_anew() -> Iterator[None]:
    foreign_faults.cache_clear()
    yield
    foreign_faults.cache_clear()


def overrides() -> Iterator[tuple[type, str, str]]:
    """Classes of libraries, a name that one of keepstep's has as well, and which."""
    for module in pkgutil.walk_packages(keepstep.__path__, "keepstep."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or kind.__module__ != module.name:
                continue
            for base in kind.__mro__[1:]:
                if base.__module__.split(".")[0] not in TESTED:
                    continue
                for name in vars(kind).keys() & vars(base).keys() - {"_abc_impl"}:
                    if not name.startswith("__") or (name == "__init__" and base is Trainer):
                        yield base, name, kind.__name__


def test_every_override_is_in_the_table_and_the_reverse() -> None:
    """Of whatever class of these libraries, wherever in keepstep."""
    hooks = {(resolve(h.owner), h.name): h for h in HOOKS if h.kind in ("overridden", "replaced")}
    found, missing = set(), []
    for base, name, kind in overrides():
        rows = [key for key in hooks if key[1] == name]
        fitting = {k for k in rows if issubclass(base, k[0]) or issubclass(k[0], base)}
        found |= fitting
        missing += [] if fitting else [f"{kind}.{name} overrides {base.__qualname__}'s"]
    assert missing == [], "src/keepstep/trainer/upstream.py has no row for these"
    idle = {key for key, hook in hooks.items() if hook.kind == "overridden"} - found
    assert idle == set(), "nothing overrides these any more"


def private_names() -> dict[str, str]:
    """Private names that keepstep's code uses and does not define → where."""
    used, own = {}, set()
    for path in sorted((ROOT / "src/keepstep").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("keepstep"):
                used |= {alias.name: f"{path.name}:{node.lineno}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                used.setdefault(node.attr, f"{path.name}:{node.lineno}")
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
                    own.add(node.attr)
    private = {n: place for n, place in used.items() if n.startswith("_") and n[1] != "_"}
    return {name: place for name, place in private.items() if name not in own}


def private_modules() -> set[str]:
    """`module.name` of what is imported from private modules of other libraries."""
    found = set()
    for path in sorted((ROOT / "src/keepstep").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = str(getattr(node, "module", ""))
            private = any(part.startswith("_") for part in module.strip("_").split("."))
            if isinstance(node, ast.ImportFrom) and private:
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_no_row_stands_twice() -> None:
    rows = Counter((hook.owner, hook.name, hook.kind) for hook in HOOKS)
    assert [row for row, count in rows.items() if count > 1] == []


def test_every_private_name_of_a_library_is_in_the_table() -> None:
    known = {hook.name for hook in HOOKS} | OTHERS.keys()
    assert {n: where for n, where in private_names().items() if n not in known} == {}
    assert private_modules() - OF_COMMANDS <= {f"{hook.owner}.{hook.name}" for hook in HOOKS}
    assert private_modules() >= OF_COMMANDS
    assert OTHERS.keys() <= private_names().keys()


def test_the_table_fits_what_is_installed() -> None:
    for trainer in (KeepstepTrainer, *made()):
        upstream_check.check(trainer, CheckpointMixin)


def made() -> list[type]:
    """Two lines each."""

    class OfTransformers(CheckpointMixin, Trainer): ...

    class OfPreferences(CheckpointMixin, DPOTrainer): ...

    class OfRewards(CheckpointMixin, RewardTrainer): ...

    return [OfTransformers, OfPreferences, OfRewards]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.owner}.{hook.name}")
def test_every_row_can_fail(hook: Hook) -> None:
    """What has been renamed, or has got another first parameter, is found missing."""
    assert foreign_fault(hook) is None
    assert foreign_fault(replace(hook, name=f"{hook.name}_of_old")) is not None
    assert foreign_fault(replace(hook, owner=f"{hook.owner}_of_old")) is not None
    if hook.parameters:
        shifted = replace(hook, parameters=("and_more", *hook.parameters))
        assert "found (" in str(foreign_fault(shifted))


def test_pinned_versions_are_the_tested_ones() -> None:
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]]
    assert {name: version for name, version in pins if name in TESTED} == TESTED
    assert {hook.library for hook in HOOKS} <= TESTED.keys()


def refusal() -> str:
    with pytest.raises(UpstreamError) as refused:
        made()
    assert isinstance(refused.value, ImportError)
    return str(refused.value)


def test_a_renamed_method_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_keep_checkpoint", Trainer._save_checkpoint, raising=False)
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    told = refusal()
    assert "  transformers 5" in told
    assert "transformers.Trainer._save_checkpoint: expected (model, trial, …), to override" in told
    assert "found nothing of that name" in told
    assert f"Hint: these are tested: pip install transformers=={TESTED['transformers']}" in told


def test_a_method_that_nothing_calls_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old name may stay behind for those who call it; an override of it has no effect."""

    def other(self: Any, *args: Any, **kwargs: Any) -> None:
        self._keep_checkpoint()

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", other)
    told = refusal()
    assert "Trainer._save_checkpoint: expected that the library calls it; nothing in it" in told


def test_other_parameters_of_a_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own version of a method counts, too."""

    def other(self: Any, trial: Any, model: Any) -> None: ...

    monkeypatch.setattr(DPOTrainer, "_save_checkpoint", other, raising=False)
    told = refusal()
    assert "  trl 1" in told
    assert "DPOTrainer._save_checkpoint: expected (model, trial, …); found (trial, model)" in told


def test_a_renamed_part_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DeepSpeedZeroOptimizer, "update_lp_params")
    told = refusal()
    assert "  deepspeed 0" in told
    assert "DeepSpeedZeroOptimizer.update_lp_params: expected (…); found nothing" in told


def test_an_event_that_the_trainer_tells_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback is asked for nothing then, and nobody would notice a stop."""

    def other(self: Any, *args: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(Trainer, "_run_epoch", other)
    told = refusal()
    assert "TrainerCallback.on_step_end: expected that transformers.Trainer calls it" in told


def test_a_mixin_behind_the_trainer() -> None:
    """Then the Trainer's own methods win, and nothing of keepstep's is called."""
    with pytest.raises(UpstreamError, match=r"expected: class Late\(CheckpointMixin, DPOTrainer\)"):

        class Late(DPOTrainer, CheckpointMixin): ...


def test_a_person_may_override_as_well() -> None:
    class Mine(CheckpointMixin, SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Again(Mine):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log(logs, *args)

    assert Again.log is not CheckpointMixin.log

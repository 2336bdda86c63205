"""What some Trainers hold outside of model, optimizer, scheduler and rows: it is in no checkpoint.

Carried on without it, a run would go on as another one; so it is refused when the trainer is made,
by the name of the field that asks for it (docs/other-trainers.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keepstep.recipe.problems import Problem


def check_restorable(args: Any, name: str, model: Any = None) -> Iterator[Problem]:
    """Everything that a Trainer is asked for and a resume could not give back (trl 1.16).

    Ranks: any; the same everywhere.

    Args:
        args: its config.
        name: its class's.
        model: what it is given to train: a name, an object, or None.
    """
    if model is not None and not isinstance(model, (str, PreTrainedModel, PeftModel)):
        yield _problem(
            f"model: {type(model).__name__} is no PreTrainedModel of transformers and no "
            "PeftModel: it has no configuration and no `save_pretrained`, of which a checkpoint is "
            "made",
            "a subclass of transformers.PreTrainedModel around it",
        )
    if getattr(args, "sync_ref_model", False):
        yield _problem(
            f"sync_ref_model: the reference model that {name} changes as it trains is in no "
            "checkpoint",
            "sync_ref_model: false",
        )
    if getattr(args, "use_adaptive_entropy", False):
        yield _problem(
            f"use_adaptive_entropy: the coefficient that {name} adapts is in no checkpoint",
            "use_adaptive_entropy: false, and entropy_coef for a fixed one",
        )
    yield from _completions(args, name)
    if getattr(args, "use_vllm", False):
        yield _problem(
            f"use_vllm: vLLM has random numbers of its own: {name} carries on with its weights and "
            "optimizer, and samples other completions than an undisturbed run",
            "",
            "warning",
        )


def _completions(args: Any, name: str) -> Iterator[Problem]:
    """Completions that are trained on in several optimizer steps lie in memory between these."""
    per_generation = getattr(args, "steps_per_generation", None)
    if per_generation is None:
        return
    turns = per_generation * getattr(args, "num_iterations", 1)
    if args.gradient_accumulation_steps % turns:
        yield _problem(
            f"{name} trains on the same completions in several optimizer steps "
            f"(steps_per_generation: {per_generation} x num_iterations: "
            f"{getattr(args, 'num_iterations', 1)}, gradient_accumulation_steps: "
            f"{args.gradient_accumulation_steps}), and they are in no checkpoint",
            f"gradient_accumulation_steps: a multiple of {turns}",
        )


def _problem(what: str, hint: str, severity: Any = "error") -> Problem:
    return Problem(what, hint, "not-restored", severity)

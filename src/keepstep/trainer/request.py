"""What `train()` is asked for: one meaning for each value of `resume_from_checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keepstep.policy.selection import WORDS
from keepstep.recipe.arguments import CheckpointArguments
from keepstep.trainer.program import PLAIN


def request_of(value: Any, training: CheckpointArguments) -> str:
    """The request, as the config's `resume_from_checkpoint` has it: a word, a step or a path.

    `None` and `True` mean what the config says. transformers' `False` is "from the beginning", and
    so it is here: `never`.

    Args:
        value: what `train()` is given.
        training: the config.

    Raises:
        ValueError: it is nothing of these; or the config asks for something else.
    """
    configured = str(training.resume_from_checkpoint or "auto")
    if value is True and configured == "never":
        raise ValueError(_contradiction(value, configured))
    if value is None or value is True:
        return configured
    if value is False:
        request = "never"
    elif isinstance(value, (str, int, os.PathLike)):
        request = os.path.expanduser(os.fspath(value)) if not isinstance(value, int) else str(value)
    else:
        raise ValueError(f"resume_from_checkpoint: {value!r} is no word, no step and no path")
    if request not in WORDS and not request.isdecimal() and os.sep not in request:
        if not os.path.isdir(request):
            raise ValueError(
                f"resume_from_checkpoint: {request!r} is none of {', '.join(WORDS)}, no step, and "
                "no path"
            )
        request = os.path.join(os.curdir, request)
    if configured not in ("auto", request):
        raise ValueError(_contradiction(value, configured))
    return request


def plain_fields(args: Any) -> dict[str, Any]:
    """The fields of a config that are numbers, texts or flags, or not set."""
    return {name: value for name, value in vars(args).items() if isinstance(value, PLAIN)}


def check_unchanged(made: Mapping[str, Any], args: Any) -> None:
    """The config is what the trainer was made with: its settings are what a resume compares.

    Args:
        made: `plain_fields` of the trainer's `args`, when it was made.
        args: they, now.

    Raises:
        ValueError: a field was changed since.
    """
    changed = [name for name, value in made.items() if getattr(args, name) != value]
    if changed:
        raise ValueError(
            f"trainer.args was changed after the trainer was made: {', '.join(changed)}\n"
            "    Hint: set it in the config that the trainer is given"
        )


def _contradiction(value: Any, configured: str) -> str:
    return (
        f"train() is given resume_from_checkpoint={value!r}, and the config says "
        f"resume_from_checkpoint: {configured}\n    Hint: leave one of them out"
    )

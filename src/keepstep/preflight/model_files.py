"""Whether a model's files can be read here: libraries tell of one that cannot be as not there, or
hours later, as no fault of the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from keepstep.output.printable import first_few, printable
from keepstep.recipe.problems import Problem

KINDS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja")


def unreadable(model: str) -> Iterator[Problem]:
    """Files of a model's folder that this user cannot open, or that are links to nothing."""
    folder, named = Path(model).expanduser(), dict[str, list[str]]()
    for path in sorted(path for kind in KINDS for path in folder.glob(kind)):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            named.setdefault(os.strerror(error.errno or 0), []).append(printable(path.name))
    for why, names in named.items():
        yield Problem(
            f"model_name_or_path: {model}: {first_few(names)}: {why}",
            "the files have to be readable by the user that trains, and links to lead to them",
            "model",
        )

"""A user's function that a recipe names: `module:function`, or `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def named(text: str) -> Callable[..., Any]:
    """The function of that name. Its module is imported, which runs its code. Ranks: any.

    Modules are looked for in the working directory, too, beside where Python looks; what a file
    imports, in its own folder.

    Raises:
        ValueError: there is none.
    """
    place, _, name = text.rpartition(":")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("it is neither module:function nor path/to/file.py:function")
    try:
        found: Any = _file(Path(place)) if place.endswith(".py") else _module(place)
    except (Exception, SystemExit) as error:  # whatever the module's code raises
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{place} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} is of type {type(found).__name__}, and cannot be called")
    if isinstance(found, type):
        raise ValueError(f"{name} is a class, not a function")
    function: Callable[..., Any] = found
    return function


def _module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _file(path: Path) -> ModuleType:
    """The module in a file, under a name of its own."""
    path = path.expanduser().resolve()
    name = f"keepstep_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    _look_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a name that ends in .py there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    """Behind all other places: nothing there hides a library."""
    if str(folder) not in map(os.path.abspath, sys.path):
        sys.path.append(str(folder))

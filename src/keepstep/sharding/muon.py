"""DeepSpeed's Muon optimizer, imported without torch's compiler.

Every ZeRO engine imports it, to ask whether its optimizer is one (deepspeed 0.19.8). The module
compiles three functions as it is imported, and for that alone torch's compiler is imported: more
than a second of every start, of every rank.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from deepspeed.runtime import compiler

MODULE = "deepspeed.runtime.zero.muon.original_muon"


def import_muon() -> None:
    """Import the module, its functions to be compiled when one of them is called first.

    Nothing, where it has been imported, or where DeepSpeed has no such module. Ranks: any.
    """
    if MODULE in sys.modules:
        return
    made, compile_now = _Made(), compiler.compile
    compiler.compile = lambda: made.put_off
    try:
        importlib.import_module(MODULE)
    except ImportError:
        return
    finally:
        compiler.compile = compile_now
        made.compile = compile_now


class _Made:
    """The functions that the module has asked to be compiled."""

    def __init__(self) -> None:
        self.compile: Callable[[], Callable[[Any], Any]]
        self._functions: list[Any] = []

    def put_off(self, function: Any) -> Any:
        """What stands in the module in its place, until it is called."""
        self._functions.append(function)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._compile_all()
            return getattr(sys.modules[function.__module__], function.__name__)(*args, **kwargs)

        return called

    def _compile_all(self) -> None:
        """Together: they call each other, and are then compiled as one."""
        while self._functions:
            function = self._functions.pop(0)
            module = sys.modules[function.__module__]
            setattr(module, function.__name__, self.compile()(function))

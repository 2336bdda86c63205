"""What keepstep raises itself: one class above all of it, and facts in place of texts to search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

set_attribute = BaseException.__setattr__  # whatever the error's class thinks of new attributes


class KeepstepError(Exception):
    """Every error of keepstep's own. What libraries and the system raise, they raise as it is.

    Each has a second base where Python has a name for it (ValueError, LookupError, OSError, ...).
    The message says what was set, what was seen, and often what to do. An error can be pickled and
    copied, and is then of the same type, with the same message and attributes.

    Attributes:
        step: of the checkpoint that it is about; None: of none, or of several.
        path: the file or folder that it is about; None: of none.
        ranks: who met it; empty where it is nobody's in particular.
        errno: the system's number; None where the system gave none.
    """

    def __init__(
        self,
        *arguments: Any,
        step: int | None = None,
        path: Path | None = None,
        ranks: tuple[int, ...] = (),
        errno: int | None = None,
    ) -> None:
        super().__init__(*arguments)
        self.step = step
        self.path = path
        self.ranks = ranks
        if errno is not None or not isinstance(self, OSError):  # which has taken its arguments'
            self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        return make_again, (type(self), arguments_of(self), {**vars(self), "errno": self.errno})


def arguments_of(error: BaseException) -> tuple[Any, ...]:
    """What its type was called with, as far as it has been kept: of an OSError the file, too."""
    if isinstance(error, OSError):
        arguments: Any = OSError.__reduce__(error)[1]
        return tuple(arguments)
    return error.args


def make_again(
    kind: type[BaseException], arguments: tuple[Any, ...], attributes: dict[str, Any]
) -> BaseException:
    """An error like another one, without a call of its `__init__`, which may ask for more than the
    error has kept."""
    error = kind.__new__(kind, *arguments)
    set_attribute(error, "args", arguments)
    if isinstance(error, OSError):
        OSError.__init__(error, *arguments)  # `errno` and `filename` come of it
    for name, value in attributes.items():
        set_attribute(error, name, value)
    return error

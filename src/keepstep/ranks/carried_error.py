"""An error on its way from the rank that met it to the others: they raise one of the same type."""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from typing import Any

from keepstep.errors import KeepstepError, arguments_of, make_again, set_attribute

RANK = "_keepstep_rank"  # the attribute of an error that every rank raises


class RankError(KeepstepError, RuntimeError):
    """An error that a rank met and that cannot be carried to the others as it is: it cannot be
    pickled, or made again from its arguments. Names its type and holds its message."""


@dataclass(frozen=True)
class CarriedError:
    """An error as the other ranks get it.

    Attributes:
        rank: who met it.
        host: where that rank runs.
        text: its type and message.
        pickled: the error itself; None where it cannot be carried.
    """

    rank: int
    host: str
    text: str
    pickled: bytes | None

    @staticmethod
    def of(error: BaseException, rank: int) -> CarriedError:
        """What `rank` met. Ranks: any."""
        try:
            text = f"{type(error).__name__}: {error}"
        except Exception:  # of its `__str__`
            text = type(error).__name__
        return CarriedError(rank, socket.gethostname(), text, _pickled(error))

    def error(self, what: str, rank: int, own: BaseException | None, named: bool) -> BaseException:
        """What a rank is to raise.

        Args:
            what: was being done.
            rank: is to raise it.
            own: what that rank has met itself, None for nothing.
            named: whether the message is to hold the rank that met it (a note has it anyway).
        """
        if own is not None and rank == self.rank and self.pickled is not None:
            error = own
        else:
            error = self._made_again()
            set_attribute(error, "__cause__", own)
        if named and rank_of(error) is None:
            _name(error, self.rank)
            if isinstance(error, KeepstepError) and not error.ranks:
                error.ranks = (self.rank,)
        note = f"{what}: met by rank {self.rank} on {self.host}"
        set_attribute(error, "__notes__", [*getattr(error, "__notes__", []), note])
        set_attribute(error, RANK, self.rank)
        return error

    def _made_again(self) -> BaseException:
        if self.pickled is not None:
            try:
                error: BaseException = pickle.loads(self.pickled)
                return error
            except Exception:  # this rank lacks what that one has: its text is here
                pass
        return RankError(self.text)


def rank_of(error: BaseException) -> int | None:
    """Which rank met an error that every rank raises; None: it is this rank's alone."""
    rank: int | None = getattr(error, RANK, None)
    return rank


def _pickled(error: BaseException) -> bytes | None:
    """The error, if what comes of it elsewhere is of the same type and says the same."""
    for reduced in (error, _Parts.of(error)):
        try:
            pickled = pickle.dumps(reduced)
            again = pickle.loads(pickled)
            if type(again) is type(error) and str(again) == str(error):
                return pickled
        except Exception:  # anything: it is other people's code, in their `__init__` say
            continue
    return None


@dataclass(frozen=True)
class _Parts:
    """An error whose `__init__` takes other arguments than those that it keeps in `args`: made
    again without calling it. Attributes that cannot be pickled stay behind."""

    kind: type[BaseException]
    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    @staticmethod
    def of(error: BaseException) -> _Parts:
        kept = {name: value for name, value in vars(error).items() if _is_picklable(value)}
        return _Parts(type(error), arguments_of(error), kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return make_again, (self.kind, self.arguments, self.attributes)


def _is_picklable(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def _name(error: BaseException, rank: int) -> None:
    """Put the rank into the message, where the message is a text of the error's own."""
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"{error.strerror} (rank {rank})"
        set_attribute(error, "args", (error.errno, error.strerror))
    elif error.args and isinstance(error.args[0], str) and str(error) == error.args[0]:
        set_attribute(error, "args", (f"rank {rank}: {error.args[0]}", *error.args[1:]))

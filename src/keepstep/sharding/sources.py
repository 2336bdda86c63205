"""What a stored checkpoint holds of each parameter, by name: any slice, read where it lies.

Files are mapped, not read: a rank touches only the pages of the slices that it asks for. Here are
what all sources have in common, and torch's own files; DeepSpeed's are in shards.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open

from keepstep.errors import KeepstepError
from keepstep.policy.strict import name_fault
from keepstep.run_folder.files import naming

MASTER = "fp32"
MODULE_FILE = "mp_rank_00_model_states.pt"  # DeepSpeed's, below stage 3
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES_FILE = "optimizer_names.json"  # beside optimizer.pt, which knows its parameters by number
LAYOUT_FILE = (
    "weights_layout.json"  # of the weights file: name, type, shape, and parameter in the shards
)


class ReshardError(KeepstepError, ValueError):
    """A checkpoint that cannot be given to other processes; says what is not supported."""


class Piece(NamedTuple):
    """Elements `begin` to `end` of a parameter: those of `flat()` from `first`."""

    begin: int
    end: int
    flat: Callable[[], torch.Tensor]  # its file is opened only when something in it is wanted
    first: int


class Source(Protocol):
    """The state of a run, by parameter name. Reading may be done by each rank for itself.

    Attributes:
        stage: ZeRO's; 0: torch's.
        sizes: trained parameters → elements.
        groups: their names, flat buffer by flat buffer (or group by group).
        moments: what the optimizer keeps for each, beside its step; empty before its first step.
        buffers: the model's persistent buffers.
        counters: of DeepSpeed: `global_steps`, `global_samples`, `skipped_steps`.
        scaler: DeepSpeed's loss scaler, None without.
        loss_scale: of fp16; None without.
        bytes_read: so far.
    """

    stage: int
    sizes: dict[str, int]
    groups: list[list[str]]
    moments: tuple[str, ...]
    buffers: dict[str, torch.Tensor]
    counters: dict[str, int]
    scaler: Any
    loss_scale: float | None
    bytes_read: int

    def pieces(self, name: str, key: str) -> Iterator[Piece]:
        """The stored pieces of a parameter's master or moment, in rising order."""

    def frozen(self, name: str) -> Iterator[Piece]:
        """The same of a parameter that is not trained; none where it is not stored."""

    def settings(self, name: str) -> dict[str, Any]:
        """The hyper-parameters of the group that a parameter belongs to."""

    def step(self, name: str) -> Any:
        """The optimizer's steps with a parameter: a number or a tensor, as it was stored."""


def copy_slice(source: Source, pieces: Iterator[Piece], begin: int, out: torch.Tensor) -> None:
    """Fill `out` with a parameter's elements from `begin`, cast to its type.

    Raises:
        ReshardError: they are not all there.
    """
    position, end = begin, begin + out.numel()
    for piece in pieces:
        low, high = max(position, piece.begin), min(end, piece.end)
        if low != position or low >= high:
            continue
        stored = piece.flat()[piece.first + low - piece.begin :][: high - low]
        out[low - begin : high - begin].copy_(stored)
        source.bytes_read += stored.nbytes
        position = high
    if position != end:
        raise ReshardError(f"elements {position} to {end} of a parameter are not in the files")


class Stored:
    """What the sources have in common."""

    def __init__(self) -> None:
        self.stage = 0
        self.sizes: dict[str, int] = {}
        self.groups: list[list[str]] = []
        self.moments: tuple[str, ...] = ()
        self.buffers: dict[str, torch.Tensor] = {}
        self.counters: dict[str, int] = {}
        self.scaler: Any = None
        self.loss_scale: float | None = None
        self.bytes_read = 0

    def frozen(self, name: str) -> Iterator[Piece]:
        yield from ()

    def take_moments(self, state: Mapping[str, Any]) -> None:
        """The names of an optimizer's state of one parameter: those of Adam, or none yet."""
        names = tuple(name for name in state if name != "step")
        if names and names != MOMENTS:
            raise ReshardError(f"the optimizer keeps {', '.join(names)}; tested are: Adam's")
        self.moments = names


class TorchSource(Stored):
    """A checkpoint of DDP or a single process: optimizer.pt, and the weights themselves."""

    def __init__(
        self, folder: Path, groups: Sequence[Sequence[str]], weights: Mapping[str, str], step: int
    ) -> None:
        """
        Args:
            folder: the checkpoint.
            groups: names of the parameters that optimizer.pt numbers, group by group.
            weights: of the weights file(s): name there → name in the model.
            step: the checkpoint's.
        """
        super().__init__()
        self.groups = [list(group) for group in groups if group]
        self._weights = dict(_stored_weights(folder, weights))
        self.buffers = self._weights
        self.counters = {"global_steps": step, "skipped_steps": 0}
        saved = stored_optimizer(folder)
        self._state: dict[str, Any] = {}
        self._param_groups: dict[str, Any] = {}
        stored = [group for group in saved["param_groups"] if group["params"]]
        if [len(group["params"]) for group in stored] != list(map(len, self.groups)):
            raise ReshardError("optimizer.pt was written for other parameter groups")
        for group, names in zip(stored, self.groups, strict=True):
            for number, name in zip(group["params"], names, strict=True):
                if name not in self._weights:
                    raise ReshardError(f"the weights file does not hold {name}")
                self._param_groups[name] = group
                self._state[name] = saved["state"].get(number, {})
                self.sizes[name] = self._weights[name].numel()
        self.take_moments(next((state for state in self._state.values() if state), {}))
        if bare := [n for n, s in self._state.items() if self.moments and not s]:
            raise ReshardError(f"optimizer.pt has no state of {bare[0]}: it never had a gradient")
        if (folder / "scaler.pt").is_file():
            self.loss_scale = float(load(folder / "scaler.pt")["scale"])

    def pieces(self, name: str, key: str) -> Iterator[Piece]:
        stored = self._weights[name] if key == MASTER else self._state[name][key]
        yield Piece(0, stored.numel(), lambda: stored.reshape(-1), 0)

    def frozen(self, name: str) -> Iterator[Piece]:
        if name in self._weights:
            yield from self.pieces(name, MASTER)

    def settings(self, name: str) -> dict[str, Any]:
        return dict(self._param_groups[name])

    def step(self, name: str) -> Any:
        return self._state[name]["step"]


def load(path: Path) -> Any:
    """A torch file that holds tensors and plain values, mapped; nothing else is unpickled."""
    with naming("read", path):
        zipped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def tagged(checkpoint: Path, tag: str) -> Path:
    """The folder of shards that a file (`latest`) names.

    Raises:
        ReshardError: it lies elsewhere.
    """
    name = (checkpoint / tag).read_text(errors="replace").strip()
    fault = name_fault(name)
    if fault is not None:
        raise ReshardError(f"{checkpoint.name}: {tag}: {fault}", path=checkpoint)
    return checkpoint / name


def stored_optimizer(checkpoint: Path) -> dict[str, Any]:
    """The state of torch's optimizer where every rank has all of it: optimizer.pt, or what
    DeepSpeed 0.19.8 puts beside the module at stage 0 (older keepstep, the stock Trainer).

    Raises:
        ReshardError: half precision at stage 0: the masters are in a form of its own.
    """
    if (checkpoint / "optimizer.pt").is_file():
        state: dict[str, Any] = load(checkpoint / "optimizer.pt")
        return state
    state = load_pickled(tagged(checkpoint, "latest") / MODULE_FILE)["optimizer"] or {}
    if not {"state", "param_groups"} <= state.keys():
        raise ReshardError(
            f"{checkpoint.name}: half precision at ZeRO stage 0 is not supported", path=checkpoint
        )
    return state


def load_pickled(path: Path) -> Any:
    """A torch file of DeepSpeed's, mapped (read, if it is of the old kind that the stock Trainer
    has DeepSpeed write). It stores classes of its own beside the tensors, so `weights_only` cannot
    be used: the files are the run's own, compared with their manifest."""
    with naming("read", path):
        zipped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped)


def _stored_weights(folder: Path, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name in names:
                    yield names[name], file.get_tensor(name)

"""The weights in Hugging Face layout, written by all ranks without gathering the model.

Which names the file has is asked of the library: `save_pretrained` is given a state dict whose
tensors hold nothing but a number, and the numbers that come back say which weight went where.
Each rank then stores the slices that it owns: of the fp32 masters under ZeRO, cast to the weight's
type.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from keepstep.run_folder.files import BLOCK
from keepstep.save.rank_part import Changes, Part, Piece
from keepstep.save.safetensors_format import TYPES, Entry, lay_out
from keepstep.sharding.flat_buffers import LayoutError, masters, slices

PROBE = 7  # elements; a prime, so that nothing can share them out


# Of the weights file: its name, the files beside it, and the name in the file → in the model.
Probe = tuple[str, dict[str, bytes], dict[str, str]]


class WeightsFile:
    """The weights file of a model, and what `save_pretrained` writes beside it.

    Attributes:
        name: of the file.
        size: in bytes.
        companions: the other files (configuration, …), name → content.
        names: of the weights in the file → in the model.
        entries: of the weights in the file, in their order.
    """

    def __init__(self, model: Any, probe: Probe) -> None:
        """Lay the file of `model` out as `ask` found. Ranks: any.

        Raises:
            LayoutError: a weight's type is not known here.
        """
        live = _live(model)
        self.name, self.companions, sources = probe
        self.names = sources
        self.entries: dict[str, Entry] = {}

        def order(item: tuple[str, str]) -> tuple[bool, int]:
            """Whole blocks first; the rest by falling element size, so that all are aligned."""
            return _is_odd(live[item[1]]), -live[item[1]].element_size()

        for name, source in sorted(sources.items(), key=order):
            tensor = live[source]
            if tensor.dtype not in TYPES:
                raise LayoutError(f"{source} is {tensor.dtype}")
            self.entries[name] = Entry(tensor.dtype, _shape(tensor))
        # The data begin at a block: see Storage.
        self._header, offsets = lay_out(self.entries.items(), align=BLOCK)
        self._offsets = {sources[name]: offset for name, offset in offsets.items()}
        self.size = len(self._header) + sum(entry.nbytes for entry in self.entries.values())

    def pieces(self, model: Any, engine: Any | None, rank: int, world_size: int) -> list[Piece]:
        """What a rank has of it, as things are now (engine: DeepSpeed's, None without). Ranks: any.

        Raises:
            LayoutError: the parameters are shared out in a way that keepstep does not know.
        """
        live = _live(model)
        offsets = {id(live[n]): len(self._header) + o for n, o in self._offsets.items()}
        found = _pieces(engine, [live[name] for name in self._offsets], rank, world_size)
        return [
            replace(piece, offset=offsets[id(tensor)] + piece.offset)
            for tensor, piece in found
            if id(tensor) in offsets
        ]

    def store(self, part: Part, pieces: list[Piece]) -> None:
        """Store `pieces` through this rank's part; the main process the header."""
        header = self._header if part.rank == 0 else b""
        part.weights(self.name, self.size, header, pieces)


# What peft writes beside an adapter; it holds the base model's path on this machine. keepstep makes
# a card when it publishes.
CARD = "README.md"


def captured(save: Callable[[str], object]) -> dict[str, bytes]:
    """What a library writes into a folder: path relative to it → content.

    Raises:
        OSError: the disk of temporary files is full, also where torch hides it: it speaks of an
            "unexpected pos 576 vs 534" (2.13), so the disk is asked.
    """
    with tempfile.TemporaryDirectory(prefix="keepstep-") as folder:
        try:
            save(folder)
        except RuntimeError:
            (Path(folder) / "asked").write_bytes(bytes(BLOCK))
            raise
        return _contents(Path(folder))


def trained(engine: Any) -> Iterator[torch.nn.Parameter]:
    """The 16-bit parameters that ZeRO-1 and 2 make from the masters after every step."""
    for group in getattr(engine.optimizer, "round_robin_bit16_groups", []):
        yield from group


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """No progress bar of transformers: what is written here is names and shapes, no weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def ask(model: Any) -> Probe:
    """How `model` (a PreTrainedModel or PeftModel) wants to be stored. The main process.

    (transformers writes nothing on other ranks.)

    Raises:
        LayoutError: it cannot be stored slice by slice.
    """
    live, names = _live(model), list(model.state_dict())
    numbers: dict[int, torch.Tensor] = {}
    state = {}
    for i, name in enumerate(names):  # tied weights: the same tensor
        state[name] = numbers.setdefault(id(live.get(name, name)), torch.full((PROBE,), i))
    try:
        with tempfile.TemporaryDirectory(prefix="keepstep-") as folder, _no_bar():
            model.save_pretrained(folder, state_dict=state)
            (Path(folder) / CARD).unlink(missing_ok=True)
            (weights,) = Path(folder).glob("*.safetensors")
            stored = load_file(weights)
            weights.unlink()
            companions = _contents(Path(folder))
    except OSError:
        raise  # of the disk, not of the model
    except Exception as error:  # what it does to weights it could not do to numbers
        raise LayoutError(f"save_pretrained changes what the weights are: {error!r}") from error
    for name, number in stored.items():
        # Anything that splits, joins or reshapes weights shows in a tensor of equal numbers.
        if number.shape != (PROBE,) or bool((number != number[0]).any()):
            raise LayoutError(f"save_pretrained makes {name} from other weights")
    if foreign := [name for name, n in stored.items() if not 0 <= int(n[0]) < len(names)]:
        raise LayoutError(f"save_pretrained adds {foreign[0]}")
    sources = {name: names[int(number[0])] for name, number in stored.items()}
    if len(set(sources.values())) != len(sources):
        raise LayoutError("save_pretrained stores a weight under two names")
    if strange := sorted(set(sources.values()) - live.keys()):
        raise LayoutError(f"{strange[0]} is neither parameter nor buffer")
    return weights.name, companions, sources


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _shape(tensor: Any) -> tuple[int, ...]:
    """Under stage 3 a parameter is empty, and `ds_shape` is its shape."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _is_odd(tensor: Any) -> bool:
    """Whether what follows it in a file would not begin at a block."""
    size: int = math.prod(_shape(tensor)) * tensor.element_size()
    return size % BLOCK != 0


def _live(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _pieces(
    engine: Any | None, tensors: list[Any], rank: int, world_size: int
) -> Iterator[tuple[torch.Tensor, Piece]]:
    """(weight, what this rank has of it, with the offset from the weight's beginning in bytes)."""
    done: set[int] = set()
    if engine is not None:
        sources = masters(engine)
        for parameter, begin, group, first, count in slices(engine, rank, world_size):
            done.add(id(parameter))
            if count:
                offset = begin * parameter.element_size()
                yield parameter, Piece(offset, sources[group], first, count, parameter.dtype)
    for tensor in tensors:
        if id(tensor) in done:
            continue
        if hasattr(tensor, "ds_tensor"):  # frozen, under stage 3: every rank has its slice
            size = tensor.ds_tensor.ds_numel
            begin = rank * size
            count = max(0, min(size, tensor.ds_numel - begin))
            if tensor.ds_tensor.dtype != tensor.dtype:
                raise LayoutError("frozen parameters are quantized")
            if count:
                offset = begin * tensor.element_size()
                yield tensor, Piece(offset, tensor.ds_tensor, 0, count, tensor.dtype, "never")
        elif rank == 0:  # whole on every rank
            changes: Changes = "anytime"
            if isinstance(tensor, torch.nn.Parameter):
                changes = "at_step" if tensor.requires_grad else "never"
            yield tensor, Piece(0, tensor, 0, tensor.numel(), tensor.dtype, changes)

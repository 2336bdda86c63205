"""The safetensors format: 8 bytes of header length, a JSON header, the data.

https://github.com/huggingface/safetensors#format. The library (0.8) reads, and writes whole tensors
that one process has in memory; here a file is laid out first, and filled piece by piece: by all
ranks at once (a checkpoint's weights), or some megabytes at a time (an export).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type and shape, as safetensors has them."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def lay_out(entries: Iterable[tuple[str, Entry]], align: int = 8) -> tuple[bytes, dict[str, int]]:
    """The header of a file with these tensors, in their order, and where each begins behind it.

    `align`: the data begin at a multiple of it, in bytes.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for name, entry in entries:
        end = position + entry.nbytes
        described[name] = {
            "dtype": TYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [position, end],
        }
        offsets[name] = position
        position = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    return struct.pack("<Q", len(text)) + text, offsets


def layout_of(entries: Mapping[str, Entry], parameters: Mapping[str, str]) -> bytes:
    """What an export needs to make a weights file from shards (sources.LAYOUT_FILE).

    `parameters`: names of its tensors → in the model.
    """
    tensors = [
        {"name": name, "parameter": parameters[name], "dtype": TYPES[e.dtype], "shape": e.shape}
        for name, e in entries.items()
    ]
    return json.dumps({"tensors": tensors}).encode() + b"\n"

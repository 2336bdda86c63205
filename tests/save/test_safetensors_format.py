"""safetensors files laid out by us, and read: as the library has them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keepstep.convert.export import ExportError, FileWeights
from keepstep.save.safetensors_format import TYPES, Entry, lay_out


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(3, 5, generator=generator)
    tensors = {str(t): (floats * 7).to(t) for t in TYPES}
    return tensors | {"empty": torch.zeros(0, 4), "number": torch.tensor(3.5)}


def test_a_file_of_the_library(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    found = FileWeights([tmp_path / "a.safetensors"])
    assert found.entries == {n: Entry(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(read(found, name), tensor)


def read(weights: FileWeights, name: str) -> torch.Tensor:
    entry = weights.entries[name]
    out = torch.empty(entry.numel, dtype=entry.dtype)
    weights.fill(name, 0, out)
    return out.view(entry.shape)


def test_weights_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """An export of a model that does not fit in memory: nothing is read before its turn."""
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(1 << 22) for name in "ab"}, path)
    weights = FileWeights([path])
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 2.5))
    assert read(weights, "b")[-1] == 2.5


@pytest.mark.parametrize("align", [8, 4096])
def test_laid_out(tmp_path: Path, align: int) -> None:
    tensors = dict(sorted(some_tensors().items(), key=lambda item: -item[1].element_size()))
    entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    header, offsets = lay_out(entries.items(), align)
    assert len(header) % align == 0
    content = b"".join(
        t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for t in tensors.values()
        if t.numel()
    )
    (tmp_path / "a.safetensors").write_bytes(header + content)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert offsets["number"] + 4 <= len(content)


def test_a_tensor_that_is_not_aligned(tmp_path: Path) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"\x07" + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert read(FileWeights([tmp_path / "a.safetensors"]), "b").tolist() == [1.5, -2.0]


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + b"1234"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"abc", b"no safetensors at all " * 20, struct.pack("<Q", 2**40) + b"{}"),
        with_header(b"abcdefgh"),
        with_header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,400]}}'),
        with_header(b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'),
    ],
    ids=["empty", "short", "text", "long header", "no JSON", "beyond the end", "another type"],
)
def test_an_export_of_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    """A MemoryError, a KeyError, or the memory behind the file before."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model.safetensors (is no safetensors|holds 'F8_E4M3')"):
        FileWeights([path])

"""Snapshots: what is stored is the state at the save, whatever happens before it is written."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep.policy.strict import TextError
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.files import BLOCK
from keepstep.run_folder.storage import Storage
from keepstep.save.rank_part import Part, Piece, Report
from keepstep.save.shared_file import Share, digest_of_joint
from keepstep.save.snapshot_memory import Arena


class Scaler:
    """Like DeepSpeed's loss scaler: an object, with a tensor in it, among the state."""

    def __init__(self) -> None:
        self.scale = 65536.0
        self.window = torch.arange(3)


def make_state() -> dict[str, Any]:
    flat = torch.randn(300_000)
    return {
        "flat": flat,
        "lean": flat[:299_000],  # a view: torch.save alone would store all of `flat` for it
        "transposed": torch.randn(30, 50).t(),
        "moments": OrderedDict(a=torch.randn(70_000).bfloat16(), b=torch.randn(5).double()),
        "step": torch.tensor(7.0),
        "empty": torch.empty(0),
        "released": flat[:0],
        "tied": flat,
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}],
        "scaler": Scaler(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if isinstance(a, Scaler) else bool(a == b)


def store(folder: Path, state: Any, arena: Arena | None, *, deferred: bool = False) -> Part:
    folder.mkdir()
    part = Part(folder, 0, Storage(), arena)
    part.save("state.pt", state, deferred)
    part.copy()
    part.finish()
    assert part.error is None
    return part


def test_the_file_is_the_same_in_every_mode(tmp_path: Path) -> None:
    state = make_state()
    parts = [
        store(tmp_path / "off", state, None),
        store(tmp_path / "snapshot", state, Arena(8 << 20)),
        store(tmp_path / "lazy", state, Arena(8 << 20), deferred=True),
        store(tmp_path / "overflow", state, Arena(1 << 20), deferred=True),
    ]
    assert len({part.report.files["state.pt"].xxh3_128 for part in parts}) == 1
    for mmap in (None, True):
        loaded = torch.load(tmp_path / "lazy/state.pt", weights_only=False, mmap=mmap)
        assert same(loaded, state)
    assert (tmp_path / "lazy/state.pt").stat().st_size < 4 * (599_000 + 1500) + 140_000 + 20 * BLOCK
    plain = {name: value for name, value in state.items() if name != "scaler"}
    store(tmp_path / "plain", plain, Arena(8 << 20))
    assert same(torch.load(tmp_path / "plain/state.pt", weights_only=True), plain)


def test_what_changes_after_the_save_is_not_stored(tmp_path: Path) -> None:
    arena, state = Arena(8 << 20), make_state()
    expected = torch.load(_saved(tmp_path / "expected.pt", state), weights_only=False)
    part = Part(tmp_path, 0, Storage(), arena)
    part.save("state.pt", state)
    part.save("lazy.pt", {"flat": state["transposed"]}, deferred=True)
    part.copy()
    for tensor in (state["flat"], state["transposed"], state["step"], state["scaler"].window):
        tensor.zero_()
    state["groups"][0]["lr"] = 0.0
    state["scaler"].scale = 1.0
    part.finish()
    assert same(torch.load(tmp_path / "state.pt", weights_only=False), expected)
    lazy = torch.load(tmp_path / "lazy.pt", weights_only=False)
    assert same(lazy["flat"], expected["transposed"])


def test_an_arena_is_used_again(tmp_path: Path) -> None:
    arena = Arena(8 << 20)
    for number in range(3):
        state = make_state()
        part = store(tmp_path / str(number), state, arena, deferred=True)
        loaded = torch.load(tmp_path / str(number) / "state.pt", weights_only=False)
        assert same(loaded, state)
        assert part.report.files["state.pt"].xxh3_128 == digest_of(
            tmp_path / str(number) / "state.pt"
        )


def _saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("background", [True, False])
def test_two_ranks_store_their_pieces(tmp_path: Path, dtype: torch.dtype, background: bool) -> None:
    """Halves of two tensors, out of one flat fp32 master a rank, as ZeRO-3 lays them out."""
    weights = [torch.randn(3_000_001), torch.randn(641)]
    header, shares, offsets = b"h" * BLOCK, {}, [BLOCK, BLOCK + 3_000_001 * dtype.itemsize]
    size = offsets[1] + 641 * dtype.itemsize
    for rank in (0, 1):
        halves = [-(-len(w) // 2) for w in weights]
        mine = [w[rank * h : (rank + 1) * h] for w, h in zip(weights, halves, strict=True)]
        master = torch.cat(mine)
        pieces = [
            Piece(
                offset=offsets[i] + rank * halves[i] * dtype.itemsize,
                source=master,
                first=sum(len(m) for m in mine[:i]),
                count=len(mine[i]),
                dtype=dtype,
            )
            for i in (0, 1)
        ]
        arena = Arena(16 << 20) if background else None
        part = Part(tmp_path, rank, Storage(), arena)
        part.weights("w", size, header if rank == 0 else b"", pieces)
        part.copy()
        if background:
            master.zero_()
        part.finish()
        assert part.error is None
        shares[rank] = Report.from_json(part.report.as_json()).shares["w"]
    assert digest_of_joint(tmp_path / "w", shares) == digest_of(tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    stored = torch.frombuffer(bytearray(content[BLOCK:]), dtype=dtype)
    assert content[:BLOCK] == header
    assert torch.equal(stored, torch.cat(weights).to(dtype))


def test_an_error_is_kept_and_nothing_more_is_written(tmp_path: Path) -> None:
    part = Part(tmp_path / "nowhere" / "x", 0, Storage(), Arena(1 << 20))
    (tmp_path / "nowhere").write_text("a file in the way")
    part.write("a", b"1")
    part.write("b", b"2")
    part.copy()
    part.finish()
    assert part.report.error is not None
    assert part.report.error.kind == "NotADirectoryError"
    assert part.report.files == {}


def test_a_report_that_names_files_elsewhere_is_none(tmp_path: Path) -> None:
    part = Part(tmp_path, 0, Storage())
    part.write("a.bin", b"1")
    part.finish()
    part.report.shares["w"] = Share(3, ((0, 1), (2, 1)), "0" * 32)
    values = json.loads(json.dumps(part.report.as_json()))
    assert Report.from_json(values) == part.report
    for name in ("/etc/passwd", "../x"):
        for kind in ("files", "shares"):
            entry = next(iter(values[kind].values()))
            with pytest.raises(TextError, match="no name of a file"):
                Report.from_json(values | {kind: {name: entry}})
    for change in ({"rank": "0"}, {"shares": []}, {"more": 1}, {"seconds": {"write": "long"}}):
        with pytest.raises(TextError):
            Report.from_json(values | change)

"""What is counted of an upload, and that nothing depends on it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils._xet_progress_reporting import XetUploadProgressReporter

from keepstep.hub import sending
from keepstep.hub.sending import BARS, MODULE, Sending


@pytest.fixture
def told() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def counting(told: list[tuple[int, int]]) -> Sending:
    return Sending(lambda *far: told.append(far))


def test_what_hf_xet_counts(counting: Sending, told: list[tuple[int, int]]) -> None:
    with counting.counted():
        bars = getattr(import_module(MODULE), BARS)(total_files=2)
        bars.update_progress(SimpleNamespace(total_bytes_completed=3, total_bytes=9), {})
        for odd in (None, SimpleNamespace(), SimpleNamespace(total_bytes_completed="x")):
            bars.update_progress(odd, {})
        bars.close()
    assert told == [(3, 9)]
    assert getattr(import_module(MODULE), BARS) is XetUploadProgressReporter


@pytest.mark.parametrize(("name", "value"), [("MODULE", "nowhere.at_all"), ("BARS", "Nothing")])
def test_a_library_that_has_it_otherwise(
    counting: Sending, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr(sending, name, value)
    with counting.counted():
        pass
    with pytest.raises(OSError, match="the Hub"), counting.counted():  # it is no error of ours
        raise OSError("of the Hub")


def test_what_is_read_to_be_sent_by_lfs(
    counting: Sending, told: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Again from the beginning after a fault; what is read for its digest is not sent."""
    (tmp_path / "weights").write_bytes(b"12345678")
    (tmp_path / "text").write_bytes(b"12")
    with counting.counted():
        operation = counting.add("weights", tmp_path / "weights")
        counting.add("text", tmp_path / "text")
        assert operation.upload_info.sha256
        with operation.as_file() as file:
            file.read()
        assert told == []
        with operation.as_file(with_tqdm=True) as file:
            while file.read(4):
                pass
            file.seek(0)
            file.read(4)
    assert told == [(0, 10), (4, 10), (8, 10), (0, 10)]

"""Causes of failed saves: what may pass and what stays, and that nothing is lost on the way."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from keepstep.policy.manifest import ManifestError
from keepstep.run_folder.ownership import NotOwnerError
from keepstep.run_folder.storage import Storage
from keepstep.save.failure import Cause, SaveError
from keepstep.save.rank_part import Report
from keepstep.save.shared_file import JointError
from tests.helpers.disks import small_disk_at

PASSES = [
    OSError(errno.EIO, "Input/output error"),
    TimeoutError(),
    ConnectionResetError(),
    MemoryError(),
    torch.OutOfMemoryError(),
    JointError("model.safetensors does not hold what rank 1 wrote"),
    ManifestError("the staged checkpoint is incomplete"),
    NotOwnerError("the run belongs to a newer attempt"),
    SafetensorError("Error while serializing: I/O error"),
    shutil.Error([("a", "b", "No space left on device")]),
]
STAYS = [
    AttributeError("_save_rng_state"),
    TypeError(),
    KeyError("rng"),
    ValueError(),
    RuntimeError("torch.save writes a storage in another way than was tested"),
    AssertionError(),
    ImportError(),
    RecursionError(),
    NotImplementedError(),
    UnicodeEncodeError("ascii", "ä", 0, 1, "?"),
    struct.error(),
    pickle.PicklingError(),
    io.UnsupportedOperation("write"),  # an OSError by inheritance
    SystemExit("a writer ends"),
]


@pytest.mark.parametrize("error", PASSES, ids=lambda error: type(error).__name__)
def test_what_the_environment_did_may_pass(error: Exception) -> None:
    assert Cause.of(error, 0).environment
    assert not Cause.of(error, 0).trace


@pytest.mark.parametrize("error", STAYS, ids=lambda error: type(error).__name__)
def test_a_mistake_in_a_program_stays_and_says_where(error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:
        cause = Cause.of(caught, 3)
    assert not cause.environment
    told = SaveError("checkpoint-4 was not saved", [cause], 4)
    assert "test_failure.py" in told.__notes__[0]
    assert "On rank 3" in told.__notes__[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_known_by_its_number(number: int) -> None:
    error = OSError(number, os.strerror(number), "/run/checkpoint-4/model.safetensors")
    report = Report(1, error=Cause.of(error, 1))
    heard = Report.from_json(json.loads(json.dumps(report.as_json())))
    assert heard == report, "through the file in which a rank reports"
    assert heard.error is not None
    assert heard.error.path == "/run/checkpoint-4/model.safetensors"
    told = SaveError("checkpoint-4 was not saved", [Cause(0, "its writer is stuck"), heard.error])
    assert told.disk_full == (number != errno.EIO)
    assert told.environment


def test_a_full_disk_is_not_known_by_its_text() -> None:
    text = f"[Errno {errno.ENOSPC}] stands in a file name"
    assert not SaveError("not saved", [Cause.of(FileNotFoundError(2, text), 0)]).disk_full
    both = SaveError("not saved", [Cause.of(KeyError("x"), 0), Cause.of(OSError(28, "full"), 1)])
    assert both.disk_full
    assert not both.environment, "one mistake among them is enough"


def test_a_disk_without_inodes_is_told_from_a_full_one(tmp_path: Path) -> None:
    storage, hint = Storage(), "(no inodes are left: df -i)"
    with small_disk_at(tmp_path / "disk", "1m,nr_inodes=9") as disk:
        with pytest.raises(OSError, match="No space left") as full:
            storage.write(disk / "large", bytes(2 * 2**20))
        assert hint not in str(Cause.of(full.value, 0))
        storage.remove(disk / "large")
        while os.statvfs(disk).f_favail:
            storage.write(disk / str(os.statvfs(disk).f_favail), b"")
        for act in (storage.make_folder, lambda path: storage.write(path, b"")):
            with pytest.raises(OSError, match="No space left") as used_up:
                act(disk / "one-more")
            assert str(Cause.of(used_up.value, 0)).endswith(hint)

"""Locks of torch's, which a start that was killed leaves for every later one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keepstep.ranks import compile_locks as module
from keepstep.ranks.compile_locks import remove_stale_locks
from tests.helpers.waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(module, "LOCAL", {*module.LOCAL, module._kind_of(tmp_path)})
    return tmp_path


def lock(path: Path, seconds_ago: float = 0.0) -> Path:
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def removed() -> list[str]:
    said: list[str] = []
    remove_stale_locks(said.append)
    return said


def test_one_that_a_process_holds_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is removed, whatever its age, as soon as that was killed."""
    monkeypatch.setattr(module, "FIRST_PID_NAMESPACE", os.readlink("/proc/self/ns/pid"))
    held, other = folder / "one/lock", lock(folder / "py311_cpu/two/lock")
    held.parent.mkdir()
    holder = (
        "import sys, time; from torch.utils.file_baton import FileBaton;"
        "FileBaton(sys.argv[1]).try_acquire() or sys.exit(1); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, held]) as process:
        wait_for(held.exists, process)
        assert removed() == []
        assert (held.exists(), other.exists()) == (True, False)
        process.kill()
    assert removed() == []
    assert not held.exists()


def test_another_container_may_hold_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is waited for, with a line."""
    monkeypatch.setattr(module, "FIRST_PID_NAMESPACE", "another's")
    monkeypatch.setattr(module, "OTHERS_SECONDS", 600.0)
    old, young = lock(folder / "one/lock", 601), lock(folder / "two/lock", 598)
    (said,) = removed()
    assert not old.exists()
    assert not young.exists()
    assert said.startswith("waiting up to ")
    assert str(young) in said


def test_another_machine_may_hold_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCAL", set())
    left = lock(folder / "my one/lock", 10**6)
    (said,) = removed()
    assert left.exists()
    assert said.endswith(f"rm '{left}'")


def test_the_others_of_a_machine_leave_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    left = lock(folder / "one/lock", 10**6)
    assert removed() == []
    assert left.exists()

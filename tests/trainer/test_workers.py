"""An ending process does not wait for a DataLoader's worker that hangs in a read, nor leave it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader

from keepstep.trainer.dealing import settle_loader
from keepstep.trainer.workers import KINDS, WithoutSignals
from tests.helpers.faulty_disk import faulty_disk
from tests.helpers.waiting import PATIENCE, wait_for

SCRIPT = """
import sys
import time
from pathlib import Path
from torch.utils.data import DataLoader
from keepstep.trainer.dealing import settle_loader

reached = Path(__file__).with_name("reached")

class Rows:
    def __len__(self):
        return 100
    def __getitem__(self, row):
        if row > 4:
            reached.touch()
            Path(sys.argv[1]).read_bytes()
        return row

if __name__ == "__main__":
    method, persistent = sys.argv[2:]
    loader = DataLoader(
        Rows(),
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=persistent == "kept",
    )
    settle_loader(loader, 0)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    while not reached.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    if persistent == "left":
        del batches
    print("ends", flush=True)
    if persistent == "killed":
        while True:
            time.sleep(1)
"""


def end(tmp_path: Path, file: Path, method: str, persistent: str, reachable: bool = True) -> None:
    """Run it, and let it end, or kill it; the time of its imports does not count."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [str(script), str(file), method, persistent]
    command, log = [sys.executable, "-W", "ignore", *words], tmp_path / "log"
    with open(log, "wb") as said:  # a pipe would stay open as long as a worker lives
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or log.read_text())
        assert log.read_text().startswith("ends")
        if persistent == "killed":
            assert len(of_session(process.pid)) > 2, "with its workers"
            process.kill()
        assert process.wait(PATIENCE) in (0, -signal.SIGKILL), "torch would wait for ever"
        wait_for(lambda: not reachable or not of_session(process.pid))
        assert len((tmp_path / "log").read_text().splitlines()) == 1, "and nothing is told"
    finally:
        process.kill()


def of_session(leader: int) -> list[int]:
    """The processes that run in the session of this one."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            state, *_, session = (
                Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:4]
            )
            if int(session) == leader and state != "Z":
                found.append(int(process))
    return found


CASES = [
    pytest.param(
        method,
        how,
        marks=[] if method == "fork" and how != "left" else pytest.mark.long,
    )
    for method in ("fork", "spawn", "forkserver")
    for how in ("left", "kept", "killed")
]


@pytest.mark.parametrize(("method", "persistent"), CASES)
def test_a_worker_that_hangs_in_a_read(tmp_path: Path, method: str, persistent: str) -> None:
    """In a FIFO that nobody writes to."""
    os.mkfifo(tmp_path / "fifo")
    end(tmp_path, tmp_path / "fifo", method, persistent)


def test_a_worker_that_no_signal_reaches(tmp_path: Path) -> None:
    """As of a hard NFS mount, whose server is gone."""
    with faulty_disk(tmp_path / "disk") as disk:
        (disk.folder / "rows").write_text("rows")
        disk.hang("open", "rows")
        end(tmp_path, disk.folder / "rows", "fork", "left", reachable=False)
        assert disk.fired


def test_loaders_of_accelerate_have_them_too() -> None:
    """What is set at its wrapper does not reach the loader."""
    for method in ("fork", "spawn", "forkserver", None):
        loader = DataLoaderShard([1, 2], num_workers=1, multiprocessing_context=method)
        settle_loader(loader, 0)
        settle_loader(loader, 0)
        inner = loader.base_dataloader
        assert isinstance(inner.worker_init_fn, WithoutSignals)
        assert inner.worker_init_fn._first is None, "once"
        assert inner.multiprocessing_context is KINDS[method or "fork"]
    rows: Any = [1, 2]
    alone = DataLoader(rows)
    settle_loader(alone, 0)
    assert alone.multiprocessing_context is None


def test_workers_leave_signals_to_their_parent() -> None:
    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, row: int) -> int:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
            return row

    loader = DataLoader(Rows(), num_workers=1)  # type: ignore[arg-type]
    settle_loader(loader, 0)
    assert [int(row) for row in loader] == [0, 1, 2]

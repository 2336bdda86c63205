"""An ending process does not wait for a DataLoader's worker that hangs in a read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader

from keepstep.trainer.dealing import settle_loader
from keepstep.trainer.workers import KINDS, WithoutSignals
from tests.helpers.faulty_disk import faulty_disk

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
"""


def end(tmp_path: Path, file: Path, method: str, persistent: str) -> None:
    """Run it, and let it end; the time of its imports does not count."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", script, file, method, persistent]
    with open(tmp_path / "log", "wb") as log:  # a pipe would stay open as long as a worker lives
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "log").read_text().startswith("ends"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.wait(30) == 0, "torch would wait for ever"
        assert len((tmp_path / "log").read_text().splitlines()) == 1, "and nothing is told"
    finally:
        process.kill()


CASES = [
    pytest.param(method, how, marks=[] if (method, how) == ("fork", "kept") else pytest.mark.long)
    for method in ("fork", "spawn", "forkserver")
    for how in ("left", "kept")
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
        end(tmp_path, disk.folder / "rows", "fork", "left")
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
    alone = DataLoader([1, 2])
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

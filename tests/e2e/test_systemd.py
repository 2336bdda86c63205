"""The unit template, by systemd itself: what comes back, and what does not."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers import systemd
from tests.helpers.launchers import TIMEOUT
from tests.helpers.ranks import ROOT
from tests.helpers.recipes import argv

UNIT = "keepstep@.service"


@pytest.fixture
def manager() -> Iterator[systemd.Manager]:
    reason = systemd.obstacle()
    if reason:
        pytest.skip(f"no systemd on this machine: {reason}")
    with tempfile.TemporaryDirectory(prefix="ks-", ignore_cleanup_errors=True) as made:
        one = systemd.Manager(Path(made))
        units = one.home / ".config/systemd/user"
        (units / f"{UNIT}.d").mkdir(parents=True)
        (units / UNIT).write_text((ROOT / "launch" / UNIT).read_text())
        (one.home / "keepstep").mkdir()
        (one.home / "keepstep/.venv").symlink_to(sys.prefix)
        log = f"StandardOutput=append:{made}/log\nStandardError=append:{made}/log\n"
        told = "Environment=KEEPSTEP_CONFIG=ddp KEEPSTEP_PROCESSES=1 HF_HUB_OFFLINE=1\n"
        (units / f"{UNIT}.d/test.conf").write_text(f"[Service]\n{told}{log}")
        one.start()
        try:
            yield one
        finally:
            one.end()


def recipe(manager: systemd.Manager, demo: Path, **fields: object) -> None:
    folder = manager.home / "my-run"
    folder.mkdir(exist_ok=True)
    flags = argv(demo, folder / "run", **({"save_steps": 4, "eval_steps": 4} | fields))
    pairs = zip(flags[::2], flags[1::2], strict=True)
    (folder / "recipe.yaml").write_text("".join(f"{n[2:]}: {v}\n" for n, v in pairs))


def wait_for(manager: systemd.Manager, text: str, times: int = 1) -> None:
    log, deadline = manager.folder / "log", time.monotonic() + TIMEOUT
    while not log.exists() or log.read_text().count(text) < times:
        assert time.monotonic() < deadline, log.read_text()[-6000:] if log.exists() else "no log"
        time.sleep(0.1)


def wait_until_ended(manager: systemd.Manager) -> dict[str, str]:
    deadline = time.monotonic() + TIMEOUT
    while True:
        shown = manager.shown("keepstep@my-run")
        if shown["ActiveState"] in ("inactive", "failed"):
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)


def main_process(manager: systemd.Manager) -> psutil.Process:
    """The command's, as this machine counts processes."""
    for one in psutil.Process(manager.pid).children(recursive=True):
        if "keepstep.cli.again" in " ".join(one.cmdline()):
            return one
    raise AssertionError("the unit has no main process")


@pytest.mark.long
def test_a_units_life(manager: systemd.Manager, demo: Path) -> None:
    """Killed, it comes back; stopped, it has saved, which is a success; and it goes on."""
    recipe(manager, demo, max_steps=100_000)
    started = manager.systemctl("enable", "--now", "keepstep@my-run")
    assert started.returncode == 0, started.stderr
    wait_for(manager, "saved checkpoint-")
    main_process(manager).kill()
    wait_for(manager, "carrying on from checkpoint-")
    assert manager.shown("keepstep@my-run")["NRestarts"] == "1"
    saved = (manager.folder / "log").read_text().count("saved checkpoint-")
    wait_for(manager, "saved checkpoint-", saved + 1)

    stopped = manager.systemctl("stop", "keepstep@my-run")
    assert stopped.returncode == 0, stopped.stderr
    shown = manager.shown("keepstep@my-run")
    assert (shown["ActiveState"], shown["Result"]) == ("inactive", "success")
    assert shown["ExecMainStatus"] == "75"
    run = RunFolder(manager.home / "my-run/run")
    newest = run.checkpoints()[-1].step
    assert newest == run.attempts()[-1].reached

    manager.systemctl("start", "keepstep@my-run")
    wait_for(manager, f"carrying on from checkpoint-{newest}")
    wait_for(manager, "loss", (manager.folder / "log").read_text().count("loss") + 1)
    manager.systemctl("stop", "keepstep@my-run")


@pytest.mark.long
def test_a_unit_that_is_not_started_again(manager: systemd.Manager, demo: Path) -> None:
    """A wrong recipe; and a folder that is not there is told at once."""
    recipe(manager, demo, no_such_field=1)
    assert manager.systemctl("start", "keepstep@my-run").returncode == 0
    shown = wait_until_ended(manager)
    assert (shown["ActiveState"], shown["ExecMainStatus"]) == ("failed", "2")
    assert shown["NRestarts"] == "0"
    assert "unknown field no_such_field" in (manager.folder / "log").read_text()

    started = manager.systemctl("start", "keepstep@nowhere")
    assert started.returncode == 1
    assert "keepstep@nowhere.service failed" in started.stderr
    limits = manager.shown("keepstep@nowhere")
    assert (limits["StartLimitBurst"], limits["StartLimitIntervalUSec"]) == ("5", "10min")
    manager.systemctl("stop", "keepstep@nowhere")

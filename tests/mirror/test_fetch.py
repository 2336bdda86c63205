"""`keepstep fetch`: what is there, and one of it; what is not there is no success."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from keepstep.cli.main import app
from keepstep.mirror.owners import claim
from keepstep.mirror.store import Store
from keepstep.mirror.upload import Upload
from keepstep.run_folder.checkpoint import Checkpoint, read_checkpoint
from keepstep.run_folder.reader import RunFolder


def fetch(*words: object) -> Result:
    return CliRunner().invoke(app, ["fetch", *map(str, words)])


def test_listed_and_brought(store: Store, run: RunFolder, tmp_path: Path) -> None:
    owner = claim(store, "0123456789ab")
    for step in (4, 8):
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{step}")).run({})
    listed = fetch(store.url)
    assert listed.exit_code == 0
    assert [line.split(":")[0] for line in listed.stdout.splitlines()] == [
        "checkpoint-4",
        "checkpoint-8",
    ]
    assert fetch(f"{store.url}/checkpoint-4").stdout == f"{listed.stdout.splitlines()[0]}\n"
    to = tmp_path / "weights"
    done = fetch(f"{store.url}/checkpoint-4", "--to", to)
    assert done.stdout.startswith(f"{to}: step 4, ")
    assert Checkpoint(to, read_checkpoint(run.path / "checkpoint-4").manifest).faults(True) == []
    assert not to.with_name("weights.partial").exists()
    again = fetch(store.url, "--to", to)
    assert again.exit_code == 2
    assert f"{to} exists" in again.output

    missing = fetch(f"{store.url}/checkpoint-5")
    assert missing.exit_code == 2
    assert "no such checkpoint; there: 4, 8" in missing.output
    name = next(n for n in store.names("checkpoint-8") if n.endswith("/manifest.json"))
    store.put(name, b"{}")
    spoilt = fetch(store.url)
    assert spoilt.exit_code == 1
    assert "not a manifest" in spoilt.output
    refused = fetch(f"{store.url}/checkpoint-8", "--to", tmp_path / "other")
    assert refused.exit_code == 1
    assert f"keepstep: {store.url}/checkpoint-8: not a manifest" in refused.output
    assert not (tmp_path / "other").exists()


def test_what_is_nowhere(store: Store) -> None:
    nothing = fetch(store.url)
    assert nothing.exit_code == 2
    assert "no such checkpoint; there: none" in nothing.output
    assert fetch("runs/mine").exit_code == 2

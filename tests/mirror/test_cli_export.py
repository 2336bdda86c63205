"""`keepstep export URL`: what is needed is fetched, compared, exported; nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from keepstep.cli.main import app
from keepstep.mirror import upload as upload_module
from keepstep.mirror.owners import claim
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import STATE, commit
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE, wait_for
from tests.mirror.server import BUCKET, S3Server

CONFIG: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def add_files(folder: Path, names: list[str]) -> None:
    """To the manifest of a checkpoint."""
    whole = read_checkpoint(folder).manifest
    entries = {n: FileEntry(0, (folder / n).stat().st_size, digest_of(folder / n)) for n in names}
    files = {**whole.files, **entries}
    (folder / MANIFEST_NAME).write_text(replace(whole, files=files).to_json())


@pytest.fixture
def model(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a real model in bf16, its configuration, and an optimizer's shards."""
    monkeypatch.setattr(upload_module, "PART_BYTES", 3000)
    folder = commit(run.path, 12, STATE)
    made = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    made.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/a b.jinja").write_text("x")
    own = ["model.safetensors", "config.json", "generation_config.json"]
    add_files(folder, [*own, "additional_chat_templates/a b.jinja"])
    return folder


def send(store: Store, folder: Path) -> str:
    Upload(store, claim(store, "0123456789ab"), read_checkpoint(folder)).run({})
    return f"{store.url}/{folder.name}"


def export(*words: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, words)])


def left(place: Path) -> list[str]:
    return sorted(p.name for p in place.iterdir() if "model" in p.name or "partial" in p.name)


def test_as_from_a_disk(store: Store, model: Path, tmp_path: Path) -> None:
    url = send(store, model)
    for flags in ([], ["--dtype", "fp16", "--max_shard_size", "2KB"]):
        here, there = tmp_path / f"here{len(flags)}", tmp_path / f"there{len(flags)}"
        on_disk, done = export(model, "--to", here, *flags), export(url, "--to", there, *flags)
        assert done.exit_code == 0, done.output
        assert done.stdout == on_disk.stdout.replace(str(here), str(there))
        names = {p.relative_to(here) for p in here.rglob("*")}
        assert names == {p.relative_to(there) for p in there.rglob("*")}
        assert all((here / n).read_bytes() == (there / n).read_bytes() for n in names if n.suffix)
    LlamaForCausalLM.from_pretrained(there)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.usefixtures("here")
def test_no_shard_is_fetched_for_weights_that_are_there(
    s3: S3Server, model: Path, tmp_path: Path
) -> None:
    url = send(open_store(f"s3://{BUCKET}/run"), model)
    before = len(s3.log)
    assert export(url, "--to", tmp_path / "model").exit_code == 0
    read = [r.name.rpartition("/")[2] for r in s3.log[before:] if r.method == "GET"]
    assert not [n for n in read if "optim" in n or "rng" in n or "scheduler" in n]
    assert [n for n in read if n.startswith("model.safetensors")]


@pytest.mark.parametrize("damage", ["wrong bytes", "cut", "gone", "manifest"])
def test_damage_exports_nothing(store: Store, model: Path, tmp_path: Path, damage: str) -> None:
    url = send(store, model)
    wanted = MANIFEST_NAME if damage == "manifest" else "/model.safetensors.part-00001"
    (name,) = [n for n in store.names(model.name) if n.endswith(wanted)]
    content = store.get(name)
    if damage == "gone":
        store.delete([name])
    else:
        store.put(name, content[:-1] if damage == "cut" else content[:-1] + b"!")
    refused = export(url, "--to", tmp_path / "model")
    assert refused.exit_code == 1
    assert "model.safetensors" in refused.output or "manifest" in refused.output
    assert left(tmp_path) == []


def test_what_is_refused_before_anything_is_fetched(
    store: Store, model: Path, tmp_path: Path
) -> None:
    url, to = send(store, model), tmp_path / "model"
    for flags, told in (
        (["--dtype", "int8"], "int8 is none of"),
        (["--max_shard_size", "much"], "is no size"),
        (["--merge_adapter"], "is a whole model: there is nothing to merge"),
    ):
        refused = export(url, "--to", to, *flags)
        assert refused.exit_code == 2
        assert told in refused.output
    assert export(f"{store.url}/checkpoint-5", "--to", to).exit_code == 2
    to.mkdir()
    refused = export(url, "--to", to)
    assert refused.exit_code == 2
    assert "exists: name a new folder" in refused.output
    assert left(tmp_path) == ["model"]


def test_a_full_disk_says_what_it_needed(
    store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = send(store, model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10**6, 10**6, 5000))
    refused = export(url, "--to", tmp_path / "new/model")
    assert refused.exit_code == 1
    assert "the disk of " in refused.output
    assert "kB are needed, 5 kB are free" in refused.output
    assert left(tmp_path) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_while_the_store_hangs(
    s3: S3Server, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """What was fetched goes at once; after a SIGKILL by the next one."""
    url = send(open_store(f"s3://{BUCKET}/run"), model)
    fault = s3.fault("hang", method="GET", path="model.safetensors.part-00001")
    to = tmp_path / "model"
    code = "from keepstep.cli import command; command()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "export", url, "--to", str(to)], cwd=ROOT, env=dict(os.environ)
    )
    try:
        wait_for(lambda: fault.hits, child)
        child.send_signal(number)
        status = child.wait(PATIENCE)
    finally:
        child.kill()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGKILL:
        assert left(tmp_path) == [".model.fetched"]
        assert export(url, "--to", to).exit_code == 0
    assert left(tmp_path) == (["model"] if number == signal.SIGKILL else [])

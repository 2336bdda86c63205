"""What a process knows that unpickles: a planted pickle looks for tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keepstep.output.environment import without_secrets
from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.run_folder.contents import digest_of
from keepstep.sharding.sources import LAYOUT_FILE, MODULE_FILE
from tests.helpers.folders import identify, manifest

TOKEN = "hf_" + "PlantedPicklesLookForIt".ljust(34, "x")
SPY = """
import os
with open({0!r}, "a") as file:
    file.write(repr(dict(os.environ)) + open("/proc/self/environ").read() + "\\n")
"""


class Spy:
    """A pickle that writes down the environment of whoever loads it."""

    def __init__(self, into: Path) -> None:
        self.code = SPY.format(str(into))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One whose checkpoint holds nothing but shards, which are the spy's."""
    run, tag = identify(tmp_path / "run", metric="eval_loss"), "global_step8"
    folder = run / "checkpoint-8"
    (folder / tag).mkdir(parents=True)
    (folder / "latest").write_text(tag)
    (folder / LAYOUT_FILE).write_text(json.dumps({"tensors": []}))
    ranks = {"latest": 0, LAYOUT_FILE: 0, f"{tag}/{MODULE_FILE}": 0}
    ranks |= {f"{tag}/bf16_zero_pp_rank_{n}_mp_rank_00_optim_states.pt": n for n in (0, 1)}
    files = {}
    for name, rank in ranks.items():
        if name.endswith(".pt"):
            torch.save(Spy(tmp_path / "seen"), folder / name)
        digest = digest_of(folder / name)
        files[name] = FileEntry(rank, (folder / name).stat().st_size, digest)
    (folder / MANIFEST_NAME).write_text(manifest(8, files=files).to_json())
    return run


@pytest.mark.parametrize(
    "words",
    [
        ["push", "RUN", "--repo_id", "owner/name"],
        ["export", "RUN/checkpoint-8", "--to", "RUN/../made"],
        ["reshard", "RUN/checkpoint-8", "--to", "RUN/../made", "--num_processes", "1"],
        ["adopt", "RUN/checkpoint-8", "--into", "RUN/../made"],
    ],
    ids=lambda words: words[0],
)
def test_a_pickle_finds_no_token(run: Path, words: list[str]) -> None:
    """The spy runs, and finds no secret in its environment."""
    if words[0] == "adopt":  # what keepstep did not write
        (run / "checkpoint-8" / MANIFEST_NAME).unlink()
    done = subprocess.run(
        [Path(sys.executable).parent / "keepstep", *(w.replace("RUN", str(run)) for w in words)],
        env={**os.environ, "HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    seen = (run.parent / "seen").read_text()
    assert "PATH" in seen
    assert TOKEN not in seen
    assert TOKEN not in done.stdout + done.stderr


def test_what_is_named_like_a_secret() -> None:
    secrets = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"]
    secrets += ["DB_PASSWORD", "GOOGLE_APPLICATION_CREDENTIALS", "HF_OIDC_RESOURCE", "Api_Key"]
    others = ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "PYTHONPATH", "HF_HOME"]
    environment = dict.fromkeys(secrets + others, "value") | {"MINE": f"https://{TOKEN}@host"}
    assert without_secrets(environment) == dict.fromkeys(others, "value")

"""A run ends as it was: the last save is there, or the run has failed. What saves need is tried
before the first step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from keepstep.run_folder.reader import RunFolder
from tests.helpers.disks import small_disk_at
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

SCRIPT = PROGRAMS / "last_save.py"
FIELDS = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "last_save_retry_seconds": 1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", "200m") as place:
        yield place


def test_a_disk_that_is_read_only_at_the_end(ranks: Ranks, demo: Path, disk: Path) -> None:
    """No status can be written either: the exit status tells."""
    run = ranks.start(["read-only", *argv(demo, disk / "run", **FIELDS)], script=SCRIPT)
    assert run.wait() == [70, 70]
    assert "Failed at step 4: checkpoint-4 was not saved: rank 0: OSError: " in run.output
    assert "Read-only file system" in run.output
    assert "Training is over: it is tried again." in run.output
    assert "Finished" not in run.output
    assert [c.step for c in RunFolder(disk / "run").checkpoints()] == [2]


def test_a_last_save_that_arrives_in_the_end(ranks: Ranks, demo: Path, disk: Path) -> None:
    run = ranks.run(["for-a-moment", *argv(demo, disk / "run", **FIELDS)], script=SCRIPT)
    assert "Training is over: it is tried again." in run.output
    assert "Finished: 4 steps." in run.output
    folder = RunFolder(disk / "run")
    assert [c.step for c in folder.checkpoints()] == [2, 4]
    assert folder.faults(folder.checkpoint(4), deep=True) == []
    assert json.loads(folder.status.read_text())["outcome"] == "finished"


def test_what_is_told_of_the_last_save_is_looked_at(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    command = ["gone", *argv(demo, tmp_path / "run", **FIELDS)]
    run = ranks.start(command, script=SCRIPT, strategy="ddp", processes=1)
    assert run.wait() == [70]
    assert "Failed at step 4: checkpoint-4: optimizer.pt is missing" in run.output
    assert "Finished" not in run.output
    again = ranks.run(command[1:], strategy="ddp", processes=1)
    assert "carrying on from checkpoint-2" in again.output


@pytest.mark.parametrize(
    ("fault", "told", "steps"),
    [
        ("mistake", "KeyError: 'a name that is not there'", 2),
        ("renamed", "object has no attribute '_save_rng_state'", 0),
        pytest.param(
            *("callback", "Object of type set is not JSON serializable", 0), marks=pytest.mark.long
        ),
    ],
)
def test_a_mistake_in_a_program_ends_the_run(
    ranks: Ranks, demo: Path, tmp_path: Path, fault: str, told: str, steps: int
) -> None:
    """At the first save or, where it can be found out, before the first step."""
    run = ranks.start([fault, *argv(demo, tmp_path, **FIELDS)], script=SCRIPT)
    assert run.wait() == [70, 70]
    assert "Traceback" in run.output
    assert told in run.output
    assert "Finished" not in run.output
    assert "step 4/4" not in run.output
    assert ("step 1/4" in run.output) == (steps > 0)
    status = json.loads((tmp_path / ".keepstep/status.json").read_text())
    assert status["outcome"] == "failed"
    assert told in status["reason"]


def test_a_generation_config_that_transformers_would_not_store(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """Published ones are so, and the Trainer adds the tokenizer's special tokens."""
    sampling = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    model = shutil.copytree(demo / "model", tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **sampling}))
    fields = {**FIELDS, "max_steps": 2, "model_name_or_path": model}
    run = ranks.run(argv(demo, tmp_path / "run", **fields), processes=1)
    assert run.output.count("generation_config.json is stored as it came") == 1
    assert "`temperature` is set to `0.9`" in run.output
    stored = json.loads((tmp_path / "run/checkpoint-2/generation_config.json").read_text())
    assert stored.items() >= sampling.items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert loaded.generation_config.temperature == 0.9


def test_weights_that_must_be_gathered_are_whatever_the_config_says(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """ZeRO-3 without zero3_save_16bit_model; the experts' weights lie in memory as no file has
    them."""
    small = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    small |= {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    vocabulary = json.loads((demo / "model/config.json").read_text())["vocab_size"]
    model = shutil.copytree(demo / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **small)).save_pretrained(model)
    fields = {**FIELDS, "max_steps": 2, "model_name_or_path": model}
    made = argv(demo, tmp_path / "run", **fields)
    run = ranks.run(made, strategy="cpu_zero3-ungathered")
    assert run.output.count("every save gathers the weights on one rank") == 1
    assert "eval_loss holds the router's loss, too: 0.001 x eval_aux_loss" in run.output
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/checkpoint-2", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_name_of_a_checkpoint_is_taken(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """At a step that is due, and at the one where the run is told to stop: each is saved a step
    later, and what is there is not touched."""
    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoint-2").mkdir(parents=True)
    (folder.path / "checkpoint-2/mine").write_text("mine")
    for step in (4, 5):
        (folder.path / f"checkpoint-{step}").symlink_to("nowhere")
    fields = FIELDS | {"max_steps": 9, "resume_from_checkpoint": "never", "max_failed_saves": 1}
    run = ranks.start(["stop-at-4", *argv(demo, folder.path, **fields)], script=SCRIPT)
    assert run.wait() == [75, 75]
    assert "checkpoint-2 is not touched, and in the way of that step's save" in run.output
    assert "The step after it is saved instead." in run.output
    assert [c.step for c in folder.checkpoints()] == [3, 6]
    assert [p.name for p in (folder.path / "checkpoint-2").iterdir()] == ["mine"]

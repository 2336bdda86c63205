"""The examples run, and the documentation shows what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE


def run_example(name: str, cwd: Path, *arguments: str) -> str:
    return run([sys.executable, str(ROOT / "launch/examples" / name), *arguments], cwd)


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "HF_DATASETS_CACHE": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_textbook_scenario(tmp_path: Path) -> None:
    def plain(text: str) -> list[str]:
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
        return [line.rstrip() for line in text.strip().splitlines()]

    told = run_example("retention_story.py", tmp_path, "runs/story")
    (shown,) = re.findall(
        r"```\n(\$ keepstep ls.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.S
    )
    assert plain(told) == plain(shown)


def test_exactly_the_best_three_when_the_newest_is_among_them(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "launch/examples"))
    import retention_story

    from keepstep.run_folder.reader import RunFolder

    falling = {500 * n: 2.0 - n / 10 for n in range(1, 7)}
    retention_story.play(tmp_path, falling)
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [2000, 2500, 3000]


# The lesson as it is, looked at when training begins; and what contradicts itself.
LESSON = """
import runpy, sys
from transformers import TrainerCallback
from keepstep.trainer.sft import KeepstepTrainer

class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        rate = lr_scheduler.get_last_lr()[0]
        print("begins at", state.global_step, len(optimizer.state), lr_scheduler.last_epoch, rate)

def train(self, resume_from_checkpoint=None):
    self.add_callback(Look)
    recipe = self.attempt.recipe.training
    for configured, given in (("never", True), ("best", "latest"), ("4", 2)):
        recipe.resume_from_checkpoint = configured
        try:
            original(self, resume_from_checkpoint=given)
        except ValueError as error:
            print("refused:", str(error).splitlines()[0])
    recipe.resume_from_checkpoint = "auto"
    result = original(self, resume_from_checkpoint=resume_from_checkpoint)
    try:
        original(self)
    except RuntimeError as error:
        print("once:", str(error).splitlines()[0])
    return result

original, KeepstepTrainer.train = KeepstepTrainer.train, train
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_classic_lesson(tmp_path: Path) -> None:
    example = str(ROOT / "launch/examples/checkpoint_demo.py")
    code = f"import sys; sys.argv[0] = {example!r}\n{LESSON}"
    told = run([sys.executable, "-c", code, "runs/lesson"], tmp_path)
    kept = re.findall(r"kept: (.*)", told)
    assert kept[0] == "checkpoint-2, checkpoint-4"
    best = re.findall(r"best: checkpoint-(\d+), eval_loss (\d\.\d{4})", told)
    resumed = re.search(r"resumed at step (\d+)", told)
    assert resumed is not None
    assert resumed.group(1) == best[0][0]
    assert float(best[1][1]) <= float(best[0][1])
    assert "checkpoint-6" in kept[1]
    begins = [line.split()[2:] for line in told.splitlines() if line.startswith("begins at")]
    assert begins[0] == ["0", "0", "0", "0.005"]
    step, entries, scheduled, rate = begins[1]
    assert step == scheduled == resumed.group(1)
    assert int(entries) == 4  # two layers' two matrices, each with its moments
    assert float(rate) == pytest.approx(0.005 * (4 - int(step)) / 4)  # four steps were planned
    refused = re.findall("refused: (.*)", told)
    assert len(refused) == 2 * 3
    assert all("and the config says" in line for line in refused)
    assert len(re.findall("once: this trainer has trained already", told)) == 2


MODEL = ROOT / ".smollm2/model"


@pytest.mark.long
@pytest.mark.skipif(
    not MODEL.is_dir(), reason="no .smollm2/model: `make example-smollm2` downloads 93 MB for it"
)
@pytest.mark.parametrize(
    ("kind", "written"), [("lora", "adapter_model.safetensors"), ("full", "model.safetensors")]
)
def test_a_real_model_from_data_to_an_answer(tmp_path: Path, kind: str, written: str) -> None:
    """Few steps; nothing is downloaded for it again: the address of the index leads nowhere."""
    few = ("--max_steps", "4", "--eval_steps", "2", "--save_steps", "2")
    environment = {"OUT": str(tmp_path / "out"), "PIP_INDEX_URL": "http://127.0.0.1:1"}
    done = subprocess.run(
        [str(ROOT / "launch/smollm2.sh"), kind, *few],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"eval_loss (\d+\.\d+)  ", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0], "before the first step, and after the last"
    answers = re.findall(r"    answers: (.+)", done.stdout)
    assert len(answers) == 3 * 4
    assert answers[3] == "The capital of France is Paris."
    before, exported, pulled = answers[:4], answers[4:8], answers[8:]
    assert exported != before
    if kind == "full":  # merged, an adapter's sums are rounded in another way
        assert pulled == exported
    assert (tmp_path / "out/pulled" / written).is_file()
    assert not (tmp_path / "out/hub").exists()

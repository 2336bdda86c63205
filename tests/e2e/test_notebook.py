"""A notebook, executed twice in a real kernel: the second time it carries on."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import final_digests
from tests.helpers.waiting import PATIENCE

SETTINGS = """
import os, signal
from datasets import Dataset
from keepstep import KeepstepConfig, KeepstepTrainer
from transformers import TrainerCallback

rows = Dataset.from_json("{demo}/data/train.jsonl")
evaluation = Dataset.from_json("{demo}/data/eval.jsonl")

class Interrupted(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {at}:
            os.kill(os.getpid(), signal.SIGINT)  # as the button of the notebook does
"""
TRAINING = """
handler = signal.getsignal(signal.SIGINT)
trainer = KeepstepTrainer(
    model="{demo}/model",
    args=KeepstepConfig(
        output_dir="{run}",
        max_steps=8,
        save_steps=4,
        max_length=64,
        per_device_train_batch_size=4,
        logging_steps=1,
        gradient_checkpointing=False,
        report_to="none",
    ),
    train_dataset=rows,
    eval_dataset=evaluation,
    callbacks=[Interrupted()],
)
result = trainer.train()
print(trainer.outcome.outcome, result.global_step, signal.getsignal(signal.SIGINT) is handler)
"""


def executed(folder: Path, demo: Path, run: Path, at: int, times: int = 1) -> list[str]:
    """What each execution of the training cell printed; in one kernel."""
    cells = [SETTINGS, *[TRAINING] * times]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c.format(demo=demo, run=run, at=at)) for c in cells]
    )
    # By sockets in the runtime folder: a port that was free may be somebody's when it is used.
    patience: Any = {"timeout": PATIENCE, "startup_timeout": PATIENCE}
    patience["config"] = Config(KernelManager={"transport": "ipc"})
    NotebookClient(notebook, **patience, kernel_name="python3", cwd=str(folder)).execute()
    return [
        "".join(o["text"] for o in cell["outputs"] if o.get("name") == "stdout")
        for cell in notebook["cells"][1:]
    ]


@pytest.fixture(autouse=True)
def _kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 characters at most
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
        yield


def test_interrupted_and_run_again(demo: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    (whole,) = executed(tmp_path, demo, straight, at=0)
    assert whole.splitlines()[-1] == "finished 8 True"
    first, second, third = executed(tmp_path, demo, broken, at=6, times=3)
    assert first.splitlines()[-1] == "preempted 6 True"
    assert "Stopped on request (SIGINT to rank 0) after step 6; the state is saved." in first
    assert "carrying on from checkpoint-6" in second
    assert second.splitlines()[-1] == "finished 8 True"
    assert "This run is finished, at step 8 of 8" in third
    assert third.splitlines()[-1] == "finished 8 True"
    assert re.findall(r"step (\d)/8  loss", first + second) == [str(n) for n in range(1, 9)]
    assert [c.step for c in RunFolder(broken).checkpoints()] == [4, 6, 8]
    assert final_digests(broken, 8) == final_digests(straight, 8)

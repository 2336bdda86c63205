"""A vision-language run: killed and carried on with every row, exported, compared, published."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from keepstep.convert.export import export
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv
from tests.helpers.vision import fields, make_vision

SCRIPT = PROGRAMS / "vision.py"
ROWS, PER_STEP, STEPS = 24, 6, 8
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {
        **{"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"},
        **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    },
}


@pytest.fixture(scope="session")
def vision(workspace: Path) -> Path:
    return make_vision(workspace / "vision")


class Launched:
    """A run that is launched again and again."""

    def __init__(self, ranks: Ranks, vision: Path, folder: Path, **others: object) -> None:
        self.ranks, self.watch, self.run = ranks, folder / "watch", folder / "run"
        self.command = argv(vision, **fields(vision, self.run, **others))  # type: ignore[arg-type]

    def launch(self, strategy: str, processes: int, kill_at: int = 0) -> str:
        """Train to the end, or until the last rank is killed; the log."""
        command = [str(self.watch), str(kill_at), *self.command]
        run = self.ranks.start(command, strategy=strategy, processes=processes, script=SCRIPT)
        codes = run.wait()
        assert (codes[-1] == -9) if kill_at else not any(codes), run.output
        return run.output

    def rows(self) -> dict[int, list[str]]:
        """What each step that counts was trained on: of a step that was done again, the last."""
        steps: dict[int, dict[int, list[str]]] = {}
        for file in self.watch.glob("rows-*.jsonl"):
            attempt = int(file.name.split("-")[1])
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                steps.setdefault(entry["step"], {}).setdefault(attempt, []).extend(entry["rows"])
        return {step: sorted(found[max(found)]) for step, found in steps.items()}

    def losses(self) -> list[float]:
        last = RunFolder(self.run).checkpoints()[-1]
        history = json.loads((last.path / "trainer_state.json").read_text())["log_history"]
        return [
            e.get("loss", e.get("eval_loss")) for e in history if {"loss", "eval_loss"} & set(e)
        ]


@pytest.mark.parametrize(
    ("strategy", "kind"),
    cases(
        itertools.product(("ddp", "cpu_zero2", "cpu_zero3"), KINDS),
        long=[
            *(("ddp", "full"), ("ddp", "lora"), ("cpu_zero2", "full"), ("cpu_zero2", "lora")),
            ("cpu_zero3", "lora"),
        ],
    ),
)
def test_killed_and_carried_on(
    ranks: Ranks, vision: Path, tmp_path: Path, strategy: str, kind: str
) -> None:
    straight = Launched(ranks, vision, tmp_path / "straight", **KINDS[kind])
    broken = Launched(ranks, vision, tmp_path / "broken", **KINDS[kind])
    straight.launch(strategy, 2)
    broken.launch(strategy, 2, kill_at=7)
    assert "checkpoint-4" in broken.launch(strategy, 2)
    same(straight.run, broken.run)
    rows = broken.rows()
    assert rows == straight.rows()
    assert [len(rows[step]) for step in range(1, 9)] == [PER_STEP] * STEPS
    for first in (1, 5):
        assert len({row for step in range(first, first + 4) for row in rows[step]}) == ROWS
    check_export(RunFolder(broken.run), vision, tmp_path, kind == "lora")


def same(straight: Path, broken: Path) -> None:
    """The last checkpoints hold the same, bit for bit; an optimizer of DDP's the same numbers: of
    the texts in its pickle, those that a load has made anew are no references."""
    digests, others = final_digests(straight, STEPS), final_digests(broken, STEPS)
    apart = {name for name in digests | others if digests.get(name) != others.get(name)}
    assert apart <= {"optimizer.pt"}
    for name in apart:
        files = [run / f"checkpoint-{STEPS}" / name for run in (straight, broken)]
        one, other = (torch.load(file, weights_only=True) for file in files)
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        for number, state in one["state"].items():
            assert all(torch.equal(state[n], other["state"][number][n]) for n in state)


def check_export(run: RunFolder, vision: Path, tmp_path: Path, adapter: bool) -> None:
    """What is exported is found by the auto classes, and says something about an image."""
    export(run.checkpoint(STEPS), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.size == {"shortest_edge": 32}
    if adapter:
        return
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    asked = [{"type": "image", "path": str(vision / "data/3.png")}, {"type": "text", "text": "?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    del inputs["pixel_values"]
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "cpu_zero2", "cpu_zero3"])
def test_on_other_processes(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    """From two processes to one and to three: in the last step of a pass, one of them has a row."""
    still = make_vision(tmp_path / "still", dropout=0.0, rows=25)
    others = {"per_device_train_batch_size": 6, "save_steps": 2, "eval_steps": 2}
    straight = Launched(ranks, still, tmp_path / "straight", **others)
    broken = Launched(ranks, still, tmp_path / "broken", **others)
    straight.launch(strategy, 2)
    broken.launch(strategy, 2, kill_at=4)
    broken.launch(strategy, 1, kill_at=6)
    broken.launch(strategy, 3)
    rows = broken.rows()
    assert rows == straight.rows()
    assert [len(rows[step]) for step in range(1, 9)] == [12, 12, 1] * 2 + [12, 12]
    assert broken.losses() == pytest.approx(straight.losses(), abs=2e-5)

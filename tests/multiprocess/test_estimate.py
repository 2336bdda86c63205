"""What `keepstep estimate` says of checkpoints, against what is written: within 3 %."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.run_folder.reader import RunFolder
from tests.conftest import make
from tests.helpers.campaigns import cases
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five million parameters: small change is small here."""
    demo = make(tmp_path_factory.mktemp("larger"), dropout=0.0)
    config = AutoConfig.from_pretrained(demo / "model")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 768, 6
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 64
    AutoModelForCausalLM.from_config(config).save_pretrained(demo / "model")
    return demo


EVERY = [*itertools.product(("full", "bf16", "lora"), ("ddp", "zero1", "zero2", "zero3"))]
SOME = [("full", "zero1"), ("bf16", "zero2"), ("lora", "zero3"), ("lora", "ddp")]


@pytest.mark.parametrize(("kind", "strategy"), cases(EVERY, long={*EVERY} - {*SOME}))
def test_checkpoints(ranks: Ranks, larger: Path, tmp_path: Path, kind: str, strategy: str) -> None:
    fields: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "max_length": 32}
    fields |= {"full": {}, "bf16": {"bf16": True, "dtype": "bfloat16"}, "lora": LORA}[kind]
    flags = argv(larger, tmp_path, **fields, per_device_train_batch_size=1)
    config = {"zero2": "cpu_zero2", "zero3": "cpu_zero3"}.get(strategy, strategy)
    ranks.run(flags, strategy=config)
    written = RunFolder(tmp_path).checkpoints()[-1].manifest.total_bytes

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}\n")
    words = ["estimate", str(recipe), "--num_processes", "2", "--json", *flags]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    said = {row["strategy"]: row["checkpoint_bytes"] for row in told["rows"]}[strategy]
    print(f"{kind} {strategy}: {written} written, {said} said: {said / written - 1:+.2%}")
    assert said == pytest.approx(written, rel=0.03)

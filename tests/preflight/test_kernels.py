"""What this machine and a model have of fast kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.kernels import FLASH, Machine, choose, lacks
from keepstep.preflight.kernels import asked_of, kernels_here, machine_of
from keepstep.preflight.shapes import on_meta
from keepstep.recipe.config import Recipe
from keepstep.recipe.parse import parse_recipe
from tests.helpers.folders import commit
from tests.helpers.recipes import argv

GPU = Machine(liger="liger-kernel is not installed")
LINE = "attention sdpa, no Liger (no CUDA device), packing off"


def recipe_of(demo: Path, folder: Path, **fields: object) -> Recipe:
    return parse_recipe(argv(demo, folder, **fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_here(demo: Path, tmp_path: Path) -> None:
    recipe = recipe_of(demo, tmp_path / "run")
    assert machine_of(recipe.training).without == "no CUDA device"
    found = kernels_here(recipe)
    assert found is not None
    assert found.line == LINE
    packed = kernels_here(recipe_of(demo, tmp_path / "run", packing=True))
    assert packed is not None
    assert packed.line.endswith(", packing bfd")
    assert kernels_here(recipe_of(demo, tmp_path, model_name_or_path="owner/not-here")) is None


def test_a_gpu_as_the_demo_s_model_would_use_it(demo: Path, tmp_path: Path) -> None:
    recipe = recipe_of(demo, tmp_path / "run", bf16=True)
    asked = asked_of(recipe, on_meta(recipe), GPU)
    assert (asked.takes_flash, asked.widest_head, asked.own) == (True, 32, "sdpa")
    assert choose(asked, lacks(asked, GPU)).attention == FLASH
    for fields in (
        {"attn_implementation": "eager"},
        {"model_init_kwargs": '{"attn_implementation": "eager"}'},
    ):
        said = recipe_of(demo, tmp_path / "run", bf16=True, **fields)
        asked = asked_of(said, on_meta(said), GPU)
        assert choose(asked, lacks(asked, GPU)).attention == "eager"


def test_a_run_that_has_begun(demo: Path, tmp_path: Path) -> None:
    """By the newest checkpoint of its folder, unless it is told to begin anew."""
    run = tmp_path / "run"
    commit(run, 10, settings={"attn_implementation": "sdpa", "use_liger_kernel": False})
    recipe = recipe_of(demo, run, bf16=True)
    asked = asked_of(recipe, on_meta(recipe), GPU)
    assert choose(asked, lacks(asked, GPU), {"attn_implementation": "sdpa"}).attention == "sdpa"
    assert kernels_here(recipe) is not None
    assert kernels_here(recipe_of(demo, run, resume_from_checkpoint="never")) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
@pytest.mark.parametrize("command", ["check", "preview"])
def test_commands_tell(demo: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    told = CliRunner().invoke(
        app, [command, f"{tmp_path}/recipe.yaml", *argv(demo, tmp_path / "x")]
    )
    assert told.exit_code == 0, told.output
    (line,) = [line for line in told.output.splitlines() if line.startswith("speed, here:")]
    assert line.split(":")[1].strip() == LINE

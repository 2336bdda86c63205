"""What shipped recipes say that they cost is what `keepstep estimate` says, and fits.

The models are known by their sizes alone (models.json: from their configurations on the Hub), so
that nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from keepstep.cli.start import Template
from keepstep.preflight import estimate
from keepstep.preflight.launch import launch_in
from keepstep.preflight.shapes import shapes_of, step_of, strategy_of
from keepstep.recipe.parse import parse_recipe
from tests.helpers.ranks import ROOT

RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
MODELS = json.loads((Path(__file__).parent / "models.json").read_text())
NO_COST = {"demo", "smollm2-lora", "smollm2-full"}  # on CPU, in minutes
LINE = re.compile(
    r"^# (?P<hardware>.+): (?P<config>\w+), (?P<processes>\d+) process(?:es)?, "
    r"(?P<device>[\d.]+) GB of each GPU's (?P<size>\d+), "
    r"(?P<host>[\d.]+) GB of host memory a process, (?P<checkpoint>[\d.]+) GB a checkpoint$",
    re.M,
)
LEAVE_FREE = 0.1  # of a GPU: CUDA, fragments, and what an estimate is off by


@dataclass(frozen=True)
class Cost:
    """One line of a recipe: on this hardware, it takes so much."""

    recipe: Path
    config: str
    processes: int
    size: float
    told: tuple[float, float, float]

    def __str__(self) -> str:
        return f"{self.recipe.stem}, {self.processes} x {self.config}"


def costs(recipe: Path) -> list[Cost]:
    found = LINE.finditer(recipe.read_text())
    return [
        Cost(
            recipe,
            m["config"],
            int(m["processes"]),
            float(m["size"]),
            (float(m["device"]), float(m["host"]), float(m["checkpoint"])),
        )
        for m in found
    ]


COSTS = [cost for recipe in RECIPES for cost in costs(recipe)]


def estimated(cost: Cost, folder: Path) -> tuple[float, float, float]:
    """Of a GPU, of a process's host memory, of a checkpoint: GB."""
    name = yaml.safe_load(cost.recipe.read_text())["model_name_or_path"]
    (folder / "config.json").write_text(json.dumps(MODELS[name]["config"]))
    argv = ["--config", str(cost.recipe), "--model_name_or_path", str(folder)]
    argv += ["--bf16", "True"]  # null means it on the hardware that is meant
    recipe = parse_recipe(argv, launched=False)
    shapes = shapes_of(recipe)
    assert shapes is not None
    sequences = launch_in(ROOT / f"accelerate_configs/{cost.config}.yaml", recipe).sequences
    asked = replace(strategy_of(recipe, cost.processes), sequences=sequences)
    named = cost.config.removesuffix(f"_sp{sequences}")
    strategy = {s.name: s for s in estimate.alternatives(asked)}[named]
    device = estimate.device_bytes(shapes, strategy, step_of(recipe))
    checkpoint = estimate.checkpoint_bytes(shapes, strategy)
    return device / 1e9, estimate.host_bytes(shapes, strategy) / 1e9, checkpoint / 1e9


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_costs_are_what_is_estimated_and_fit(cost: Cost, tmp_path: Path) -> None:
    found = estimated(cost, tmp_path)
    assert cost.told == pytest.approx(found, rel=0.03, abs=0.06), found
    assert found[0] <= (1 - LEAVE_FREE) * cost.size
    assert (ROOT / f"accelerate_configs/{cost.config}.yaml").is_file()


def test_every_recipe_is_a_template() -> None:
    """But for the two of the example, which have a model of their own."""
    templates = {template.value for template in Template}
    assert templates == {recipe.stem for recipe in RECIPES} - {"smollm2-lora", "smollm2-full"}


def test_every_recipe_says_what_it_costs() -> None:
    assert {cost.recipe.stem for cost in COSTS} == {r.stem for r in RECIPES} - NO_COST
    unread = [
        line
        for recipe in RECIPES
        for line in recipe.read_text().splitlines()
        if "GB of each GPU" in line and LINE.match(line) is None
    ]
    assert unread == []


@pytest.mark.parametrize("name", sorted(MODELS))
def test_sizes_are_those_of_the_models(name: str, tmp_path: Path) -> None:
    """As many parameters as their cards name."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]["config"]))
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {tmp_path}\noutput_dir: x\n")
    shapes = shapes_of(parse_recipe(["--config", str(tmp_path / "recipe.yaml")], launched=False))
    assert shapes is not None
    assert shapes.total == pytest.approx(MODELS[name]["parameters"], rel=MODELS[name]["within"])

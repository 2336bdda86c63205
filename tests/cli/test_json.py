"""What programs read: the output of `--json`, byte for byte, and the page that describes it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import LlamaConfig
from typer.testing import CliRunner

from keepstep.cli.history import RunShown
from keepstep.cli.main import app
from keepstep.cli.rows import (
    CheckpointRow,
    CheckReport,
    Estimate,
    GoodputReport,
    JsonObject,
    ResumeAnswer,
)
from keepstep.cli.samples import SampleRow
from keepstep.cli.status import RunStatus
from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.samples import Sample, lines_of
from keepstep.policy.strict import build
from tests.cli.json_page import COMMANDS, INNER, PAGE, SCHEMAS, page, schemas
from tests.cli.test_help import COMMANDS as KEEPSTEP
from tests.helpers.folders import commit, identify

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two branches, an adopted checkpoint, a job, what saves cost, and damage."""
    run = identify(tmp_path / "run", limit=2, ranking="metric", metric="eval_loss")
    batch = Batch(6, 1, 2)
    commit(run, 10, metrics={"eval_loss": 2.0}, origin="a stock Trainer's checkpoint")
    commit(run, 20, metrics={"eval_loss": 1.0}, dealt=Dealt(batch, batch, 64).as_json())
    commit(run, 30, metrics={}, health={"finite": False})
    commit(run, 15, attempt=2, parent=10, zero_stage=0, deepspeed=True, world_size=1)
    (run / "checkpoint-30/rng_state_1.pth").unlink()
    (run / "checkpoint-99").mkdir()
    facts = {"time": "2026-11-25T09:30:51.989+00:00"}
    save = {"bytes": 2_150_000_000, "gb_per_s": 2.4, "slowest_rank": 1, "stall": 0.05, "wait": 0.0}
    lines = [
        {**facts, "attempt": 1, "event": "attempt", "job": "17", "nodes": "n1", "restarts": 2},
        {**facts, "attempt": 1, "event": "commit", "step": 20, **save},
        {**facts, "attempt": 2, "event": "attempt"},
        {**facts, "attempt": 2, "event": "resume", "request": "10", "step": 10},
        {**facts, "attempt": 2, "event": "reshard", "from_processes": 2, "from_stage": 3},
    ]
    answers = [Sample(20, 1, "2+2?", "4", "4"), Sample(20, 2, "say\nit", "caf\u00e9")]
    (run / "samples.jsonl").write_text("\n".join(lines_of(answers, 1, "now")))
    (run / ".keepstep/events.jsonl").write_text("".join(json.dumps(li) + "\n" for li in lines))
    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tmp_path}/model\ndataset_name: {tmp_path}/rows.jsonl\n"
        f"output_dir: {tmp_path}/new\nmax_length: 8\nsave_total_limit: 1\nuse_cpu: true\n"
    )
    return recipe


ANSWERS: dict[str, tuple[str, Any]] = {
    "ls": ("ls RUN", tuple[CheckpointRow, ...]),
    "status": ("status RUN", RunStatus),
    "show": ("show RUN", RunShown),
    "goodput": ("goodput RUN", GoodputReport),
    "verify": ("verify RUN --deep", dict[str, tuple[str, ...]]),
    "samples": ("samples RUN", tuple[SampleRow, ...]),
    "which": ("which RUN --num_processes 3", tuple[ResumeAnswer, ...]),
    "which-step": ("which RUN 30", tuple[ResumeAnswer, ...]),
    "check": ("check RECIPE --walltime 60", CheckReport),
    "estimate": ("estimate RECIPE --num_processes 2", Estimate),
}
PAGE_OF = {"which-step": "which"}
VARIES = {"check": "texts of libraries", "estimate": "the disk's speed"}


def outline(value: Any) -> Any:
    """Keys in their order, and types; of a list the first entry's."""
    if isinstance(value, dict):
        return [(name, outline(entry)) for name, entry in value.items()]
    if isinstance(value, list):
        return [outline(entry) for entry in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize("name", ANSWERS)
def test_json_is_what_it_was(run: Path, recipe: Path, tmp_path: Path, name: str) -> None:
    command, kind = ANSWERS[name]
    places = {"RUN": str(run), "RECIPE": str(recipe)}
    argv = [places.get(word, word) for word in command.split()]
    told = CliRunner().invoke(app, [*argv, "--json"]).stdout
    assert told.isascii()
    told = told.replace(str(tmp_path), "/TMP")
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("KEEPSTEP_GOLDEN") == "write":
        golden.write_text(told)
    if name in VARIES:
        assert outline(json.loads(told)) == outline(json.loads(golden.read_text()))
    else:
        assert told == golden.read_text()
    page_name = f"keepstep {PAGE_OF.get(name, name)} "
    schema = next(s for title, s in schemas().items() if title.startswith(page_name))
    Draft202012Validator(schema).validate(json.loads(told))
    build(kind, json.loads(told))  # raises where a value is not of the type that its field has


def test_the_schemas_are_those_of_the_dataclasses() -> None:
    told = json.dumps(schemas(), indent=1) + "\n"
    if os.environ.get("KEEPSTEP_GOLDEN") == "write":
        SCHEMAS.write_text(told)
    assert SCHEMAS.read_text() == told
    for schema in schemas().values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("command", ["prune RUN --dry_run", "rm RUN 10 --dry_run --force"])
def test_what_removes_prints_as_its_schema_says(run: Path, command: str) -> None:
    argv = [str(run) if word == "RUN" else word for word in command.split()]
    shutil.rmtree(run / "checkpoint-30")  # it is damaged, so nothing would be removed
    told = json.loads(CliRunner().invoke(app, [*argv, "--json"]).stdout)
    schema = next(s for t, s in schemas().items() if t.startswith(f"keepstep {argv[0]} "))
    Draft202012Validator(schema).validate(told)
    assert told["dry_run"]


def test_each_line_of_a_log_is_as_its_schema_says(run: Path) -> None:
    told = CliRunner().invoke(app, ["log", str(run), "--json"]).stdout.splitlines()
    assert len(told) == 5
    for line in told:
        Draft202012Validator(schemas()["keepstep log RUN --json"]).validate(json.loads(line))


@pytest.mark.parametrize("command", ["ls", "status", "show", "goodput", "verify", "log"])
def test_errors_are_not_in_the_way_of_programs(tmp_path: Path, command: str) -> None:
    told = CliRunner().invoke(app, [command, str(tmp_path / "nowhere"), "--json"])
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr == f"keepstep: there is no folder {tmp_path}/nowhere\n"
    told = CliRunner().invoke(app, [command, str(tmp_path / "nowhere")])
    assert told.stdout == f"keepstep: there is no folder {tmp_path}/nowhere\n"


def test_every_command_with_json_is_on_the_page() -> None:
    with_json = {
        name
        for name, command in KEEPSTEP.items()
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert with_json == {command.split()[1] for command, _ in COMMANDS.values()}
    others = {"log", "prune", "rm"} | {"export"}  # above; what `export` prints is of rm's class
    assert with_json - {ANSWERS[name][0].split()[0] for name in ANSWERS} == others


def test_the_page_is_that_of_the_dataclasses() -> None:
    if os.environ.get("KEEPSTEP_GOLDEN") == "write":
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_every_object_is_on_the_page() -> None:
    assert {kind.__name__ for kind in JsonObject.__subclasses__()} <= {
        kind.__name__ for _, kind in COMMANDS.values()
    } | {kind.__name__ for kind in INNER}

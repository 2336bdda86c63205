"""Rows as tokens: the same as SFTTrainer makes them, counted; and what is told before step 1."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig
from trl import SFTTrainer
from typer.testing import CliRunner

from keepstep import train
from keepstep.cli.main import app
from keepstep.data.tokenize import (
    IGNORED,
    Positions,
    Preparation,
    in_turns,
    measure,
    prepare,
    too_long,
)
from keepstep.policy.batch import BatchError, Course
from keepstep.recipe.config import ConfigError
from keepstep.recipe.parse import parse_recipe
from tests.data.test_dataset import CHAT, lines, problems, write
from tests.helpers.recipes import argv

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pairs() -> datasets.Dataset:
    """Prompts of 1 to 40 words, answers of 1 to 5."""
    rows = [(" ".join(WORDS * 4)[: 4 + 9 * n], " ".join(WORDS[: 1 + n % 5])) for n in range(20)]
    return datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in rows])


CASES: dict[str, dict[str, Any]] = {
    "as they are": {"max_length": 1000},
    "no bound": {"max_length": None},
    "the beginning": {"max_length": 30},
    "the end": {"max_length": 30, "truncation_mode": "keep_end"},
    "shuffled": {"max_length": 30, "shuffle_dataset": True},
    "packed": {"max_length": 30, "packing": True},
    "packed and split": {"max_length": 30, "packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"max_length": 30, "packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("case", CASES)
def test_as_sfttrainer_prepares_them(demo: Path, tmp_path: Path, case: str) -> None:
    training = parse_recipe(argv(demo, tmp_path / "run", assistant_only_loss=False)).training
    for name, value in CASES[case].items():
        setattr(training, name, value)
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    rows = pairs()
    alone: Any = Preparation(tokenizer, training, rows[0])

    def stage(rows: Any, args: Any, packing: bool) -> Any:
        return SFTTrainer._prepare_dataset(alone, rows, tokenizer, args, packing, None, "train")

    expected = stage(rows, training, training.packing)
    prepared, count = prepare("training", rows, training, training.packing, stage)
    assert prepared[:] == expected[:]
    assert count is not None
    training.max_length = None
    whole = stage(rows, training, False)["labels"]
    lengths = [len(row) for row in whole]
    bound = CASES[case]["max_length"] or max(lengths)
    if count.packed is not None:
        left = [row[:30] if case == "packed" else row for row in whole]
        used = sum(any(label != IGNORED for label in row) for row in left)
        assert (count.rows, count.used, count.packed) == (20, used, len(expected))
        assert (count.dropped > 0) == (case == "packed"), "nothing is cut to be packed otherwise"
        assert count.longest <= 30
        return
    assert (count.rows, count.used) == (20, len(expected))
    assert count.cut == sum(length > bound for length in lengths) - count.dropped
    assert count.longest == max(len(row) for row in expected["labels"])
    assert (count.dropped > 0) == (case in ("the beginning", "shuffled"))


@given(
    rows=st.lists(st.lists(st.sampled_from([IGNORED, 5]), max_size=6), min_size=1, max_size=8),
    most=st.none() | st.integers(1, 5),
    end=st.booleans(),
    at_once=st.integers(1, 4),
)
def test_measured_by_labels(
    rows: list[list[int]], most: int | None, end: bool, at_once: int
) -> None:
    class Settings:
        max_length, packing_strategy = most, "bfd"
        truncation_mode = "keep_end" if end else "keep_start"

    kept = [row if most is None else row[-most:] if end else row[:most] for row in rows]
    used = [n for n, row in enumerate(kept) if 5 in row]
    whole = pa.array(rows, pa.list_(pa.int64()))
    parts = [whole[n : n + at_once] for n in range(0, len(rows), at_once)]
    found = measure(parts, Settings(), False)  # type: ignore[arg-type]
    assert (found.rows, found.used) == (len(rows), len(used))
    assert found.cut == sum(len(kept[n]) < len(rows[n]) for n in used)
    assert found.taught == sum(5 in row[1:] for row in kept)
    assert found.longest == max((len(kept[n]) for n in used), default=0)


def test_no_rows_left_is_said_before_step_1(demo: Path, tmp_path: Path) -> None:
    """By the trainer, who looks at each row: those at the beginning are good here."""
    training = parse_recipe(argv(demo, tmp_path / "run")).training
    training.max_length = 4
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    rows = datasets.Dataset.from_list([{"prompt": "a long one " * 9, "completion": "b"}])
    alone: Any = Preparation(tokenizer, training, rows[0])

    def stage(rows: Any, args: Any, packing: bool) -> Any:
        return SFTTrainer._prepare_dataset(alone, rows, tokenizer, args, packing, None, "train")

    for packing in (False, True):
        with pytest.raises(ConfigError, match="none of the 1 evaluation rows is left"):
            prepare("evaluation", rows, training, packing, stage)
    with pytest.raises(BatchError, match="there are no rows to train on"):
        Course(0, 4)


def test_errors_of_rows_and_of_the_machine() -> None:
    with pytest.raises(ConfigError, match="cannot be made into tokens: JSONDecodeError: Expecting"):
        in_turns("training", lambda: json.loads("["))
    with pytest.raises(OSError, match="No space"):
        in_turns("training", no_space)
    assert in_turns("training", lambda: 3) == 3


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_positions() -> None:
    assert Positions.of(GPT2Config(n_positions=64)) == Positions(64, True, 50_257)
    assert Positions.of(LlamaConfig(max_position_embeddings=64)) == Positions(64, False, 32_000)
    (error,) = too_long("training", 65, Positions(64, learned=True))
    assert str(error) == (
        "the longest of the training rows has 65 tokens, the model 64 positions\n"
        "    Hint: max_length: 64"
    )
    assert [p.severity for p in too_long("training", 65, Positions(64))] == ["warning"]
    assert too_long("training", 64, Positions(64, learned=True)) == []


def odd_model(demo: Path, folder: Path, **tokenizer: Any) -> Path:
    """The demo's model with another tokenizer_config.json or template."""
    folder.mkdir()
    for path in (demo / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    given = json.loads((folder / "tokenizer_config.json").read_text())
    for name, value in tokenizer.items():
        given[name] = value
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def test_a_chat_template_that_is_not_enough(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", lines(CHAT))
    fields = {"dataset_name": path, "assistant_only_loss": True}
    unmarked = odd_model(demo, tmp_path / "unmarked", chat_template=PLAIN)
    found = problems(demo, tmp_path, model_name_or_path=unmarked, **fields)
    assert "the chat template does not mark what the assistant says" in found
    fields["assistant_only_loss"] = False
    assert problems(demo, tmp_path, model_name_or_path=unmarked, **fields) == ""
    bare = odd_model(demo, tmp_path / "bare", chat_template=None)
    found = problems(demo, tmp_path, model_name_or_path=bare, **fields)
    assert "the tokenizer has no chat template" in found
    strict = "{{ raise_exception('roles must alternate') }}"
    picky = odd_model(demo, tmp_path / "picky", chat_template=strict)
    found = problems(demo, tmp_path, model_name_or_path=picky, **fields)
    assert "cannot be made into tokens: TemplateError: roles must alternate" in found


def test_rows_beyond_learned_positions(demo: Path, tmp_path: Path) -> None:
    folder = odd_model(demo, tmp_path / "gpt2")
    GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    path = write(tmp_path / "x.jsonl", lines({"text": "word " * 40}))
    fields = {"dataset_name": path, "model_name_or_path": folder, "packing": False}
    found = problems(demo, tmp_path, **fields, max_length=64)
    assert "tokens, the model 16 positions" in found
    assert problems(demo, tmp_path, **fields, max_length=16) == ""


def check(recipe: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", str(recipe), *flags])
    return result.exit_code, result.stdout


def test_check_looks_at_the_data_and_says_at_what_it_did_not(demo: Path, tmp_path: Path) -> None:
    values = argv(demo, tmp_path / "run")
    text = "".join(f"{n[2:]}: {v}\n" for n, v in zip(values[::2], values[1::2], strict=True))
    recipe = write(tmp_path / "r.yaml", text)
    code, told = check(recipe)
    assert code == 0, told
    assert f"looked at:     training rows, at most 100, of {demo}/data/train.jsonl" in told
    assert "looked at:     rows as tokens: 8 training, 8 evaluation" in told
    assert "not looked at: the rows after those" in told
    assert "not looked at: how it is launched: no --config_file is given" in told
    few = ("--num_processes", "13", "--dataloader_drop_last", "true")  # 13 x 8 of 96 rows
    code, told = check(recipe, *few)
    assert code == 2
    assert "dataloader_drop_last leaves none of 96 evaluation rows: a batch has 13 x 8" in told
    code, told = check(recipe, "--dataset_name", "owner/data")
    assert code == 0, told
    assert "not looked at: the rows of owner/data, which are on the Hub" in told
    bad = write(tmp_path / "bad.jsonl", lines({"text": None}))
    code, told = check(recipe, "--dataset_name", str(bad), "--assistant_only_loss", "false")
    assert code == 2
    assert "1 of 1 training rows cannot be used" in told
    code, told = check(recipe, "--dataset_name", "data/gone.jsonl")
    assert code == 2
    assert "there is no data/gone.jsonl" in told
    assert "not looked at: the rows" in told


def test_the_same_rows_as_before_for_everybody(demo: Path, tmp_path: Path) -> None:
    """What needs no other names is not touched: a run of an older version goes on with it."""
    recipe = parse_recipe(argv(demo, tmp_path / "run"))
    inputs, settings, _ = train.gather_inputs(recipe)
    plain = datasets.load_dataset("json", data_files=str(demo / "data/train.jsonl"))["train"]
    assert inputs["train_dataset"][:] == plain[:]
    assert inputs["train_dataset"].features == plain.features
    assert str(settings["dataset"]).startswith(f"{len(plain)} rows, ")

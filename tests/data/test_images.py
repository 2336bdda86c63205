"""Rows with images: known by their bytes wherever they lie, and refused at the start."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trl.data_utils import prepare_multimodal_messages
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.data.dataset import fingerprint, load_data, stream_fingerprint
from keepstep.data.images import ANY, named, placeholders
from keepstep.preflight.inspection import inspect
from keepstep.recipe.config import ConfigError
from keepstep.recipe.model import build_tokenizer
from keepstep.recipe.parse import parse_recipe
from tests.helpers.recipes import argv
from tests.helpers.vision import IMAGE_TOKENS, fields, make_vision, picture, turns, write_rows

APART = "import sys; from keepstep.data.dataset import fingerprint, load; "
APART += "print(fingerprint(load(sys.argv[1])['train']))"


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe(vision: Path, tmp_path: Path, **others: object) -> Any:
    values = {"eval_strategy": "no", "keep_ranking": "recency", **others}
    return parse_recipe(argv(vision, **fields(vision, tmp_path / "run", **values)))  # type: ignore[arg-type]


def problems(vision: Path, tmp_path: Path, rows: list[Any] | None = None, **others: object) -> str:
    """What is said before there is a model."""
    if rows is not None:
        file = tmp_path / "rows.jsonl"
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(picture(number)[0])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        others = {"dataset_name": file, **others}
    asked = recipe(vision, tmp_path, **others)
    try:
        data = load_data(asked.data, asked.training)
        processing = build_tokenizer(asked.model, asked.training)
        found = inspect(data, processing, asked, 2).problems
    except ConfigError as error:
        found = error.problems
    return "\n".join(problem.told() for problem in found)


def parquet(folder: Path, numbers: range) -> Path:
    """The same rows with the images in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"images": [picture(n)[0]], **turns(picture(n)[1])} for n in numbers]
    kept = datasets.Dataset.from_list(rows)
    kept = kept.cast_column("images", datasets.List(datasets.Image()))
    kept.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def test_known_by_bytes_in_every_process(tmp_path: Path) -> None:
    """Named by file, here and in another folder; in a parquet; each in two processes."""
    for place in ("here", "there"):
        write_rows(tmp_path / place / "rows.jsonl", 6)
    files = [tmp_path / "here/rows.jsonl", tmp_path / "there/rows.jsonl"]
    files.append(parquet(tmp_path / "parquet", range(6)))
    told = [fingerprint(load_of(file)) for file in files]
    assert len(set(told)) == 1
    apart = subprocess.run(
        [sys.executable, "-c", APART, str(files[2])], capture_output=True, text=True, check=True
    )
    assert apart.stdout.strip().endswith(str(told[0]))
    (tmp_path / "there/4.png").write_bytes(picture(77)[0])
    assert fingerprint(load_of(files[1])) != told[0]
    picked = load_of(files[2]).select([1, 0, 2])
    assert fingerprint(picked) != fingerprint(load_of(files[2]).select([0, 1, 2]))


def load_of(file: Path) -> Any:
    from keepstep.data.read import load

    return load(str(file))["train"]


def test_a_stream_is_known_by_its_pixels(tmp_path: Path) -> None:
    from keepstep.data.read import load

    def told(numbers: range) -> str | None:
        return stream_fingerprint(load(str(parquet(tmp_path, numbers)), stream=True)["train"])

    assert told(range(6)) == told(range(6)) != told(range(1, 7))


def test_files_are_found_beside_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "deep/rows.jsonl", 3)
    rows = load_of(tmp_path / "deep/rows.jsonl")
    assert [row["images"][0].size for row in rows] == [(32, 32), (33, 32), (34, 32)]
    (tmp_path / "deep/1.png").unlink()
    with pytest.raises(
        ConfigError, match=r"row 2: images names a file that is not there: .*1\.png"
    ):
        load_of(tmp_path / "deep/rows.jsonl")
    text = datasets.Dataset.from_list([{"image": "0.png"}, {"image": None}])
    single = named(text, tmp_path / "deep")
    assert single[0]["image"].size == (32, 32)
    assert single[1]["image"] is None


PARTS = st.lists(st.sampled_from(["image", "text"]), max_size=3)
TURN = st.tuples(st.sampled_from(["user", "assistant"]), st.just("words") | PARTS)


@given(turns=st.lists(TURN, min_size=1, max_size=4), count=st.integers(0, 3))
def test_places_as_trl_counts_them(turns: list[Any], count: int) -> None:
    messages = [
        {
            "role": role,
            "content": content
            if isinstance(content, str)
            else [{"type": part} | ({"text": "x"} if part == "text" else {}) for part in content],
        }
        for role, content in turns
    ]
    image = Image.open(io.BytesIO(picture(1)[0]))
    try:
        prepare_multimodal_messages(messages, images=[image] * count)
        taken = True
    except ValueError:
        taken = False
    assert (placeholders(messages) in (ANY, count)) == taken


GOOD = {"images": ["0.png"], **turns("a red square")}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}


@pytest.mark.parametrize(
    ("rows", "others", "expected"),
    [
        ([GOOD, GOOD | {"images": []}], {}, ""),
        ([GOOD], {"packing": True}, "packing: rows with images are not packed"),
        ([GOOD], {"padding_free": True}, "padding_free: rows with images are padded"),
        ([GOOD], {"truncation_mode": "keep_end"}, "truncation_mode: keep_end would cut"),
        ([GOOD], {"pad_to_multiple_of": 8}, "pad_to_multiple_of: not for prompts"),
        (
            [GOOD],
            {"max_length": 12},
            "max_length: 12 cuts the tokens of an image in 1 of 1 training",
        ),
        (
            [GOOD] * 9 + [GOOD | {"images": ["0.png"] * 8}] + [GOOD] * 9,
            {"max_length": 128},
            "max_length: 128 cuts the tokens of an image in 1 of 9 training rows",
        ),
        ([{"images": ["0.png"], "text": "<image> x"}], {}, "the training data has text and images"),
        ([GOOD, GOOD | {"images": None}], {}, "the training data, row 2: images is null"),
        ([GOOD | {"image": "0.png"}], {}, "the training data has both image and images"),
        ([GOOD | {"tools": "[]"}], {}, "the training data has tools, which SFTTrainer"),
        (
            [GOOD | {"images": ["0.png", "1.png"], "prompt": [ASKED]}],
            {},
            "the training data, row 1: 2 images, and 1 places for them in its turns",
        ),
        ([GOOD], {"model_name_or_path": None}, "a column images, and the model takes no images"),
    ],
)
def test_refused_at_the_start(
    vision: Path,
    demo: Path,
    tmp_path: Path,
    rows: list[Any],
    others: dict[str, Any],
    expected: str,
) -> None:
    if "model_name_or_path" in others:
        others = {"model_name_or_path": demo / "model"}
    found = problems(vision, tmp_path, rows, **others)
    assert expected in found
    assert bool(expected) == bool(found)


def test_rows_of_text_alone_for_a_vision_language_model(
    vision: Path, demo: Path, tmp_path: Path
) -> None:
    texts: dict[str, Any] = {"dataset_name": demo / "data/train.jsonl"}
    assert problems(vision, tmp_path, **texts) == ""
    assert "not both" in problems(
        vision, tmp_path, **texts, eval_strategy="steps", keep_ranking="metric"
    )


def test_preview_counts_the_tokens_of_an_image(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    flags = argv(vision, **fields(vision, tmp_path / "run"))  # type: ignore[arg-type]
    told = CliRunner().invoke(app, ["preview", str(tmp_path / "recipe.yaml"), *flags])
    assert told.exit_code == 0, told.output
    assert f"<image> x {IMAGE_TOKENS}" in told.output
    assert f"⟦{picture(0)[1]}<|im_end|>\n⟧" in told.output
    assert "24 rows, 24 used, 0 cut, 0 dropped" in told.output

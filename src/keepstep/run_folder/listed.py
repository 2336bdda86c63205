"""A checkpoint as loaders are shown it: what its manifest lists, and nothing else.

transformers, PEFT and DeepSpeed choose what they load by the files that they find. A model that
somebody has merged into the folder, a copy of a shard, a planted pickle would be loaded beside or
in the place of what was saved, and no digest speaks against it. So loaders are given a folder of
links to the listed files, whose path holds nothing that `glob` takes for a pattern.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from keepstep.run_folder.checkpoint import Checkpoint


@contextmanager
def only_listed(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The same checkpoint at a path of its own, until the block ends. Ranks: any, each its own.

    Raises:
        OSError: there is no room for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="keepstep-") as scratch:
        shown, stored = Path(scratch) / checkpoint.path.name, checkpoint.path.resolve()
        shown.mkdir()
        for above in {name.rpartition("/")[0] for name in checkpoint.manifest.files}:
            (shown / above).mkdir(parents=True, exist_ok=True)
        for name in checkpoint.manifest.files:
            os.symlink(f"{stored}/{name}", f"{shown}/{name}")
        yield replace(checkpoint, path=shown)

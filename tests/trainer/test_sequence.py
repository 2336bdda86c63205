"""A micro-batch in parts, one for each of the processes that share its rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from keepstep.trainer.dealing import IGNORED
from keepstep.trainer.sequence_mixin import part_of


@given(st.integers(1, 4), st.integers(1, 13), st.integers(1, 4), st.integers(0, 3))
def test_parts_are_the_whole(given_rows: int, length: int, size: int, more: int) -> None:
    """Each token is in one part, each label beside the token that is to say it; what is added
    teaches nothing."""
    rows = given_rows + more
    ids = torch.arange(1, given_rows * length + 1).view(given_rows, length)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": ids}
    parts = [part_of(inputs, place, size, rows) for place in range(size)]
    assert {tuple(value.shape) for part in parts for value in part.values()} == {
        (rows, -(-length // size))
    }
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    width = whole["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:given_rows, :length], ids)
    assert whole["position_ids"].tolist() == [list(range(width))] * rows
    assert int(whole["attention_mask"].sum()) == ids.numel()
    said = whole["shift_labels"]
    assert torch.equal(said[:given_rows, : length - 1], ids[:, 1:])
    assert int((said != IGNORED).sum()) == given_rows * (length - 1)

from __future__ import annotations

import pytest

from keepstep.checkpoint.selection import Candidate, SelectionError, choose

GOOD, OLD, TORN = Candidate(20), Candidate(10), Candidate(30, ("model.safetensors is missing",))


def test_auto_takes_the_newest_valid_and_says_why_not_the_others() -> None:
    choice = choose("auto", [OLD, TORN, GOOD])
    assert choice.step == 20
    assert choice.passed_by == {30: "model.safetensors is missing"}


def test_auto_starts_from_the_beginning_only_without_checkpoints() -> None:
    assert choose("auto", []).step is None
    with pytest.raises(SelectionError, match="checkpoint-30: model"):
        choose("auto", [TORN])


def test_never_refuses_a_folder_with_checkpoints() -> None:
    assert choose("never", []).step is None
    with pytest.raises(SelectionError, match="never"):
        choose("never", [GOOD])

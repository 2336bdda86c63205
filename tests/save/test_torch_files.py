"""What torch.save is given: tensors with a storage of their own, and no copy of them."""

from __future__ import annotations

import io

import pytest
import torch

from keepstep.save.torch_files import owned

WHOLE = torch.arange(24.0).view(4, 6)
VIEWS = {
    "all": WHOLE,
    "rows": WHOLE[1:3],
    "half precision": torch.arange(8, dtype=torch.bfloat16)[2:5],
    "flags": torch.tensor([True, False, True])[1:],
    "a number": torch.tensor(3),
    "a parameter": torch.nn.Parameter(torch.ones(5))[:2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_stored_alone_and_not_copied(name: str) -> None:
    view = VIEWS[name]
    (own,) = owned([view])
    assert own.data_ptr() == view.data_ptr()
    assert own.untyped_storage().nbytes() == view.nbytes
    assert (own.dtype, own.shape) == (view.dtype, view.shape)
    assert torch.equal(own, view.detach())


def test_the_same_memory_is_stored_once() -> None:
    state = owned({"a": WHOLE[:2], "b": [WHOLE[:2]], "transposed": WHOLE.t()})
    assert state["a"].data_ptr() == state["b"][0].data_ptr()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["a"].untyped_storage().data_ptr() == loaded["b"][0].untyped_storage().data_ptr()
    assert torch.equal(loaded["transposed"], WHOLE.t())

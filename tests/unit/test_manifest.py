from __future__ import annotations

import math

import pytest

from keepstep.checkpoint.manifest import (
    FileEntry,
    Manifest,
    ManifestError,
    differences,
    finite_metrics,
    missing_state,
    not_reshardable,
    step_of,
)
from tests.helpers.folders import manifest

FILES = {"a.pt": FileEntry(0, 10, "0" * 32), "sub/b.pt": FileEntry(1, 20, "1" * 32)}
SIZES = {"a.pt": 10, "sub/b.pt": 20}


def test_json_and_back() -> None:
    written = manifest(5, files=FILES)
    assert Manifest.from_json(written.to_json()) == written
    assert written.total_bytes == 30


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_another_format_is_named() -> None:
    text = manifest(5).to_json().replace('"format_version": 1', '"format_version": 9')
    with pytest.raises(ManifestError, match="format 9"):
        Manifest.from_json(text)


def test_complete_means_every_file_of_every_rank_in_its_size() -> None:
    complete = manifest(5, files=FILES)
    assert differences(complete, SIZES) == []
    assert differences(complete, SIZES | {"notes.txt": 3}) == []
    assert differences(complete, {"a.pt": 10}) == ["sub/b.pt is missing"]
    assert differences(complete, SIZES | {"a.pt": 9}) == ["a.pt has 9 bytes, 10 were written"]
    three_ranks = manifest(5, files=FILES, world_size=3)
    assert differences(three_ranks, SIZES) == ["rank 2 has no file in it"]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-0", 0),
        ("checkpoint-12", 12),
        ("checkpoint-012", None),
        ("checkpoint-", None),
        ("checkpoint--1", None),
        ("checkpoint-mine", None),
        ("checkpoint-12-copy", None),
        ("my-checkpoint-12", None),
        ("checkpoint-12\n", None),
    ],
)
def test_names_that_are_checkpoints(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_only_finite_numbers_are_metrics() -> None:
    report = {"a": 1, "b": 2.5, "nan": math.nan, "inf": math.inf, "text": "x", "flag": True}
    assert finite_metrics(report) == {"a": 1.0, "b": 2.5}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt", None),
        ("global_step4/bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt", None),
        ("universal/zero/model.layers.1.mlp.gate_proj.weight/fp32.pt", None),
        ("global_step4/mp_rank_01_model_states.pt", "tensor parallelism"),
        ("global_step4/zero_pp_rank_0_mp_rank_13_optim_states.pt", "tensor parallelism"),
        ("global_step4/layer_00-model_states.pt", "pipeline parallelism"),
        ("global_step4/layer_0_expert_3_mp_rank_00_model_states.pt", "mixture of experts"),
        ("global_step4/offloaded_tensors/rank_0/a.swp", "an optimizer on NVMe"),
    ],
)
def test_files_that_are_not_resharded(name: str, reason: str | None) -> None:
    found = not_reshardable(["latest", name])
    assert found == (reason and f"{reason} is not resharded")


def test_an_adopted_checkpoint_may_lack_rng_states() -> None:
    files = {
        "trainer_state.json": FileEntry(0, 1, ""),
        "scheduler.pt": FileEntry(0, 1, ""),
        "universal/zero/optimizer_state.pt": FileEntry(0, 1, ""),
    }
    known = manifest(5, files=files, world_size=1, zero_stage=3)
    assert missing_state(known) == ["rng_state.pth"]
    assert missing_state(manifest(5, files=files, world_size=1, zero_stage=3, origin="x")) == []

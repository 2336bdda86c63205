from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from keepstep.policy.completeness import differences, missing_state, not_reshardable, on_machine
from keepstep.policy.manifest import (
    LONGEST_MANIFEST,
    FileEntry,
    Manifest,
    ManifestError,
    NewerFormatError,
    finite_metrics,
    step_of,
)
from keepstep.policy.parallel_layout import ParallelLayout
from tests.helpers.folders import manifest

FILES = {"a.pt": FileEntry(0, 10, "0" * 32), "sub/b.pt": FileEntry(1, 20, "1" * 32)}
SIZES = {"a.pt": 10, "sub/b.pt": 20}


def resealed(written: Manifest, change: Callable[[dict[str, Any]], None]) -> str:
    """A manifest that somebody has changed who knows how its digest is made."""
    values = json.loads(written.to_json())
    del values["digest"]
    change(values)
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{\n "digest": "{digest}",\n{text[2:]}'


def test_what_a_machine_loads_on_a_disk_of_its_own() -> None:
    """On other processes, or sharded otherwise, a rank's share may begin in any rank's file."""
    files = {f"{rank}.pt": FileEntry(rank, 10, "0" * 32) for rank in range(4)}
    of = manifest(5, files=files, world_size=4, zero_stage=2)
    assert on_machine(of, [2, 3], ParallelLayout(4, 2)) == {"0.pt", "2.pt", "3.pt"}
    for other in (ParallelLayout(2, 2), ParallelLayout(4, 3), ParallelLayout(4)):
        assert on_machine(of, [1], other) == set(files)


def test_json_and_back() -> None:
    written = manifest(5, files=FILES)
    assert Manifest.from_json(written.to_json()) == written
    assert written.total_bytes == 30


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_a_newer_format_is_named_and_is_no_damage() -> None:
    text = resealed(manifest(5), lambda values: values.update(format_version=9))
    with pytest.raises(NewerFormatError, match=r"newer keepstep: manifest format 9; .*upgrade"):
        Manifest.from_json(text)
    flipped = manifest(5).to_json().replace('"format_version": 2', '"format_version": 3')
    with pytest.raises(ManifestError, match="its digest differs"):
        Manifest.from_json(flipped)
    more = resealed(manifest(5), lambda values: values.update(tensors=7))
    with pytest.raises(NewerFormatError, match="newer keepstep: it has a field 'tensors'"):
        Manifest.from_json(more)


def test_an_older_manifest_has_no_digest_and_is_read() -> None:
    values = json.loads(manifest(5, files=FILES).to_json())
    del values["digest"]
    older = Manifest.from_json(json.dumps(values | {"format_version": 1}, indent=1))
    assert not older.has_digest
    assert replace(older, format_version=2) == manifest(5, files=FILES)
    assert Manifest.from_json(older.to_json()).has_digest
    for lost in (values, values | {"format_version": 1, "digest": "0" * 64}):
        with pytest.raises(ManifestError):
            Manifest.from_json(json.dumps(lost, indent=1))


def test_no_flipped_bit_of_a_manifest_is_believed() -> None:
    batch = {"per_device": 1, "accumulation": 4, "world_size": 2}
    dealt = {"batch": batch, "asked": batch, "rows": 50}
    written = manifest(5, files=FILES, dealt=dealt).to_json().encode()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ManifestError, UnicodeDecodeError)):
            Manifest.from_json(flipped.decode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("world_size", 0),
        ("world_size", -1),
        ("world_size", 10**9),
        ("world_size", True),
        ("world_size", "2"),
        ("zero_stage", 7),
        ("global_step", 5.0),
        ("samples", -1),
        ("epoch", 10**20),
        ("epoch", "1"),
        ("metrics", {"eval_loss": "low"}),
        ("metrics", {"eval_loss": None}),
        ("metrics", []),
        ("settings", None),
        ("settings", {"seed": "x"}),
        ("about", {"tokens": "many"}),
        ("versions", {"torch": 2}),
        ("run_id", None),
        ("files", []),
        ("files", {"a.pt": None}),
        ("files", {"a.pt": {"rank": 0, "bytes": -1, "xxh3_128": "0" * 32}}),
        ("files", {"a.pt": {"rank": -1, "bytes": 1, "xxh3_128": "0" * 32}}),
        ("files", {"a.pt": {"rank": 0, "bytes": 1, "xxh3_128": "none"}}),
        ("dealt", {"batch": {}}),
        ("dealt", {"batch": {"per_device": 0, "accumulation": 1, "world_size": 1}}),
        ("format_version", "2"),
        ("format_version", 0),
        ("format_version", None),
    ],
)
def test_a_field_of_another_type_or_size_is_named(name: str, value: object) -> None:
    text = resealed(manifest(5, files=FILES), lambda values: values.update({name: value}))
    with pytest.raises(ManifestError, match=name):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "name",
    [
        *("", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", ".", "a/..", "C:/x", "a\\b"),
        *("a\0b", "a\nb", "\x1b[31m", "manifest.json", "x" * 300, "/".join(["abc"] * 300)),
        *("a.pt/inside",),  # where a.pt is a file
    ],
)
def test_a_file_of_a_manifest_lies_in_its_folder(name: str) -> None:
    entry = asdict(FileEntry(0, 1, "0" * 32))
    text = resealed(manifest(5, files=FILES), lambda values: values["files"].update({name: entry}))
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_names_that_are_one_on_some_file_systems() -> None:
    entry = FileEntry(0, 1, "0" * 32)
    both = manifest(5, files={"caf\u00e9.pt": entry, "cafe\u0301.pt": entry})
    with pytest.raises(ManifestError, match="there twice"):
        Manifest.from_json(both.to_json())


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ('{"format_version": 2, "format_version": 2}', "twice"),
        ('{"format_version": 1, "epoch": NaN}', "NaN is no number"),
        ('{"format_version": 1, "epoch": 1e999}', "no finite number"),
        ('{"format_version": 1, "epoch": ' + "9" * 5000 + "}", "beyond all counts"),
        ("[" * 100_000, "too deep"),
        ('{"format_version": 1, "settings": ' + '{"a":' * 200_000, "too deep"),
        ('{"run_id": "\\ud800"}', "surrogate"),
        (" " * (LONGEST_MANIFEST + 1), "more than"),
    ],
)
def test_json_that_is_not_believed(text: str, seen: str) -> None:
    with pytest.raises(ManifestError, match=seen):
        Manifest.from_json(text)


def test_what_is_behind_a_manifest_is_not_passed_by() -> None:
    with pytest.raises(ManifestError, match="Extra data"):
        Manifest.from_json(manifest(5).to_json() + "{}")


def test_many_ranks_cost_no_time() -> None:
    many = manifest(5, files=FILES, world_size=100_000)
    assert len(differences(many, SIZES)) < 10
    assert len(missing_state(many)) > 100_000


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


def test_deepspeed_at_stage_0_keeps_the_state_in_its_own_file() -> None:
    names = ("trainer_state.json", "scheduler.pt", "rng_state.pth")
    files = {name: FileEntry(0, 1, "") for name in (*names, "optimizer.pt")}
    known = manifest(5, files=files, world_size=1, zero_stage=0, deepspeed=True)
    assert missing_state(known) == []
    older = {
        name: FileEntry(0, 1, "") for name in (*names, "global_step5/mp_rank_00_model_states.pt")
    }
    assert missing_state(manifest(5, files=older, world_size=1, zero_stage=0)) == []
    only_names = {name: FileEntry(0, 1, "") for name in names}
    assert missing_state(manifest(5, files=only_names, world_size=1, zero_stage=0)) == [
        "optimizer.pt"
    ]
    assert ParallelLayout(1, 0, deepspeed=True).strategy == "ZeRO-0"
    assert ParallelLayout(1).strategy == "DDP"

"""Whatever a manifest holds, it is one, or is refused: hundreds of them, made at random."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.policy.batch import Dealt
from keepstep.policy.completeness import differences, missing_state
from keepstep.policy.manifest import Manifest, ManifestError
from tests.helpers.folders import manifest
from tests.policy.test_manifest import FILES, SIZES, resealed

# What JSON can be, and what hostile JSON is made of.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["", "..", "/x", "a/../b", "\0", "manifest.json", -1, 0, 10**9, 1e300]),
)
values_of_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
NAMES = [field.name for field in fields(Manifest)]


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), values_of_json, max_size=3),
    st.sets(st.sampled_from(NAMES), max_size=1),
    st.booleans(),
)
def test_whatever_a_manifest_holds_it_is_one_or_is_refused(
    changes: dict[str, Any], lost: set[str], sealed: bool
) -> None:
    def change(values: dict[str, Any]) -> None:
        values.update(changes)
        for name in lost:
            values.pop(name, None)

    text = resealed(manifest(5, files=FILES), change)
    if not sealed:
        text = json.dumps(json.loads(text) | {"format_version": 1})
    try:
        read = Manifest.from_json(text)
    except ManifestError:
        return
    assert Manifest.from_json(read.to_json()) == replace(read, format_version=2)
    differences(read, SIZES)
    missing_state(read)
    Dealt.from_json(read.dealt)

"""What the machines of a run have together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.node_parts import Held, together

files = st.frozensets(st.sampled_from("abcdef"))
branches = st.sampled_from(["old", "new"])
parts = st.dictionaries(st.integers(0, 3), st.builds(Held, branches, st.just(6), files))


@given(st.dictionaries(st.integers(0, 7), parts))
def test_whole_is_what_lacks_no_file(held: dict[int, dict[int, Held]]) -> None:
    """Of one branch; and whoever is said to have a file has it."""
    found = together(held)
    for step, sources in found.items():
        assert set(sources) == set("abcdef")
        assert all(name in held[rank][step].names for name, rank in sources.items())
        assert len({held[rank][step].whole for rank in sources.values()}) == 1
    for step in {step for parts in held.values() for step in parts} - found.keys():
        for whole in ("old", "new"):
            here = [p[step].names for p in held.values() if step in p and p[step].whole == whole]
            assert len(frozenset().union(*here)) < 6

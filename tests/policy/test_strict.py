from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from keepstep.policy.strict import (
    TextError,
    UnknownFieldError,
    build,
    checked,
    name_fault,
    names_fault,
    with_check,
)


@dataclass(frozen=True)
class Thing:
    size: int
    share: float | None
    names: dict[str, str] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] = ()
    kind: Literal["a", "b"] = "a"
    rest: Any = None


def test_values_have_the_types_of_the_fields() -> None:
    made = build(Thing, {"size": 1, "share": 2, "spans": [[1, 2], [3, 4]], "kind": "b"})
    assert made == Thing(1, 2.0, spans=((1, 2), (3, 4)), kind="b")
    assert type(made.share) is float


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": True}, "size is True, not int"),
        ({"size": 1.0}, "size is 1.0, not int"),
        ({"size": None}, "size is null, not int"),
        ({"share": "1"}, "share is '1', not a number"),
        ({"names": {"x": 1}}, "names.x is 1, not str"),
        ({"names": []}, "names is a list, not an object"),
        ({"spans": [[1]]}, "spans is a list, not a list of that length"),
        ({"spans": [[1, "2"]]}, "spans is '2', not int"),
        ({"kind": "c"}, "kind is none of a, b"),
        ({"more": 1}, "it has a field 'more'"),
    ],
)
def test_what_has_not_is_named(change: dict[str, Any], why: str) -> None:
    with pytest.raises(TextError, match=why):
        build(Thing, {"size": 1, "share": None, **change})


def test_what_lacks_a_field_is_not_of_a_newer_version() -> None:
    with pytest.raises(UnknownFieldError):
        build(Thing, {"size": 1, "share": None, "more": 1})
    with pytest.raises(TextError, match="it has no share"):
        build(Thing, {"size": 1, "shave": None})


@dataclass(frozen=True)
class Plain:
    size: int
    name: str


def test_of_plain_fields_too() -> None:
    kind = dict[str, Plain]
    assert build(kind, {"a": {"name": "x", "size": 1}}) == {"a": Plain(1, "x")}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"size": True}, r"things\.a\.size is True, not int"),
        ({"size": "1", "name": 1}, r"things\.a\.size is '1', not int"),
        ({"more": 1}, r"things\.a has a field 'more'"),
    ]
    for change, why in changes:
        with pytest.raises(TextError, match=why):
            build(kind, {"a": {"size": 1, "name": "x", **change}}, "things")
    with pytest.raises(TextError, match=r"things\.a has no name"):
        build(kind, {"a": {"size": 1, "nome": "x"}}, "things")
    with pytest.raises(TextError, match="it is null, not int"):
        build(int, None)


def test_depth_has_an_end() -> None:
    deep: Any = 0
    for _ in range(30):
        deep = {"x": deep}
    with pytest.raises(TextError, match="rest is nested too deep"):
        build(Thing, {"size": 1, "share": None, "rest": deep})


def test_names() -> None:
    assert name_fault("global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt") is None
    assert name_fault("..double/…/x.y..z") is None
    assert names_fault(["a/b", "a/c", "d"]) is None
    assert names_fault(["a/b", "a"]) == "'a' is a file and a folder"


def test_no_flipped_bit_of_a_line_is_believed() -> None:
    line = with_check(json.dumps({"event": "resume", "step": 12, "request": "auto"})).encode()
    assert checked(line.decode()) == ({"event": "resume", "step": 12, "request": "auto"}, True)
    for bit in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((TextError, UnicodeDecodeError)):
            checked(flipped.decode())


def test_a_line_without_a_check_is_an_older_versions() -> None:
    assert checked('{"event": "end"}') == ({"event": "end"}, False)
    with pytest.raises(TextError):
        checked('{"event": "end"')

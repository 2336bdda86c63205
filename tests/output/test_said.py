"""What is printed, as lines: of a bar its last state, nothing that steers a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.output.environment import hidden, secrets_in
from keepstep.output.said import LONGEST, Lines, shown


@pytest.mark.parametrize(
    ("given_", "lines"),
    [
        (b"one\ntwo\nthr", [b"one", b"two"]),
        (b"one\r\n", [b"one"]),
        (b"\r 10%|#   \r 50%|##  \r100%|####\nnext\n", [b"100%|####", b"next"]),
        (b"\x1b[?25l\r\x1b[2Kstep 3\r\x1b[2Kstep 3  loss 1.0\nstep 4", [b"step 3  loss 1.0"]),
        (b"\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07\n", [b"red link"]),
        (b"\n\n", [b"", b""]),
        (b"a\r   \n", [b"a"]),
    ],
)
def test_lines(given_: bytes, lines: list[bytes]) -> None:
    assert Lines().take(given_) == lines


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    lines, told, begin = Lines(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        told += lines.take(data[begin:cut])
        begin = max(begin, cut)
    assert told == [shown(line) for line in data.split(b"\n")[:-1]]


def test_what_never_ends_is_bounded() -> None:
    lines, told = Lines(), []
    for number in range(3000):  # a bar of a download, for hours
        told += lines.take(b"\r%6d" % number + b"x" * 60)
    assert told == []
    assert lines.rest() == [b"  2999" + b"x" * 60]
    told = lines.take(b"y" * 3 * LONGEST)
    assert [len(line) for line in told] == [3 * LONGEST]
    assert lines.rest() == []


URL = "https://hooks.slack.com/services/T0/B0/s3cr3t"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"posted to {URL}", "posted to ***"),
        ("POST /services/T0/B0/s3cr3t 404", "POST /*** 404"),
        ("url=https%3A%2F%2Fhooks.slack.com%2Fservices%2FT0%2FB0%2Fs3cr3t", "url=***"),
        ("-----BEGIN\nMIIEabcdefgh\n", "-----BEGIN\n***\n"),
        ("WANDB_API_KEY=short x", "WANDB_API_KEY=*** x"),
        ("{'HF_TOKEN': 'short', 'A': 1}", "{'HF_TOKEN': '***', 'A': 1}"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnop", "***"),
        ("missing keys: lm_head.weight", "missing keys: lm_head.weight"),
        ("eos_token: </s> loss=1.0", "eos_token: </s> loss=1.0"),
    ],
)
def test_secrets_go(text: str, left: str) -> None:
    environment = {"KEEPSTEP_NOTIFY_URL": URL, "MY_KEY": "x\nMIIEabcdefgh", "PATH": "/usr/bin"}
    assert hidden(text, environment) == left
    assert "/usr/bin" not in secrets_in(environment)

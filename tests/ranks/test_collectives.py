"""One rank's error is everybody's: of the same type, with the same message, and soon."""

from __future__ import annotations

import re

import pytest

from keepstep.ranks.carried_error import CarriedError, rank_of
from keepstep.ranks.collectives import any_of, on_all, on_main
from keepstep.ranks.watchdog import _causes
from tests.helpers.ranks import PROGRAMS, Ranks

FULL = "[Errno 28] No space left on device"
SAVE = "checkpoint-3 was not saved: rank 1: OSError: no space"
# case → what every rank hears of an error on the main process, and of one on the last rank alone:
# type, message, attributes.
HEARD = {
    "selection": (
        "SelectionError | there is no step 3 | ",
        "SelectionError | rank 2: there is no step 3 | ranks=(2,)",
    ),
    "full": (
        f"OSError | {FULL}: '/disk/file' | errno=28 filename=/disk/file",
        f"OSError | {FULL} (rank 2): '/disk/file' | errno=28 filename=/disk/file",
    ),
    "two-words": (
        "TwoWordsError | one two | second=two",
        "TwoWordsError | rank 2: one two | second=two",
    ),
    "with-a-lock": (
        "TwoWordsError | one two | second=two",
        "TwoWordsError | rank 2: one two | second=two",
    ),
    "save": (
        f"SaveError | {SAVE} | errno=28 step=3 ranks=(1,) disk_full=True",
        f"SaveError | rank 2: {SAVE} | errno=28 step=3 ranks=(1,) disk_full=True",
    ),
    "key": ("KeyError | 'name' | ", "KeyError | 'name' | "),
    "frozen": ("FrozenError | cold | ", "FrozenError | rank 2: cold | "),
    "unpicklable": (
        "RankError | LocalError: of a function | ",
        "RankError | rank 2: LocalError: of a function | ranks=(2,)",
    ),
    "silent": ("RankError | SilentError | ", "RankError | rank 2: SilentError | ranks=(2,)"),
    "interrupt": ("KeyboardInterrupt |  | ", "KeyboardInterrupt |  | "),
    "exit": ("SystemExit | 3 | code=3", "SystemExit | 3 | code=3"),
}


def lines(output: str, part: str) -> list[str]:
    """What ranks 0, 1 and 2 say of a part."""
    found = sorted(re.findall(rf"^rank (\d): {part}: (.*)$", output, re.MULTILINE))
    assert [rank for rank, _ in found] == ["0", "1", "2"], output
    return [text for _, text in found]


@pytest.mark.parametrize("case", HEARD)
def test_every_rank_raises_the_same(ranks: Ranks, case: str) -> None:
    run = ranks.start([case], strategy="ddp", processes=3, script=PROGRAMS / "collective_errors.py")
    assert run.wait() == [0, 0, 0], run.output
    on_main_process, on_last = HEARD[case]
    noted = "['trying: met by rank {0}']"
    assert lines(run.output, "main") == [f"{on_main_process} | 0 {noted.format(0)}"] * 3
    assert lines(run.output, "last") == [f"{on_last} | 2 {noted.format(2)}"] * 3
    everybody = [f"{on_main_process} | {rank} " for rank in range(3)]
    for expected, text in zip(everybody, lines(run.output, "all"), strict=True):
        assert text.startswith(expected)  # whose error it is they all know: nobody is named
    for rank in range(3):
        assert f"rank {rank}: then 7 {rank} [True, False]" in run.output


def test_a_configuration_s_problems_arrive(ranks: Ranks) -> None:
    run = ranks.start(
        ["config"], strategy="ddp", processes=2, script=PROGRAMS / "collective_errors.py"
    )
    assert run.wait() == [0, 0], run.output
    assert len(re.findall(r"ConfigError \| (?:rank 1: )?a$", run.output, re.MULTILINE)) == 6
    assert run.output.count("problems=2") == 6


def test_a_value_that_cannot_be_sent_is_an_error_of_all(ranks: Ranks) -> None:
    run = ranks.start(
        ["value"], strategy="ddp", processes=3, script=PROGRAMS / "collective_errors.py"
    )
    assert run.wait() == [0, 0, 0], run.output
    for text in lines(run.output, "main"):
        assert text.startswith("TypeError | cannot pickle '_thread.lock' object")
    assert lines(run.output, "last") == [
        "no error, int",
        "no error, int",
        "no error, lock",  # it stays where it is
    ]


def test_what_the_ranks_have_told_each_other_is_no_broken_connection() -> None:
    """gloo's errors are RuntimeErrors, too: after one of those a rank listens for who is gone."""
    broken = RuntimeError("Connection closed by peer")
    assert list(_causes(broken)) == [broken]
    told = CarriedError.of(RuntimeError("shapes differ"), 1).error("loading", 0, broken, True)
    assert str(told) == "rank 1: shapes differ"
    assert told.__cause__ is broken
    assert list(_causes(told)) == []


def test_alone_it_is_a_call() -> None:
    """No process group: the value need not be picklable, and the error is the one raised."""
    assert on_main("counting", lambda: 3) == 3
    assert on_all("counting", lambda: 4) == 4
    assert any_of(True, False) == [True, False]
    value = object()
    assert on_main("making", lambda: value) is value
    for collective in (on_main, on_all):
        with pytest.raises(KeyError, match="x") as raised:
            collective("looking", lambda: dict[str, int]()["x"])
        assert rank_of(raised.value) is None
        assert not hasattr(raised.value, "__notes__")
